"""Delayed scaling: the scale of a tensor from the largest values of the steps before (FP8-LM's released code).

For its first W steps a tensor is scaled by its own amax nevertheless, and again after a step whose amax was not finite.

After each step that counts: the scale becomes that of the history's maximum, then the history moves on by one. In this
order: the new scale still sees the oldest entry.

Legend: `...` stack axes, W steps of history.
"""

import jax
import jax.numpy as jnp
from flax import struct

from easylm_plus.numerics.formats import Format, scale_of


@struct.dataclass
class Window:
    """What is remembered of one tensor, for each matrix of a stack."""

    history: jax.Array  # float32[..., W]: amaxes, that of the last step at 1; 0 is where the next one goes
    count: jax.Array  # int32[...]: steps seen since the last amax that was not finite
    scale: jax.Array  # float32[...]


def new_window(stack: tuple[int, ...], size: int) -> Window:
    """Before the first step."""
    return Window(jnp.zeros((*stack, size)), jnp.zeros(stack, jnp.int32), jnp.ones(stack))


def scale_now(window: Window | None, largest: jax.Array, fmt: Format) -> jax.Array:
    """The scale to cast with, float32[...]; `largest` is the amax of the tensor at hand. No window: just in time."""
    if window is None:
        return scale_of(largest, fmt)
    own = scale_of(largest, fmt, window.scale)
    return jnp.where(window.count < window.history.shape[-1], own, window.scale)


def observed(window: Window, largest: jax.Array, fmt: Format) -> Window:
    """The window after a step in which the tensor's amax was `largest`, float32[...]."""
    finite = jnp.isfinite(largest)
    history = window.history.at[..., 0].set(jnp.where(finite, largest, 0.0))
    scale = scale_of(history.max(-1), fmt, window.scale)
    moved = jnp.roll(history, 1, axis=-1).at[..., 0].set(0.0)
    return Window(moved, jnp.where(finite, window.count + 1, 0), scale)
