"""Yuan 2.0's localized filtering: the released code's numbers on `yuan2_tiny`, and what it should do with padding.

The reference vectors were made by the released model with its attention kernels replaced by plain ones; an independent
float64 derivation agrees with them to 1.4e-5. Each trap of the released code (which half is gated, how queries and
keys lie in their matrices, the order of the taps, what precedes the first token) is shown to be noticed, with an error
of the size that it has there.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.models.config import LFA_TAPS
from easylm_plus.models.families import preset
from easylm_plus.models.lfa import LocalizedFilter, delayed
from easylm_plus.models.transformer import Transformer, abstract_parameters, init_parameters, unstack_layers
from easylm_plus.numerics.precision import precision
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

NAME = "yuan2_tiny"


@functools.cache
def golden():
    with np.load(tiny.ROOT / "tests/golden" / NAME / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded(**overrides):
    model, params = load_hf(tiny.ROOT / "tests/golden" / NAME, **overrides)
    return model, params, jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def error(actual, name, where=np.s_[:]):
    return np.abs(np.asarray(actual)[where] - golden()[name][where]).max()


def logits(*args, **overrides):
    _, params, apply = loaded(**overrides)
    return apply(params, *args)


@pytest.mark.parametrize("scan", (True, False))
def test_logits(scan):
    assert error(logits(golden()["input_ids"], scan_layers=scan), "logits") < 5e-5


@pytest.mark.parametrize("layer", (0, 1, 2))
def test_the_filter_itself(layer):
    model, params, _ = loaded(scan_layers=False)
    gate = LocalizedFilter(model.config, model.precision)
    weights = {"params": params["layers"][str(layer)]["self_attn"]["lf_gate"]}
    assert error(gate.apply(weights, golden()[f"l{layer}_lfa_in"], None), f"l{layer}_lfa_out") < 1e-5


def test_packed_rows_as_the_released_code_has_them():
    """Positions restart; documents see each other, or do not; the filter looks across in both."""
    ids, positions = golden()["packed_input_ids"], golden()["packed_position_ids"]
    segments = np.cumsum(positions == 0, axis=1)
    assert error(logits(ids, positions), "packed_megatron_logits") < 5e-5
    assert error(logits(ids, positions, segments), "packed_mask_and_pos_reset_logits") < 5e-5
    assert error(logits(ids, positions, segments, lfa_reset=True), "packed_mask_and_pos_reset_logits") > 0.1


def test_with_lfa_reset_a_packed_row_is_its_documents():
    ids, positions = golden()["packed_input_ids"], golden()["packed_position_ids"]
    segments = np.cumsum(positions == 0, axis=1)
    starts = np.flatnonzero(positions[0] == 0)
    alone = np.concatenate([logits(part) for part in np.split(ids, starts[1:], axis=1)], axis=1)
    assert np.abs(logits(ids, positions, segments, lfa_reset=True) - alone).max() < 5e-5
    assert np.abs(logits(ids, positions, segments) - alone).max() > 0.1


def test_padding_changes_nothing():
    """Right padding is that of the reference; left padding equals the row without it, where the reference is wrong."""
    ids, mask = golden()["rightpad_input_ids"], golden()["rightpad_attention_mask"]
    assert error(logits(ids, None, mask), "rightpad_logits", mask > 0) < 5e-5
    ids, mask = golden()["leftpad_input_ids"], golden()["leftpad_attention_mask"]
    pads = int((mask[1] == 0).sum())
    ours = logits(ids, golden()["leftpad_position_ids"], mask)[1, pads:]
    assert pads > 2 and np.abs(ours - logits(ids[1:, pads:])[0]).max() < 5e-5
    assert np.abs(golden()["leftpad_logits"][1, pads:] - ours).max() > 1, "the reference lets pads through its filter"


@pytest.mark.parametrize("length", (7, 2, 1))
@pytest.mark.parametrize("scan", (True, False))
def test_greedy_tokens_with_cache(length, scan):
    tokens = golden()[f"gen_p{length}_tokens"]
    generate = Generator(*loaded(scan_layers=scan)[:2], stop_ids=())
    assert generate(tokens[:, :length].tolist(), tokens.shape[1] - length) == tokens[:, length:].tolist()


def test_decoding_in_pieces_of_any_size_equals_the_whole_row():
    """The last inputs are kept and, before the first token, are nothing: with b1 there the logits would be off."""
    model, params, _ = loaded()
    ids = golden()["input_ids"]
    apply = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, cache=cache))
    for pieces in ((1, 1, 1, 21), (2, 5, 17), (23, 1)):
        cache, parts = model.init_cache(2, 24), []
        for piece in np.split(ids, np.cumsum(pieces)[:-1], axis=1):
            part, cache = apply(piece, cache)
            parts.append(part)
        assert error(np.concatenate(parts, axis=1), "logits") < 5e-5


def test_a_batch_of_prompts_of_different_lengths_decodes_like_each_alone():
    model, params, _ = loaded()
    generate = Generator(model, params, stop_ids=())
    prompts = [golden()["input_ids"][0, :n].tolist() for n in (1, 2, 3, 9)]
    assert generate(prompts, 6) == [generate([prompt], 6)[0] for prompt in prompts]


@functools.cache
def gradients():
    model, params, _ = loaded(scan_layers=False)
    batch = tiny.next_token_batch(golden()["input_ids"])
    objective = LanguageModel(model, num_sources=1, chunk=10)
    share = lambda params: objective(params, batch, objective.denominators(batch))[0]
    return jax.jit(jax.value_and_grad(share))(params)


def in_their_form(tree):
    """The gradients that the reference holds, from ours."""
    first, second = tree["layers"]["0"]["self_attn"], tree["layers"]["1"]["mlp"]
    heads = lambda kernel: np.asarray(kernel).T.reshape(4, 16, 64)
    fused = np.stack([heads(first["q_proj"]["kernel"]), heads(first["k_proj"]["kernel"])], axis=1).reshape(128, 64)
    conv = np.asarray(first["lf_gate"]["conv1"]["kernel"]).reshape(2, 64, 32).transpose(2, 1, 0)[..., None]
    return {
        "model.layers.0.self_attn.q_proj.weight": fused[:64],
        "model.layers.1.mlp.up_proj.weight": np.asarray(second["gate_proj"]["kernel"]).T,
        "model.layers.0.self_attn.lf_gate.conv1.weight": conv,
        "model.layers.0.self_attn.lf_gate.output_layernorm.weight": first["lf_gate"]["output_layernorm"]["weight"],
        "model.embed_tokens.weight": tree["embed_tokens"]["embedding"],
    }


def test_loss_and_gradients():
    loss, tree = gradients()
    np.testing.assert_allclose(loss, golden()["loss"], rtol=1e-6)
    ours = in_their_form(tree)
    assert {f"grad::{name}" for name in ours} == {name for name in golden() if name.startswith("grad::")}
    for name, value in ours.items():
        np.testing.assert_allclose(value, golden()[f"grad::{name}"], rtol=1e-3, atol=1e-5, err_msg=name)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(value * 1.01, golden()[f"grad::{name}"], rtol=1e-3, atol=1e-5)


# --- the traps of the released code ---


def changed(change):
    """Logits of the model whose layers `change` has altered."""
    _, params, apply = loaded(scan_layers=False)
    layers = {i: change(jax.tree.map(np.asarray, layer)) for i, layer in params["layers"].items()}
    return apply({**params, "layers": layers}, golden()["input_ids"])


def gate_and_up_swapped(layer):
    mlp = layer["mlp"]
    return {**layer, "mlp": {**mlp, "gate_proj": mlp["up_proj"], "up_proj": mlp["gate_proj"]}}


def taps_reversed(layer):
    flip = lambda w: np.concatenate(np.split(w, 2)[::-1])
    gate = layer["self_attn"]["lf_gate"]
    gate = {**gate, **{n: {**gate[n], "kernel": flip(gate[n]["kernel"])} for n in ("conv1", "conv2")}}
    return {**layer, "self_attn": {**layer["self_attn"], "lf_gate": gate}}


def without_biases(layer):
    gate = layer["self_attn"]["lf_gate"]
    gate = {**gate, **{n: {**gate[n], "bias": 0 * gate[n]["bias"]} for n in ("conv1", "conv2")}}
    return {**layer, "self_attn": {**layer["self_attn"], "lf_gate": gate}}


def plain_queries_and_keys(layer):
    """As if q_proj held all queries and k_proj all keys."""
    attention = layer["self_attn"]
    heads = lambda name: attention[name]["kernel"].T.reshape(4, 16, 64)
    fused = np.stack([heads("q_proj"), heads("k_proj")], axis=1).reshape(128, 64)
    halves = {"q_proj": {"kernel": fused[:64].T}, "k_proj": {"kernel": fused[64:].T}}
    return {**layer, "self_attn": {**attention, **halves}}


@pytest.mark.parametrize(
    ("change", "size"),
    [(gate_and_up_swapped, 12.0), (taps_reversed, 9.7), (plain_queries_and_keys, 12.4), (without_biases, 6.4)],
)
def test_a_trap_is_noticed(change, size):
    assert error(changed(change), "logits") == pytest.approx(size, abs=0.06)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("use_shareqk", True, r"found no tensor model\.layers\.0\.self_attn\.qk_proj"),
     ("attention_bias", True, "found attention_bias"),
     ("num_attention_heads", 3, "head_dim = 21")],
)  # fmt: skip
def test_what_would_be_read_wrongly_is_an_error(tmp_path, key, value, message):
    shutil.copytree(tiny.ROOT / "tests/golden" / NAME, tmp_path / "yuan")
    path = tmp_path / "yuan/config.json"
    raw = json.loads(path.read_text())
    heads = {"num_key_value_heads": 3} if key == "num_attention_heads" else {}
    path.write_text(json.dumps({**raw, key: value, **heads}))
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path / "yuan")


# --- the module beyond the released model ---


def test_taps_see_what_they_should():
    x, segments = jnp.arange(1.0, 7.0)[None, :, None], jnp.asarray([[0, 1, 1, 2, 2, 2]])
    row = lambda reset: np.asarray(delayed(x, segments, 3, reset))[0].astype(int).tolist()
    assert row(False) == [[0, 0, 0], [0, 0, 2], [0, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert row(True) == [[0, 0, 0], [0, 0, 2], [0, 2, 3], [0, 0, 4], [0, 4, 5], [4, 5, 6]]


VARIANTS = [name for name in LFA_TAPS if name != "none"]


def small(variant, **overrides):
    config = preset("debug", lfa_variant=variant, hidden_size=16, intermediate_size=32, head_dim=8, vocab_size=64,
                    num_heads=2, num_kv_heads=2, init="fan_in", **overrides)  # fmt: skip
    return Transformer(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_decodes_as_it_trains_and_sees_no_later_token(variant):
    model = small(variant)
    params = tiny.fresh(model, 0)
    ids = np.random.default_rng(0).integers(0, 64, (2, 12))
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids))
    whole = apply(ids)
    np.testing.assert_array_equal(apply(np.concatenate([ids[:, :8], 63 - ids[:, 8:]], axis=1))[:, :8], whole[:, :8])
    cache, parts = model.init_cache(2, 12), []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        part, cache = model.apply({"params": params}, ids[:, start:end], cache=cache)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)


def test_table_1_of_the_paper_has_these_parameters():
    """L = 6, H = 768, V = 135040, tied, ffn 4H; in millions, as printed."""
    printed = {"none": 160.3, "ema": 160.6, "conv1": 163.9, "conv2": 167.4, "conv3": 171.0, "conv7": 185.1,
               "two_convs": 167.4, "yuan": 167.4}  # fmt: skip
    for variant, millions in printed.items():
        config = preset("yuan-2b", num_layers=6, hidden_size=768, intermediate_size=3072, num_heads=12,
                        num_kv_heads=12, head_dim=64, lfa_variant=variant)  # fmt: skip
        assert count(config) / 1e6 == pytest.approx(millions, abs=0.06), variant


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(Transformer(config))[0]))


@pytest.mark.parametrize(("name", "billions"), [("yuan-2b", 2.089), ("yuan-51b", 51.84), ("yuan-102b", 102.58)])
def test_presets_have_the_published_sizes(name, billions):
    assert count(preset(name)) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("sizes", ({"fsdp": 2, "tensor": 4}, {"fsdp": 4, "sequence": 2}), ids=str)
def test_the_same_on_a_mesh(sizes):
    """Neighbours may lie on another device, where `sequence` cuts the row."""
    model, params, _ = loaded()
    mesh = make_mesh(sizes)
    ids = np.tile(golden()["input_ids"], (2, 1))
    with sharding.use(mesh, sharding.rules_for(mesh, 4, 4)):
        shapes, axes = abstract_parameters(model)
        params = jax.device_put(params, sharding.shardings(axes, shapes, mesh))
        rows = jax.sharding.NamedSharding(mesh, sharding.spec_of(("batch", "length"), ids.shape, mesh))
        ours = jax.jit(lambda p, ids: model.apply({"params": p}, ids))(params, jax.device_put(ids, rows))
    assert error(np.asarray(ours)[:2], "logits") < 5e-5


def test_bfloat16_is_near():
    model, params, _ = loaded()
    half = Transformer(model.config, precision("bf16")).apply({"params": params}, golden()["input_ids"])
    assert 1e-3 < error(half, "logits") < 1.0


def test_the_norm_is_a_key_of_its_own():
    """yuan is two_convs with it; any other filter can have it."""
    ids = np.random.default_rng(0).integers(0, 64, (2, 12))
    logits = lambda model, params: model.apply({"params": params}, ids)
    yuan, pair = small("yuan"), small("two_convs", lfa_norm=True)
    params = tiny.fresh(yuan, 0)
    np.testing.assert_array_equal(logits(yuan, params), logits(pair, params))
    assert np.abs(logits(small("two_convs"), params) - logits(yuan, params)).max() > 1e-3
    gates = {}
    for norm in (False, True):
        model = small("conv2", num_layers=1, lfa_norm=norm)
        _, seen = model.apply({"params": tiny.fresh(model, 0)}, ids,
                              capture_intermediates=True, mutable="intermediates")  # fmt: skip
        (gates[norm],) = seen["intermediates"]["layers"]["0"]["self_attn"]["lf_gate"]["__call__"]
    expected = gates[False] / np.sqrt(np.mean(np.square(gates[False]), axis=-1, keepdims=True))
    np.testing.assert_allclose(gates[True], expected, rtol=1e-4, atol=1e-5)


def test_scanned_and_unrolled_start_alike():
    one, other = (init_parameters(small("yuan", scan_layers=scan), jax.random.key(1)) for scan in (True, False))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(one), other)
    biases = one["layers"]["self_attn"]["lf_gate"]["conv1"]["bias"]
    assert 0 < np.abs(biases).max() <= 32**-0.5, "uniform, as PyTorch starts its convolutions"
