"""One model, run in different ways, gives the same numbers: stacked or not, recomputed or not, packed or apart.

Also: what a preset is (its parameter count is the published one), and what a wrong config or tree is told.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.models.config import matmul_parameters, train_flops_per_token
from easylm_plus.models.families import PRESETS, preset
from easylm_plus.models.norms import RMSNorm
from easylm_plus.models.transformer import (
    Transformer,
    abstract_parameters,
    init_parameters,
    stack_layers,
    unstack_layers,
)
from easylm_plus.models.weights import MissingWeight
from easylm_plus.numerics.precision import POLICIES, precision

SMALL = preset("debug", vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8, init="fan_in")
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 11))


@functools.cache
def model_of(scan=True, policy="float32", **keys):
    return Transformer(dataclasses.replace(SMALL, scan_layers=scan, **keys), POLICIES[policy])


@functools.cache
def parameters(scan=True):
    rng, (shapes, _) = np.random.default_rng(0), abstract_parameters(model_of())
    draw = lambda path, leaf: rng.normal(path[-1].key == "weight", 0.2, leaf.shape).astype(np.float32)
    stacked = jax.tree.map_with_path(draw, shapes)
    return stacked if scan else unstack_layers(stacked)


@functools.cache
def applied(model):
    return jax.jit(model.apply)


def logits_of(model, params, *args):
    return applied(model)({"params": params}, *args)


def loss_and_gradients(scan, remat):
    """Of the sum of squared logits: every weight matters."""
    model = model_of(scan, remat=remat)
    total = lambda params: (model.apply({"params": params}, TOKENS) ** 2).mean()
    return jax.jit(jax.value_and_grad(total))(parameters(scan))


def assert_equal_trees(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: compare(a, b, **tolerance), actual, expected)


# --- stacked or not ---


def test_the_same_seed_gives_the_same_weights_stacked_or_not():
    stacked, unstacked = (init_parameters(model_of(scan), jax.random.key(0)) for scan in (True, False))
    assert_equal_trees(stack_layers(unstacked), stacked)
    assert_equal_trees(unstack_layers(stacked), unstacked)
    first, second = (unstacked["layers"][i]["mlp"]["up_proj"]["kernel"] for i in "01")
    assert np.abs(first - second).max() > 1e-2  # layers differ from each other


@pytest.mark.parametrize("scan", (True, False), ids=("scanned", "unrolled"))
def test_the_model_declares_its_tree(scan):
    shapes, axes = abstract_parameters(model_of(scan))
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters(scan))
    assert described == shapes
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda leaf: len(leaf.shape), shapes)


def test_scanned_and_unrolled_give_the_same_loss_and_gradients():
    (loss, gradients), (other_loss, other_gradients) = plain(True), plain(False)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    assert_equal_trees(gradients, stack_layers(other_gradients), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scan", (True, False), ids=("scanned", "unrolled"))
@pytest.mark.parametrize("remat", ("dots", "full"))
def test_recomputing_changes_nothing(scan, remat):
    loss, gradients = loss_and_gradients(scan, remat)
    expected_loss, expected = plain(scan)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_equal_trees(gradients, expected, rtol=1e-5, atol=1e-7)


@functools.cache
def plain(scan):
    return loss_and_gradients(scan, "none")


def test_recomputing_is_done():
    """Products in the backward pass of the unrolled model: `dots` repeats attention's two, `full` all nine."""

    def products(remat):
        model = model_of(False, remat=remat)
        total = lambda params: model.apply({"params": params}, TOKENS).sum()
        return str(jax.make_jaxpr(jax.grad(total))(parameters(False))).count(" dot_general[")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert none < dots < full


def test_layers_in_another_order_are_noticed():
    reversed_layers = {**parameters(), "layers": jax.tree.map(lambda x: x[::-1], parameters()["layers"])}
    expected = logits_of(model_of(), parameters(), TOKENS)
    assert np.abs(logits_of(model_of(), reversed_layers, TOKENS) - expected).max() > 1e-2


# --- packed or apart ---


def packed_row():
    """Documents of 5, 4 and 1 tokens, then two of padding."""
    lengths = (5, 4, 1, 2)
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat([1, 2, 3, 0], lengths)
    tokens = np.random.default_rng(1).integers(0, 64, 12)
    return tokens[None], positions[None], segments[None]


@pytest.mark.parametrize("keys", ({}, {"sliding_window": 3}, {"attention": "xla"}), ids=str)
def test_a_packed_row_equals_its_documents_apart(keys):
    model, (tokens, positions, segments) = model_of(**keys), packed_row()
    packed = logits_of(model, parameters(), tokens, positions, segments)
    expected = apart(model)
    np.testing.assert_allclose(packed[:, :10], expected, rtol=0, atol=1e-5)
    assert np.isfinite(packed).all()
    blind = logits_of(model, parameters(), tokens, positions, np.ones_like(segments))  # documents see each other
    assert np.abs(blind[:, :10] - expected).max() > 1e-2


def apart(model):
    """Logits of the documents as rows of their own, joined. What follows a document's end cannot be seen."""
    tokens, rows = packed_row()[0][0], np.zeros((3, 5), int)
    rows[0], rows[1, :4], rows[2, :1] = tokens[:5], tokens[5:9], tokens[9:10]
    logits = logits_of(model, parameters(), rows)
    return np.concatenate([logits[:1], logits[1:2, :4], logits[2:, :1]], axis=1)


def test_positions_are_read():
    tokens, positions, segments = packed_row()
    reset = logits_of(model_of(), parameters(), tokens, positions, segments)
    shifted = logits_of(model_of(), parameters(), tokens, positions + 100, segments)
    stretched = logits_of(model_of(), parameters(), tokens, positions * 2, segments)
    np.testing.assert_allclose(shifted, reset, rtol=0, atol=1e-4)  # rotary: only distances count
    assert np.abs(stretched - reset).max() > 1e-3


# --- dtypes ---


def test_bfloat16_stays_near_float32():
    expected = logits_of(model_of(), parameters(), TOKENS)
    for policy in ("bf16", "bf16_pure"):
        model = model_of(policy=policy)
        params = jax.tree.map(lambda x, model=model: x.astype(model.precision.param), parameters())
        logits = logits_of(model, params, TOKENS)
        assert logits.dtype == jnp.float32
        assert 1e-4 < np.abs(logits - expected).max() < 0.1


def test_norms_are_computed_in_float32():
    x = jnp.full((1, 64), 300.0, jnp.float16)
    assert np.isinf(x * x).all()
    y = RMSNorm(1e-6, POLICIES["float32"]).apply({"params": {"weight": jnp.ones(64)}}, x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 1.0, rtol=1e-3)


# --- counts ---


@pytest.mark.parametrize("variant", ("none", "conv3", "two_convs"))
def test_matmul_parameters_are_those_of_the_tree(variant):
    config = dataclasses.replace(SMALL, tie_embeddings=False, lfa_variant=variant)
    shapes, _ = abstract_parameters(Transformer(config))
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(shapes) if path[-1].key == "kernel"]
    assert matmul_parameters(config) == sum(math.prod(leaf.shape) for leaf in kernels)


def test_train_flops_count_causal_attention_once():
    """2 FLOPs a multiply-add, 3 passes; scores and values over the pairs of a query and a key that it sees."""
    T, heads = 64, SMALL.num_layers * SMALL.num_heads * SMALL.head_dim
    t, s = np.mgrid[:T, :T]
    for keys, seen in (({}, s <= t), ({"causal": False}, s < T), ({"sliding_window": 5}, (s <= t) & (s > t - 5))):
        attention = 3 * 2 * 2 * heads * seen.sum() / T
        found = train_flops_per_token(dataclasses.replace(SMALL, **keys), T)
        assert found == pytest.approx(6 * matmul_parameters(SMALL) + attention, rel=1e-12)


# --- what a wrong config or tree is told ---


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"num_layers": 0}, r"model\.num_layers = 0: expected a positive number"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads = 3: expected a divisor of num_heads = 4"),
        ({"rope_scaling": "yarn"}, r"model\.rope_scaling = 'yarn': expected one of none, linear"),
    ),
)
def test_a_config_that_no_model_has_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **keys)


@pytest.mark.parametrize(
    ("key", "message"), (("remat", "none, dots, full"), ("init", "llama, gpt2, small, fan_in, palm"))
)
def test_an_unknown_choice_lists_the_known_ones(key, message):
    with pytest.raises(UserError, match=rf"model\.{key} = 'x': expected one of {message}"):
        abstract_parameters(model_of(**{key: "x"}))


def test_an_unknown_preset_or_precision_names_what_there_is():
    with pytest.raises(UserError, match="did you mean 'koala-13b'"):
        preset("koala-13")
    with pytest.raises(UserError, match="expected one of float32, bf16, bf16_pure"):
        precision("fp16")
    assert set(PRESETS) >= {"debug", "tiny", "koala-7b", "koala-13b"}


def test_a_missing_weight_is_named():
    params = parameters(scan=False)
    damaged = {**params, "layers": {**params["layers"], "1": {**params["layers"]["1"], "mlp": {}}}}
    with pytest.raises(MissingWeight, match="no weight layers/1/mlp/gate_proj/kernel"):
        model_of(scan=False).apply({"params": damaged}, TOKENS)


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"num_experts": 4, "experts_per_token": 5}, r"experts_per_token = 5: expected 1 to num_experts = 4"),
        ({"num_experts": 4, "experts_per_token": 1}, r"norm_topk = True: expected False with experts_per_token = 1"),
        ({"num_experts": 4, "mlp_bias": True}, r"num_experts: experts have neither mlp_bias nor sub_norms"),
        ({"capacity_factor": 1.0}, r"num_experts = 0: expected no capacity_factor"),
        ({"capacity_factor": -1.0}, r"capacity_factor = -1.0: expected 0 or more"),
        ({"sliding_window": -3}, r"sliding_window = -3: expected 0 or more"),
        ({"causal": False, "sliding_window": 4}, r"sliding_window: looks back only"),
        ({"causal": False, "lfa_variant": "yuan"}, r"causal = False: expected lfa_variant none, found 'yuan'"),
        ({"rope_factor": 0.0}, r"rope_factor = 0.0, .*: expected a positive factor"),
        (
            {"rope_low_freq_factor": 4.0},
            r"rope_factor = 1.0, rope_low_freq_factor = 4.0, .*, and low below high",
        ),
        ({"rotary_share": 0.01}, r"head_dim = 16, rotary_share = 0.01: rotary positions turn pairs .*; found 0"),
        ({"share_qk": True}, r"share_qk: expected lfa_variant none and as many key as query heads"),
    ),
    ids=str,
)
def test_values_that_no_model_has_together(keys, message):
    assert preset("debug").num_kv_heads < preset("debug").num_heads
    with pytest.raises(UserError, match=r"model\." + message):
        preset("debug", **keys)


def test_a_row_beyond_the_learned_positions_is_an_error():
    model = Transformer(preset("debug", positions="learned", max_length=8))
    params, tokens = init_parameters(model, jax.random.key(0)), np.zeros((1, 9), np.int32)
    assert model.apply({"params": params}, tokens[:, :8]).shape == (1, 8, 512)
    with pytest.raises(UserError, match="a row of 9 tokens: the model has learned 8 positions"):
        model.apply({"params": params}, tokens)


def test_palms_matrices_start_by_their_inputs_also_those_of_experts():
    shapes = {"hidden_size": 64, "intermediate_size": 256, "init": "palm", "scan_layers": False}
    for keys in ({}, {"num_experts": 16}):
        layer = init_parameters(Transformer(preset("debug", **shapes, **keys)), jax.random.key(0))["layers"]["0"]["mlp"]
        matrices = layer["experts"] if keys else layer
        for name, inputs in (("up_proj", 64), ("down_proj", 256)):
            assert float(matrices[name]["kernel"].std()) == pytest.approx(inputs**-0.5, rel=0.05)
