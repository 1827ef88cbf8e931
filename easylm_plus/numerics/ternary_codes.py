"""What a step makes of a ternary latent, once: the codes, which are all that devices of `fsdp` send each other.

A latent is cut over `fsdp` and brought together layer by layer, forwards and again backwards. What multiplies is only
its sign or zero and one scale, so the codes are made first, of each device's own part (with the mean of the whole
matrix), and travel four a byte: a quarter of a byte a weight where bfloat16 has two. BitNet's "Training Tips, Code and
FAQ" names the opportunity. They are made before the micro-batches, and the product keeps int8 activations and these
codes for its backward pass. Numbers are those of `Ternary`, bit for bit; gradients go to a handle in its place.

Bytes hold four neighbours along the side that `fsdp` does not cut, so that it cuts the codes wherever it cuts the
latent. (Weights that are served lie otherwise: packed_ternary.py.)

Legend: `...` stack axes, D in-features, F out-features, N the packed one of them, Q = N / 4 rounded up.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from easylm_plus.numerics import handles, verbs
from easylm_plus.numerics.formats import per_matrix
from easylm_plus.numerics.fp8 import new_handle
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.stored import to_handle
from easylm_plus.numerics.ternary import Rounded, Ternary, int8_codes, ternary_codes
from easylm_plus.numerics.two_bits import PER_BYTE, joined, parted
from easylm_plus.parallel.sharding import constrain


@struct.dataclass
class TernaryCodes:
    """A matrix [..., D, F] of {-1, 0, 1} over `inverse`; its latent learns through the handle."""

    codes: jax.Array  # uint8[..., D, Q], or if `side` is -2, [..., Q, F]
    inverse: jax.Array  # float32[...]: 1 / gamma
    handle: Any = None  # an array like the latent, or an Fp8Handle; its values are never read
    side: int = struct.field(pytree_node=False, default=-1)  # which is packed
    size: int = struct.field(pytree_node=False, default=0)  # N
    axes: tuple[str | None, ...] = struct.field(pytree_node=False, default=())  # logical axes of one layer's array
    dtype: DTypeLike = struct.field(pytree_node=False, default=jnp.float32)  # of the gradient
    narrow: bool = struct.field(pytree_node=False, default=False)  # gradients in E4M3


def side_of(axes: tuple[str | None, ...]) -> int:
    """Which side of a matrix with these logical axes is packed."""
    return -1 if axes[-2] == "embed" else -2


def pack(codes: jax.Array, side: int) -> jax.Array:
    """{-1, 0, 1} of any dtype [..., D, F] -> uint8, with Q in the place of a side; what is missing has the code 0."""
    shape, padding = list(codes.shape), [(0, 0)] * codes.ndim
    padding[side] = (0, -shape[side] % PER_BYTE)
    shape[side:] = [-(-shape[side] // PER_BYTE), PER_BYTE, *shape[side:][1:]]
    return joined(jnp.pad(codes, padding).reshape(shape), side)


def unpack(packed: jax.Array, side: int, size: int) -> jax.Array:
    """The inverse: int8[..., D, F]."""
    shape = list(packed.shape)
    shape[side] *= PER_BYTE
    return jax.lax.slice_in_dim(parted(packed, side).reshape(shape), 0, size, axis=packed.ndim + side)


def values(w: TernaryCodes) -> jax.Array:
    """W~ in float32, on all devices of `fsdp`.

    Both constraints are needed: with the second alone the partitioner brings together what the codes are made of.
    """
    pieces = constrain(w.codes, *w.axes)
    whole = constrain(pieces, *(None if axis == "embed" else axis for axis in w.axes))
    return unpack(whole, w.side, w.size).astype(jnp.float32) / per_matrix(w.inverse)


@jax.custom_vjp
def _product(x: jax.Array, w: TernaryCodes) -> jax.Array:
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: TernaryCodes) -> Any:
    codes, largest = int8_codes(x)
    scale = 127 / largest
    rounded = (codes / scale).astype(x.dtype)
    return verbs.project(rounded, values(w).astype(x.dtype)), (codes.astype(jnp.int8), scale, w)


def _backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, TernaryCodes]:
    codes, scale, w = residuals
    rounded = (codes.astype(jnp.float32) / scale).astype(dy.dtype)
    dx, dw = jax.vjp(verbs.project, rounded, values(w).astype(dy.dtype))[1](dy)
    dw = constrain(dw, *w.axes)
    return dx, handles.cotangent_of(w, to_handle(w.handle, dw))  # straight through both roundings


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _dense(w: TernaryCodes) -> jax.Array:
    return values(w)


_dense.defvjp(
    lambda w: (values(w), w),
    lambda w, dw: (handles.cotangent_of(w, to_handle(w.handle, constrain(dw, *w.axes))),),
)


@verbs._project.register
def _(w: TernaryCodes, x: jax.Array) -> jax.Array:
    return _product(x, w)


@verbs._dense.register
def _(w: TernaryCodes) -> jax.Array:
    return _dense(w)


@verbs._settle.register
def _(w: TernaryCodes) -> Rounded:
    return Rounded(_dense(w))


@verbs._project_grouped.register
def _(w: TernaryCodes, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return verbs.project_grouped(x_MD, verbs.settle(w), groups)


@handles.handle_of.register
def _(leaf: TernaryCodes) -> Any:
    shape = list(leaf.codes.shape)
    shape[leaf.side] = leaf.size
    return new_handle(tuple(shape)) if leaf.narrow else jnp.zeros(shape, leaf.dtype)


@handles.hold.register
def _(leaf: TernaryCodes, handle: Any) -> TernaryCodes:
    return dataclasses.replace(leaf, handle=handle)


@handles.cotangent_of.register
def _(leaf: TernaryCodes, handle: Any) -> TernaryCodes:
    nothing: Any = None
    return dataclasses.replace(leaf, codes=nothing, inverse=nothing, handle=handle)


def turned(before: TernaryCodes | Ternary, latent: jax.Array) -> jax.Array:
    """(share of weights whose code is another than before, share of zeros now), float32[..., 2], by matrix."""
    now, _ = ternary_codes(latent)
    if isinstance(before, Ternary):
        flipped = ternary_codes(verbs.dense(before.latent))[0] != now
    else:
        flipped = unpack(before.codes, before.side, before.size) != now
    return jnp.stack([share.mean((-2, -1), dtype=jnp.float32) for share in (flipped, now == 0)], -1)
