"""BitNet b1.58: weights in {-1, 0, 1} times one scale, activations in 8 bits (Ma et al. 2024, arXiv:2402.17764,
section 2, and its "Training Tips, Code and FAQ").

    gamma = max(mean |W|, 1e-5)                    one number for a matrix
    W~    = clip(round(W / gamma), -1, 1) gamma    half to even
    s     = 127 / max(max_k |x_k|, 1e-5)           one number for a token
    x~    = clip(round(x s), -128, 127) / s
    y     = x~ W~

Training keeps the latent W and passes gradients straight through both roundings (straight-through estimator): dW is
that of W~ and dx that of x~, with no mask where something was clipped and no gradient through gamma or s. Both are
computed in float32 whatever the compute dtype.

A latent of experts or of stacked layers has a scale a matrix; over a mesh, mean |W| is that of the whole matrix. It
may be kept in codes (stored.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from easylm_plus.numerics import handles, verbs
from easylm_plus.numerics.formats import per_matrix
from easylm_plus.numerics.grouped import Groups, grouped_matmul

EPS = 1e-5


@struct.dataclass
class Ternary:
    """A matrix [..., in, out] that multiplies as its ternary rounding; trained.

    With a `share`, weights and activations are only that much on the way to their roundings, 0 not at all and 1
    wholly: how a model that was trained in floats turns ternary without losing what it knew.
    """

    latent: Any  # an array, or a leaf that `dense` makes one of
    share: jax.Array | None = None  # float32[...]; None: 1


@struct.dataclass
class Rounded:
    """A Ternary whose weights are rounded already; its activations still have to be."""

    weight: jax.Array


def ternary_codes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """({-1, 0, 1} as float32[..., D, F], 1 / gamma as float32[...]) of matrices w[..., D, F]."""
    w = w.astype(jnp.float32)
    mean = jnp.abs(w).mean(-1).mean(-1)  # row by row: one long sum of floats loses digits
    inverse = 1 / jnp.maximum(mean, EPS)  # multiplied by, as in the released code
    return jnp.clip(jnp.round(w * per_matrix(inverse)), -1, 1), inverse


def ternary_weight(latent: Any) -> jax.Array:
    """W~ in float32, with the gradient of W~ as that of W."""
    w = verbs.dense(latent).astype(jnp.float32)
    codes, inverse = ternary_codes(w)
    return _straight_through(w, codes / per_matrix(inverse))


def int8_codes(x: jax.Array, cut: str | None = None) -> tuple[jax.Array, jax.Array]:
    """(whole numbers from -128 to 127 as float32[..., D], 127 / s as float32[..., 1]) of activations; the mesh axis
    `cut` may cut D."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    largest = jnp.maximum(jax.lax.pmax(largest, cut) if cut else largest, EPS)
    return jnp.clip(jnp.round(x * (127 / largest)), -128, 127), largest


def int8_activation(x: jax.Array, cut: str | None = None) -> jax.Array:
    """x~ in float32, with the gradient of x~ as that of x."""
    codes, largest = int8_codes(jax.lax.stop_gradient(x), cut)
    return _straight_through(x.astype(jnp.float32), codes / (127 / largest))


@jax.custom_jvp
def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded` with the derivative of x. The usual x + stop_gradient(rounded - x) is off by a last bit here and there,
    and then there are seven values instead of three."""
    return rounded


@_straight_through.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def _towards(x: jax.Array, rounded: jax.Array, share: jax.Array | None) -> jax.Array:
    """x moved by a share of the way to its rounding, with the gradient of x."""
    return rounded if share is None else _straight_through(x, x + share * (rounded - x))


@verbs._project.register
def _(w: Ternary, x: jax.Array) -> jax.Array:
    moved = _towards(x.astype(jnp.float32), int8_activation(x), w.share)
    return verbs.project(moved.astype(x.dtype), verbs.dense(w).astype(x.dtype))


@verbs._settle.register
def _(w: Ternary) -> Rounded:
    assert w.share is None, "experts turn ternary at once"
    return Rounded(verbs.dense(w))


@verbs._project_grouped.register
def _(w: Ternary, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return verbs.project_grouped(x_MD, verbs.settle(w), groups)


@verbs._project_grouped.register
def _(w: Rounded, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return grouped_matmul(int8_activation(x_MD, groups.cut).astype(x_MD.dtype), w.weight.astype(x_MD.dtype), groups)


@verbs._dense.register
def _(w: Ternary) -> jax.Array:
    if w.share is None:
        return ternary_weight(w.latent)
    latent = verbs.dense(w.latent).astype(jnp.float32)
    return _towards(latent, ternary_weight(latent), per_matrix(w.share))


@handles.handle_of.register
def _(leaf: Ternary) -> Any:
    return handles.handle_of(leaf.latent)  # a share is not learned


@handles.hold.register
def _(leaf: Ternary, handle: Any) -> Ternary:
    return Ternary(handles.hold(leaf.latent, handle), leaf.share)


@handles.cotangent_of.register
def _(leaf: Ternary, handle: Any) -> Ternary:
    return Ternary(handles.cotangent_of(leaf.latent, handle))
