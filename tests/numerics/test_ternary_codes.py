"""Codes that a step makes once are the ternary leaf bit for bit; a share of the way leads from floats to ternary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_fp8 import by_name, run_of

from easylm_plus.errors import UserError
from easylm_plus.numerics import handles
from easylm_plus.numerics.levels import Numerics
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.rules import BITNET
from easylm_plus.numerics.ternary import Ternary, int8_activation, ternary_codes, ternary_weight
from easylm_plus.numerics.ternary_codes import TernaryCodes, pack, side_of, turned, unpack
from easylm_plus.numerics.verbs import dense, project

AXES = ("embed", "mlp")


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def coded(latent, **fields):
    codes, inverse = ternary_codes(latent)
    side = side_of(AXES)
    return TernaryCodes(pack(codes, side), inverse, None, side, latent.shape[side], AXES, **fields)


@pytest.mark.parametrize("shape", ((8, 3), (1, 1), (13, 4), (2, 3, 10, 5)), ids=str)
@pytest.mark.parametrize("side", (-1, -2))
def test_packing_loses_nothing(shape, side):
    codes = np.random.default_rng(0).integers(-1, 2, shape)
    packed = pack(jnp.asarray(codes), side)
    expected = list(shape)
    expected[side] = -(-shape[side] // 4)
    assert packed.shape == tuple(expected) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, side, shape[side]), codes)
    rest = np.moveaxis(np.asarray(unpack(packed, side, 4 * packed.shape[side])), side, 0)[shape[side] :]
    assert not rest.any()


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=str)
def test_products_and_gradients_are_those_of_the_latent(dtype):
    """Bit for bit: the same numbers in another form."""
    x, w, dy = normal(0, 2, 5, 30, dtype=dtype), normal(1, 30, 12), normal(2, 2, 5, 12, dtype=dtype)

    @jax.jit
    def both(leaf, x, dy):
        y, pull = jax.vjp(lambda x, handle: project(x, handles.hold(leaf, handle)), x, handles.handle_of(leaf))
        return (y, *pull(dy))

    expected, found = both(Ternary(w), x, dy), both(coded(w), x, dy)
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(dense(coded(w)), dense(Ternary(w)))
    other = both(coded(w[::-1]), x, dy)
    assert np.abs(np.asarray(other[0] - found[0], np.float32)).max() > 0.1


def test_what_is_kept_for_the_backward_pass():
    """Whole numbers of a byte and a quarter of one, and two scales; no float of the sides of the weight or of x."""
    x, leaf = normal(0, 16, 64), coded(normal(1, 64, 32))
    _, pull = jax.vjp(lambda x: project(x, leaf), x)
    sizes = {(a.dtype.name, a.shape) for a in jax.tree.leaves(pull) if hasattr(a, "dtype") and a.size > 16}
    assert sizes == {("int8", (16, 64)), ("uint8", (64, 8))}


# --- a run ---


@functools.cache
def first_step(**options):
    run = run_of("none", rules=BITNET, **options).start()
    return run.gradients()


@pytest.mark.parametrize("options", ({}, {"scan_layers": False, "accumulate": 2}, {"precision": "bf16"}), ids=str)
def test_a_step_is_that_of_latents(options, monkeypatch):
    loss, gradients, _ = first_step(**options)
    latents = lambda self, kept, cut, axes: Ternary(kept)
    monkeypatch.setattr(Numerics, "_ternary", latents)
    expected_loss, expected, _ = run_of("none", rules=BITNET, **options).start().gradients()
    exact = options.get("precision") is None
    assert loss == pytest.approx(expected_loss, abs=1e-6 if exact else 1e-3)
    for name, gradient in by_name(expected).items() if not options.get("scan_layers", True) else expected.items():
        scale = np.abs(np.asarray(gradient, np.float32)).max()
        tolerance = (1e-5 if exact else 2e-2) * scale
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=tolerance, err_msg=name)
    monkeypatch.setattr(Numerics, "_ternary", lambda self, kept, cut, axes: kept)
    plain, _, _ = run_of("none", rules=BITNET, **options).start().gradients()
    assert abs(plain - loss) > 1e-3, "weights as they are"


def test_shares_of_weights_that_turn():
    before, after = normal(0, 2, 40, 6), normal(0, 2, 40, 6)
    for leaf in (coded(before), Ternary(before)):
        none = np.asarray(turned(leaf, before))
        assert none[:, 0].tolist() == [0, 0]
        np.testing.assert_allclose(none[:, 1], (ternary_codes(before)[0] == 0).mean((1, 2)), rtol=1e-6)
        changed = after.at[1].set(-before[1])
        share = np.asarray(turned(leaf, changed))
        np.testing.assert_allclose(share[:, 0], [0, 1 - none[1, 1]], rtol=1e-6, atol=1e-7)


# --- on the way ---


def test_no_share_is_floats_and_all_of_it_is_ternary():
    x, w = normal(0, 5, 30), normal(1, 30, 12)
    at = lambda share: project(x, Ternary(w, jnp.asarray(share)))
    np.testing.assert_allclose(at(0.0), project(x, w), rtol=1e-6)
    np.testing.assert_allclose(at(1.0), project(x, Ternary(w)), rtol=1e-5, atol=1e-5)
    ends = [np.abs(at(0.5) - end).max() for end in (at(0.0), at(1.0))]
    assert min(ends) > 0.1


@pytest.mark.parametrize("share", (0.0, 0.3, 1.0))
def test_gradients_pass_straight_through_on_the_way(share):
    """dw = moved x' dy and dx = dy moved w': of what was multiplied, neither with a factor for the share."""
    x, w, dy = normal(0, 5, 30), normal(1, 30, 12), normal(2, 5, 12)
    _, pull = jax.vjp(lambda x, w: project(x, Ternary(w, jnp.asarray(share))), x, w)
    moved = lambda a, rounded: a + share * (rounded - a)
    x_moved, w_moved = moved(x, int8_activation(x)), moved(w, ternary_weight(w))
    for found, expected in zip(pull(dy), (dy @ w_moved.T, x_moved.T @ dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if share:
        assert np.abs(pull(dy)[0] - dy @ w.T).max() > 0.05


def test_a_run_turns_ternary_over_its_warm_up():
    run = run_of("none", rules=BITNET, warmup=4, rate=0.0).start()
    first = run.steps(1)[0]
    plain, _, _ = run_of("none").start().gradients()
    assert first == pytest.approx(plain, abs=1e-6)
    run.steps(2)
    assert int(run.state.numerics["taken"]) == 3
    last = run.steps(5)[3]  # of the first batch again, long after
    whole, _, _ = first_step()
    assert last == pytest.approx(whole, abs=1e-5) and abs(first - whole) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"warmup": -1, "rules": BITNET}, "ternary_warmup = -1: expected"),
        ({"warmup": 3}, "ternary_warmup = 3: found no weight"),
        ({"warmup": 3, "rules": ("experts=ternary",), "num_experts": 4, "experts_per_token": 2}, "ternary experts"),
    ),
)
def test_warm_ups_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        run_of("none", **changes)


def test_codes_are_made_of_the_parameters_dtype():
    assert jnp.dtype(precision("bf16").param) == jnp.float32
    gradients = first_step(precision="bf16")[1]
    assert {g.dtype.name for g in gradients.values()} == {"float32"}
