"""Ternary weights as they are served: four codes a byte, one scale a matrix, and products of whole numbers.

    y = (xq Wq) gamma / s        xq int8, one s a token; Wq in {-1, 0, 1}; sums in int32, exact

With codes and gamma of the weights that were trained (ternary.py) this is what training computed, but for float32's
rounding of products that are exact here.

Codes lie by output feature, where a product with one token reads them in order. A feature's in-features are cut into
blocks of 256, and byte j of a block's 64 holds those at j, j + 64, j + 128 and j + 192, the first in the lowest bits:
any of the four is had by one shift, next to activations that lie side by side. In-features are padded to whole blocks
with the code 0. Two bits hold code + 1.

Legend: `...` stack axes, D in-features, F out-features, N tokens, P padded in-features.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from easylm_plus.numerics import verbs
from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode, per_matrix
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.ternary import EPS, Rounded, ternary_codes

BLOCK, PER_BYTE = 256, 4
LEAST_ROWS = 16  # XLA:CPU multiplies fewer rows of int8 in a loop of its own, fifteen times as slowly


@struct.dataclass
class PackedTernary(Coded):
    """A matrix [..., D, F] of {-1, 0, 1} times its scale."""

    codes: jax.Array  # uint8[..., F, P / 4]
    scale: jax.Array  # float32[...]: gamma
    inputs: int = struct.field(pytree_node=False)  # D
    by_output: ClassVar[tuple[str, ...]] = ("codes",)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-2])


def pack(codes: Any) -> Any:
    """{-1, 0, 1} of any signed dtype [..., D, F] -> uint8[..., F, P / 4]."""
    xp = host_or_device(codes)
    up = (xp.swapaxes(codes, -1, -2).astype(xp.int8) + xp.int8(1)).astype(xp.uint8)
    padding = [(0, 0)] * (up.ndim - 1) + [(0, -up.shape[-1] % BLOCK)]
    up = xp.pad(up, padding, constant_values=1)
    quarters = up.reshape(*up.shape[:-1], -1, PER_BYTE, BLOCK // PER_BYTE)
    shifts = 2 * xp.arange(PER_BYTE, dtype=xp.uint8)[:, None]
    packed = (quarters << shifts).sum(-2, dtype=xp.uint8)
    return packed.reshape(*packed.shape[:-2], -1)


def unpack(packed: Any, inputs: int) -> Any:
    """uint8[..., F, P / 4] -> int8[..., F, D]: by output feature, as they lie."""
    xp = host_or_device(packed)
    bytes_ = packed.reshape(*packed.shape[:-1], -1, 1, BLOCK // PER_BYTE)
    shifts = 2 * xp.arange(PER_BYTE, dtype=xp.uint8)[:, None]
    codes = ((bytes_ >> shifts) & 3).astype(xp.int8) - xp.int8(1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :inputs]


def packed(latent: jax.Array) -> PackedTernary:
    """What a latent [..., D, F] of training is served as."""
    codes, inverse = ternary_codes(latent)
    return PackedTernary(pack(codes), 1 / inverse, latent.shape[-2])


def int8_codes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes int8[..., D], 1 / s as float32[..., 1]) of activations, a scale a token."""
    x = x.astype(jnp.float32)
    scale = 127 / jnp.maximum(jnp.abs(x).max(-1, keepdims=True), EPS)
    return jnp.clip(jnp.round(x * scale), -128, 127).astype(jnp.int8), 1 / scale


@decode.register
def _(w: PackedTernary) -> Any:
    xp = host_or_device(w.codes)
    return xp.swapaxes(unpack(w.codes, w.inputs), -1, -2).astype(xp.float32) * per_matrix(w.scale)


@verbs._project.register
def _(w: PackedTernary, x: jax.Array) -> jax.Array:
    return _product(x, w)


@verbs._settle.register
def _(w: PackedTernary) -> Rounded:
    return Rounded(decode(w))


@verbs._project_grouped.register
def _(w: PackedTernary, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return verbs.project_grouped(x_MD, verbs.settle(w), groups)


@jax.custom_vjp
def _product(x: jax.Array, w: PackedTernary) -> jax.Array:
    rows_ND, inverse_N1 = int8_codes(x.reshape(-1, x.shape[-1]))
    y_NF = integer_product(rows_ND, w).astype(jnp.float32) * (inverse_N1 * w.scale)
    return y_NF.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _backward(w: PackedTernary, dy: jax.Array) -> tuple[jax.Array, None]:
    return verbs.unembed(dy, decode(w)), None  # straight through the rounding of x


_product.defvjp(lambda x, w: (_product(x, w), w), _backward)


def integer_product(x_ND: jax.Array, w: PackedTernary) -> jax.Array:
    """int8[N, D] times codes -> int32[N, F], exact."""
    N = x_ND.shape[0]
    x_ND = jnp.pad(x_ND, ((0, max(0, LEAST_ROWS - N)), (0, 0)))
    w_FD = unpack(w.codes, w.inputs)
    y_NF = jax.lax.dot_general(x_ND, w_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return y_NF[:N]
