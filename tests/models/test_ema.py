"""The moving average beside the localized filters, against the recurrence of its paper in float64, token by token."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.models.ema import CHUNK, DampedEMA, averages, moving_average
from easylm_plus.models.families import preset
from easylm_plus.models.transformer import Transformer, unboxed
from easylm_plus.numerics.precision import precision
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

B, D, N = 2, 12, 16
LENGTHS = (1, 5, CHUNK, 3 * CHUNK + 7)


def config(**overrides):
    return preset("debug", lfa_variant="ema", hidden_size=D, intermediate_size=32, head_dim=6, vocab_size=64,
                  num_heads=2, num_kv_heads=2, init="fan_in", **overrides)  # fmt: skip


@functools.cache
def weights():
    """float64, away from where they start, and with decays from 0.06 to 0.999 that matter over chunks."""
    rng = np.random.default_rng(0)
    small = lambda *shape: rng.normal(size=shape)
    return {"delta": 3 * small(D, N), "alpha": 3 * small(D, N), "beta": small(D, N), "gamma": small(D, N),
            "omega": small(D)}  # fmt: skip


@functools.cache
def inputs(length):
    return np.random.default_rng(length).normal(size=(B, length, D))


def recurrence(x, w, undamped=False, unscaled=False, doubled=False):
    """MEGA's equations; the arguments are ways to get them wrong."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    share, damping = sigmoid(w["delta"]), 1.0 if undamped else sigmoid(w["alpha"])
    h, rows = np.zeros((len(x), D, N)), []
    for x_BD in np.moveaxis(x, 1, 0):
        h = (1 - share * damping) * h + share * w["beta"] * x_BD[..., None]
        summed = (h * w["gamma"]).sum(-1) / (1 if unscaled else np.sqrt(N))
        out = summed + w["omega"] * x_BD * (2 if doubled else 1)
        rows.append(out * sigmoid(out))
    return np.stack(rows, axis=1)


@functools.partial(jax.jit, static_argnames="policy")
def apply(x, w, segments=None, state=None, policy="float32"):
    module = DampedEMA(config(), precision(policy))
    return module.apply({"params": w}, x.astype(precision(policy).compute), segments, state)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_recurrence(length):
    close(apply(inputs(length), weights())[0], recurrence(inputs(length), weights()))


@pytest.mark.parametrize("mistake", ("undamped", "unscaled", "doubled"))
def test_another_recurrence_is_noticed(mistake):
    with pytest.raises(AssertionError):
        close(apply(inputs(5), weights())[0], recurrence(inputs(5), weights(), **{mistake: True}))


def test_the_roles_of_delta_and_alpha_are_noticed():
    swapped = {**weights(), "delta": weights()["alpha"], "alpha": weights()["delta"]}
    with pytest.raises(AssertionError):
        close(apply(inputs(5), swapped)[0], recurrence(inputs(5), weights()))


@pytest.mark.parametrize("pieces", [(1, 1, 3), (CHUNK, 1, CHUNK + 1)], ids=str)
def test_pieces_with_the_state_equal_the_whole(pieces):
    x, state, parts = inputs(sum(pieces)), None, []
    for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
        part, state = apply(piece, weights(), state=state)
        parts.append(part)
    close(np.concatenate(parts, axis=1), recurrence(x, weights()))
    forgotten, _ = apply(x[:, pieces[0] :], weights())
    with pytest.raises(AssertionError):
        close(forgotten, recurrence(x, weights())[:, pieces[0] :])


def test_no_token_sees_a_later_one():
    x = inputs(2 * CHUNK).copy()
    before = apply(x, weights())[0]
    x[:, CHUNK + 4 :] += 1
    after = apply(x, weights())[0]
    np.testing.assert_array_equal(before[:, : CHUNK + 4], after[:, : CHUNK + 4])
    assert (np.abs(after - before)[:, CHUNK + 4] > 0).any()


def test_padding_before_a_row_changes_nothing_even_if_it_is_not_finite():
    x, pads = inputs(CHUNK + 9), 6
    padded = np.concatenate([np.full((B, pads, D), np.nan), x], axis=1)
    segments = jnp.asarray(np.arange(padded.shape[1]) >= pads, jnp.int32)[None].repeat(B, 0)
    close(apply(padded, weights(), segments)[0][:, pads:], recurrence(x, weights()))
    seen = apply(np.nan_to_num(padded, nan=1.0), weights())[0][:, pads:]
    with pytest.raises(AssertionError):
        close(seen, recurrence(x, weights()))


@functools.cache
def gradients(length):
    """Of a sum over all outputs with random weights, which come second, by x and by each weight."""
    upon = np.random.default_rng(8).normal(size=(B, length, D))
    total = lambda x, w: (apply(x, w)[0] * upon).sum()
    of_x, of_weights = jax.jit(jax.grad(total, argnums=(0, 1)))(inputs(length), weights())
    return {**of_weights, "x": of_x}, upon


@pytest.mark.parametrize("length", (5, CHUNK + 3))
@pytest.mark.parametrize("name", ("delta", "alpha", "beta", "gamma", "omega", "x"))
def test_gradients_are_the_slopes_of_the_recurrence(name, length):
    point, (found, upon) = {**weights(), "x": inputs(length)}, gradients(length)
    towards = np.random.default_rng(7).normal(size=point[name].shape)
    value = lambda p: (recurrence(p["x"], p) * upon).sum()
    moved = lambda by: value({**point, name: point[name] + by * towards})
    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    actual = float((found[name] * towards).sum())
    assert actual == pytest.approx(slope, rel=1e-3)
    assert 1.01 * actual != pytest.approx(slope, rel=1e-3)


def test_weights_at_their_ends_stay_finite():
    """Where both sigmoids are 1 the decay is 0, whose logarithm is not finite."""
    ends = {**weights(), "delta": np.full((D, N), 40.0), "alpha": np.full((D, N), 40.0)}
    ends["delta"][0] = ends["alpha"][1] = -200.0
    gradient = jax.jit(jax.grad(lambda w: apply(inputs(CHUNK), w)[0].sum()))(ends)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    close(apply(inputs(CHUNK), ends)[0], recurrence(inputs(CHUNK), ends))


def test_a_long_memory_is_kept_over_thousands_of_tokens():
    """A decay of 1 - 4.5e-5: what the first token left is still there after 4,000 others."""
    w = {name: np.full((D, N), -10.0 if name == "delta" else 12.0) for name in ("delta", "alpha")}
    a = averages(*(jnp.asarray(v, jnp.float32) for v in (w["delta"], w["alpha"], np.ones((D, N)), np.ones((D, N)))))
    x = np.eye(1, 4001)[..., None].repeat(D, axis=-1)
    y, state = jax.jit(moving_average)(x, np.zeros((1, D, N)), a)
    share = 1 / (1 + np.exp(10.0))
    left = share * (1 - share / (1 + np.exp(-12.0))) ** 4000
    np.testing.assert_allclose(y[0, -1], np.sqrt(N) * left, rtol=1e-4)
    np.testing.assert_allclose(state[0], left, rtol=1e-4)


def test_bfloat16_is_near_and_its_state_is_float32():
    z, state = apply(inputs(40), weights(), policy="bf16")
    assert z.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    off = np.abs(np.asarray(z, np.float32) - recurrence(inputs(40), weights())).max()
    assert 1e-4 < off < 0.1


def test_it_starts_as_the_released_code_does():
    wide = Transformer(preset("debug", lfa_variant="ema", hidden_size=512, num_layers=1))
    start = tiny.fresh(wide, 0)["layers"]["0"]["self_attn"]["lf_gate"]
    for name, std in (("delta", 0.2), ("alpha", 0.2), ("gamma", 1.0), ("omega", 1.0)):
        assert np.mean(start[name]) == pytest.approx(0, abs=std / 8) and np.std(start[name]) == pytest.approx(std, 0.05)
    signs = np.where(np.arange(N) % 2, -1, 1)
    assert np.std(start["beta"] - signs) == pytest.approx(0.02, 0.05)
    assert start["gamma"].shape == (512, N) and start["omega"].shape == (512,)


# --- in a model ---


@functools.cache
def model_and_params(**overrides):
    model = Transformer(config(**overrides))
    return model, tiny.fresh(model, 3)


@functools.cache
def applied(model):
    return jax.jit(model.apply)


def logits(*args):
    model, params = model_and_params()
    return applied(model)({"params": params}, *args)


def test_queries_and_keys_are_filtered_and_values_are_not():
    model, params = model_and_params(num_layers=1)
    ids = np.random.default_rng(1).integers(0, 64, (2, 9))
    capture = {"capture_intermediates": True, "mutable": "intermediates"}
    _, seen = jax.jit(lambda ids: model.apply({"params": params}, ids, **capture))(ids)
    layer = seen["intermediates"]["layers"]["0"]
    attention, kernels = layer["self_attn"], params["layers"]["0"]["self_attn"]
    (plain,), ((filtered, _),) = layer["input_layernorm"]["__call__"], attention["lf_gate"]["__call__"]
    for name, source in (("q_proj", filtered), ("k_proj", filtered), ("v_proj", plain)):
        np.testing.assert_allclose(attention[name]["__call__"][0], source @ kernels[name]["kernel"], atol=1e-5)
    assert np.abs(filtered - plain).max() > 0.1


def test_a_left_padded_row_computes_what_it_does_without():
    ids = np.random.default_rng(2).integers(1, 64, (1, 20))
    padded = np.concatenate([np.zeros((1, 4), int), ids], axis=1)
    segments = (np.arange(24) >= 4).astype(np.int32)[None]
    positions = np.maximum(np.arange(24) - 4, 0)[None]
    np.testing.assert_allclose(logits(padded, positions, segments)[:, 4:], logits(ids), atol=2e-5)
    assert np.abs(logits(padded, positions)[:, 4:] - logits(ids)).max() > 1e-3


def test_prompts_of_different_lengths_decode_like_each_alone():
    generate = Generator(*model_and_params(scan_layers=True), stop_ids=())
    rng = np.random.default_rng(5)
    prompts = [rng.integers(1, 64, n).tolist() for n in (1, CHUNK + 2)]
    assert generate(prompts, 6) == [generate([prompt], 6)[0] for prompt in prompts]


def test_the_same_on_a_mesh():
    """`sequence` cuts the row that the average runs through."""
    model = Transformer(dataclasses.replace(config(), hidden_size=16, head_dim=8, num_layers=1))
    ids = np.random.default_rng(6).integers(0, 64, (4, 2 * CHUNK))
    params = tiny.fresh(model, 3)
    alone = jax.jit(lambda ids: model.apply({"params": params}, ids))(ids)
    mesh = make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    with sharding.use(mesh, sharding.rules_for(mesh, 2, 2)):
        shapes, axes = unboxed(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
        params = jax.device_put(params, sharding.shardings(axes, shapes, mesh))
        rows = jax.sharding.NamedSharding(mesh, sharding.spec_of(("batch", "length"), ids.shape, mesh))
        ours = jax.jit(lambda p, ids: model.apply({"params": p}, ids))(params, jax.device_put(ids, rows))
    np.testing.assert_allclose(ours, alone, atol=2e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"lfa_reset": True}, "model.lfa_reset = True: expected False with lfa_variant = 'ema'"),
     ({"lfa_variant": "none", "lfa_norm": True}, "model.lfa_norm = True: expected False where lfa_variant = 'none'")],
)  # fmt: skip
def test_what_cannot_be_is_an_error(keys, message):
    with pytest.raises(UserError, match=re.escape(message)):
        preset("debug", **{"lfa_variant": "ema", **keys})
