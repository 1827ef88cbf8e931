"""The model computes what the originals of five families compute, forwards, backwards and token by token.

LLaMA, Llama 3, Qwen2, Mixtral and Yuan 2.0-M32; Yuan 2.0 and BitNet have files of their own. The vectors
(tests/golden/README.md) are float32 results of torch on random weights of ours. Logits agree to 5e-5, gradients to
1e-3 relative and 1e-5 absolute, greedy tokens exactly. Each check is shown to fail on a model that is wrong in one
point.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.inference.generate import Generator
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.models.moe import choose
from easylm_plus.models.transformer import Block
from easylm_plus.objectives.lm import LanguageModel, routing_losses, stacked_statistics

FOLDER = Path(__file__).parents[1] / "golden"
MODELS = ("llama_tiny", "llama3_tiny", "qwen2_tiny", "mixtral_tiny", "yuan2_m32_moe_tiny")
PROMPT = 7
each_model = pytest.mark.parametrize("name", MODELS)
scanned_or_not = pytest.mark.parametrize("scan", (True, False), ids=("scanned", "unrolled"))


@functools.cache
def golden(name):
    with np.load(FOLDER / name / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded(name, **overrides):
    model, params = load_hf(FOLDER / name, **overrides)
    return model, params, jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def logits_of(name, *args, **overrides):
    _, params, apply = loaded(name, **overrides)
    return apply(params, *args)


def check_logits(actual, name, prefix="", where=np.s_[:]):
    np.testing.assert_allclose(np.asarray(actual)[where], golden(name)[f"{prefix}logits"][where], rtol=0, atol=5e-5)


@functools.cache
def objective_of(name, scan):
    """Loss and gradients of the language-model objective, compiled."""
    model, params, _ = loaded(name, scan_layers=scan)
    objective = LanguageModel(model, num_sources=1, chunk=10)
    share = lambda params, batch: objective(params, batch, objective.denominators(batch))[0]
    return functools.partial(jax.jit(jax.value_and_grad(share)), params)


def loss_and_gradients(name, scan, targets):
    """Mean over the T - 1 targets of each row."""
    return objective_of(name, scan)(tiny.next_token_batch(golden(name)["input_ids"], targets))


def check_gradients(gradients, name):
    """Compares those that the reference holds, under its names."""
    model = loaded(name, scan_layers="0" not in gradients["layers"])[0]
    raw = json.loads((FOLDER / name / "config.json").read_text())
    ours = tiny.under_their_names(gradients, model.config, raw["architectures"][0])
    expected = {key.removeprefix("grad::"): value for key, value in golden(name).items() if key.startswith("grad::")}
    assert len(expected) >= 3
    for theirs, value in expected.items():
        np.testing.assert_allclose(ours[theirs], value, rtol=1e-3, atol=1e-5, err_msg=theirs)


def kv_heads_tiled(params, config):
    """As if query head h used key head h mod G instead of h // R: q's and o's heads in that order."""
    order = np.arange(config.num_heads).reshape(config.heads_per_group, config.num_kv_heads).T.ravel()
    columns = (order[:, None] * config.head_dim + np.arange(config.head_dim)).ravel()
    attention = dict(params["layers"]["self_attn"])
    attention["q_proj"] = jax.tree.map(lambda x: x[..., columns], attention["q_proj"])
    attention["o_proj"] = jax.tree.map(lambda x: x[:, columns], attention["o_proj"])
    return {**params, "layers": {**params["layers"], "self_attn": attention}}


@each_model
@scanned_or_not
def test_logits(name, scan):
    check_logits(logits_of(name, golden(name)["input_ids"], scan_layers=scan), name)


@each_model
def test_hidden_states_after_embedding_blocks_and_norm(name):
    model, params, _ = loaded(name, scan_layers=False)
    keep = lambda module, _: isinstance(module, Block) or module.name == "embed_tokens"
    hidden = functools.partial(model.apply, method="hidden", capture_intermediates=keep)
    last, state = jax.jit(hidden)({"params": params}, golden(name)["input_ids"])
    inner = state["intermediates"]
    blocks = [inner["layers"][str(i)]["__call__"][0][0] for i in range(model.config.num_layers)]
    ours = [inner["embed_tokens"]["__call__"][0], *blocks[:-1], last]
    np.testing.assert_allclose(np.stack(ours), golden(name)["hidden_states"], rtol=0, atol=5e-5)
    assert np.abs(blocks[-1] - golden(name)["hidden_states"][-1]).max() > 100 * 5e-5  # before the norm


@each_model
@scanned_or_not
def test_loss_and_gradients(name, scan):
    loss, gradients = loss_and_gradients(name, scan, np.roll(golden(name)["input_ids"], -1, axis=1))
    np.testing.assert_allclose(loss, golden(name)["loss"], rtol=1e-6)
    check_gradients(gradients, name)


@functools.cache
def generator_of(name, scan):
    return Generator(*loaded(name, scan_layers=scan)[:2], stop_ids=())


def greedy(generator, name):
    tokens = golden(name)["gen_tokens"]
    return generator(tokens[:, :PROMPT].tolist(), tokens.shape[1] - PROMPT), tokens[:, PROMPT:].tolist()


@pytest.mark.parametrize(
    ("name", "scan"), [*((name, True) for name in MODELS), ("llama3_tiny", False), ("mixtral_tiny", False)]
)
def test_greedy_tokens_with_cache(name, scan):
    actual, expected = greedy(generator_of(name, scan), name)
    assert actual == expected


@pytest.mark.parametrize("name", [name for name in MODELS if "m32" not in name])  # no such vectors of M32
def test_left_padded_rows(name):
    ids, positions, mask = (golden(name)[f"leftpad_{key}"] for key in ("input_ids", "position_ids", "attention_mask"))
    check_logits(logits_of(name, ids, positions, mask), name, "leftpad_", mask > 0)
    with pytest.raises(AssertionError):  # padding that is attended to
        check_logits(logits_of(name, ids, positions, np.ones_like(mask)), name, "leftpad_", mask > 0)


# --- experts ---


@functools.cache
def captured(name):
    """(what the modules of layer 0 return, what all layers sowed) on the golden ids."""
    model, params, _ = loaded(name, scan_layers=False)
    run = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates", "router"])
    state = jax.jit(run)({"params": params}, golden(name)["input_ids"])[1]
    return state["intermediates"]["layers"]["0"], stacked_statistics(state["router"]["layers"])


@pytest.mark.parametrize(
    ("name", "attention"), (("mixtral_tiny", "l0_attn_out"), ("yuan2_m32_moe_tiny", "l0_attn_out"))
)
def test_inside_the_first_layer(name, attention):
    inner, _ = captured(name)
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    near(inner["self_attn"]["__call__"][0][0], golden(name)[attention])
    near(inner["mlp"]["__call__"][0], golden(name)["l0_moe_out"])
    logits = inner["mlp"]["router"]["__call__"][0].reshape(48, -1)
    expected = golden(name)["router_logits"][0] if name == "mixtral_tiny" else golden(name)["l0_router_output"]
    near(logits, expected)
    assert np.abs(logits[:, ::-1] - expected).max() > 0.1


def test_m32s_choice_of_experts():
    inner, _ = captured("yuan2_m32_moe_tiny")
    weights, ids = choose(inner["mlp"]["router"]["__call__"][0], loaded("yuan2_m32_moe_tiny")[0].config)
    expected = golden("yuan2_m32_moe_tiny")
    np.testing.assert_array_equal(ids.reshape(48, 2), expected["l0_topk_idx"])
    np.testing.assert_allclose(weights.reshape(48, 2), expected["l0_topk_weight"], rtol=0, atol=1e-6)


def test_the_sums_that_hugging_faces_balance_loss_is_made_of():
    """Theirs is E sum_e f_e p_e over the tokens of all layers at once, with f adding up to the choices a token has."""
    stats, expected = captured("mixtral_tiny")[1], golden("mixtral_tiny")
    tokens = stats["tokens"].sum()
    theirs = 4 * (stats["choices"].sum(0) / tokens * stats["probabilities"].sum(0) / tokens).sum()
    assert float(theirs) == pytest.approx(float(expected["aux_loss"]), rel=1e-6)
    assert float(expected["hf_loss"]) == pytest.approx(float(expected["loss"] + 0.02 * theirs), rel=1e-6)
    ours = routing_losses(stats)["balance"]
    assert 0 < abs(2 * ours - theirs) < 0.1 * theirs, "ours is by layer, and divided by the choices of a token"


def test_padding_meets_no_expert():
    """A row of padding changes no statistic and comes out as zeros."""
    name = "mixtral_tiny"
    model, params, _ = loaded(name)
    ids = golden(name)["input_ids"]
    run = jax.jit(functools.partial(model.apply, mutable=["router"]))
    segments = np.ones_like(ids)
    plain = run({"params": params}, ids, None, segments)[1]["router"]
    padded = np.concatenate([ids, ids]), None, np.concatenate([segments, 0 * segments])
    logits, state = run({"params": params}, *padded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state["router"], plain)
    check_logits(logits[:2], name)


# --- what must fail ---


@pytest.mark.parametrize(
    ("name", "wrong"),
    (
        ("llama_tiny", {"rope_theta": 11000.0}),
        ("llama3_tiny", {"rope_scaling": "none"}),
        ("llama3_tiny", {"rope_scaling": "linear"}),
        ("qwen2_tiny", {"rope_theta": 1e4}),
        ("qwen2_tiny", {"norm_eps": 1e-2}),
        ("mixtral_tiny", {"norm_topk": False}),
        ("mixtral_tiny", {"experts_per_token": 3}),
        ("yuan2_m32_moe_tiny", {"norm_topk": False}),
        ("yuan2_m32_moe_tiny", {"rope_dtype": "float32"}),
        ("yuan2_m32_moe_tiny", {"lfa_reset": True, "rope_theta": 1e5}),
    ),
    ids=str,
)
def test_a_wrong_constant_is_noticed(name, wrong):
    assert far_off(logits_of(name, golden(name)["input_ids"], **wrong), name)


@pytest.mark.parametrize("name", ("llama3_tiny", "qwen2_tiny"))
@pytest.mark.parametrize("heads", ("tiled", "swapped"))
def test_wrong_grouping_of_heads_is_noticed(name, heads):
    model, params, apply = loaded(name)
    params = kv_heads_tiled(params, model.config) if heads == "tiled" else kv_heads_swapped(params)
    assert far_off(apply(params, golden(name)["input_ids"]), name)


def kv_heads_swapped(params):
    halves = lambda x: jnp.roll(x, x.shape[-1] // 2, axis=-1)  # two key/value heads
    attention = dict(params["layers"]["self_attn"])
    attention |= {key: jax.tree.map(halves, attention[key]) for key in ("k_proj", "v_proj")}
    return {**params, "layers": {**params["layers"], "self_attn": attention}}


def far_off(logits, name):
    with pytest.raises(AssertionError):
        check_logits(logits, name)
    return np.abs(np.asarray(logits) - golden(name)["logits"]).max() > 100 * 5e-5


@each_model
def test_gradients_of_another_loss_are_noticed(name):
    _, gradients = loss_and_gradients(name, True, golden(name)["input_ids"])  # targets not shifted
    with pytest.raises(AssertionError):
        check_gradients(gradients, name)


def test_greedy_tokens_of_a_wrong_model_differ():
    name = "llama3_tiny"
    model, params, _ = loaded(name)
    generator = Generator(model, kv_heads_tiled(params, model.config), stop_ids=())
    actual, expected = greedy(generator, name)
    assert all(a != b for a, b in zip(actual, expected))
