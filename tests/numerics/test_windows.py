"""Delayed scaling against the released code's 60 steps of three tensors, with an infinite amax, a NaN and zeros."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.formats import E4M3, E5M2, scale_of
from easylm_plus.numerics.windows import Window, new_window, observed, scale_now

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8" / "f_amax_window.npz")
SIZE, STEPS = int(GOLDEN["window"]), len(GOLDEN["amax"])
EAGER = pytest.mark.parametrize("jit", (lambda f: f, jax.jit), ids=("eager", "jit"))


def windows(observe, largest=GOLDEN["amax"]):
    """The windows of the three tensors, a stack, after each step."""
    window, seen = new_window((3,), SIZE), []
    for row in largest:
        window = observe(window, jnp.asarray(row))
        seen.append(window)
    return jax.tree.map(lambda *xs: np.stack(xs), *seen)


@EAGER
def test_windows_are_those_of_the_released_code(jit):
    found = windows(jit(lambda window, largest: observed(window, largest, E4M3)))
    np.testing.assert_array_equal(found.history, GOLDEN["history"])
    np.testing.assert_array_equal(found.count, GOLDEN["counters"])
    np.testing.assert_array_equal(found.scale, GOLDEN["scales"])
    assert (~np.isfinite(GOLDEN["amax"])).sum() == 2 and np.isfinite(found.history).all()
    assert (GOLDEN["counters"] == 0).sum() == 2  # back to scales from the tensor at hand


@pytest.mark.parametrize("wrong", ("moved first", "one step short", "without the last"))
def test_another_order_gives_other_scales(wrong):
    """Scales from the history after it has moved on, from one that is too short, or that lacks the step just done."""

    def observe(window, largest):
        right = observed(window, largest, E4M3)
        history = window.history.at[..., 0].set(jnp.where(jnp.isfinite(largest), largest, 0.0))
        seen = {"moved first": right.history, "one step short": history[..., :-1], "without the last": window.history}
        return Window(right.history, right.count, scale_of(seen[wrong].max(-1), E4M3, window.scale))

    found = windows(observe)
    np.testing.assert_array_equal(found.history, GOLDEN["history"])
    assert (found.scale != GOLDEN["scales"]).any()


@EAGER
def test_a_stack_is_as_each_tensor_alone(jit):
    observe = jit(lambda window, largest: observed(window, largest, E5M2))
    together = windows(observe)
    for i in range(3):
        window = new_window((), SIZE)
        for step in range(STEPS):
            window = observe(window, GOLDEN["amax"][step, i])
            alone = jax.tree.map(lambda whole, step=step, i=i: whole[step, i], together)
            jax.tree.map(np.testing.assert_array_equal, window, alone)


def test_the_first_steps_are_scaled_by_the_tensor_at_hand():
    """And those after an amax that was no number; every other one by the past, whatever the tensor at hand is."""
    found = windows(lambda window, largest: observed(window, largest, E4M3))
    for step in range(-1, STEPS):
        last = jax.tree.map(lambda whole, step=step: whole[step], found) if step >= 0 else new_window((3,), SIZE)
        for largest in (1e-3, 1.0, 1e3):
            scales = scale_now(last, jnp.full(3, largest), E4M3)
            delayed = last.count >= SIZE
            np.testing.assert_array_equal(scales, np.where(delayed, last.scale, scale_of(jnp.float32(largest), E4M3)))
    assert (found.count >= SIZE).any() and (found.count[20:] < SIZE).any()
    assert scale_now(None, jnp.float32(1e-3), E4M3) == scale_of(jnp.float32(1e-3), E4M3)


def test_what_says_nothing_keeps_the_scale():
    """In the first steps too: a tensor of zeros, or one that is no number, is cast as before."""
    window = new_window((), SIZE).replace(scale=jnp.float32(64))
    for largest in (0.0, jnp.inf, jnp.nan):
        assert scale_now(window, jnp.float32(largest), E4M3) == 64
        assert observed(window, jnp.float32(largest), E4M3).scale == 64
