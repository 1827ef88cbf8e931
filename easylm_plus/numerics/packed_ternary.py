"""Ternary weights as they are served: four codes a byte, one scale a matrix, and products of whole numbers.

    y = (xq Wq) gamma / s        xq int8, one s a token; Wq in {-1, 0, 1}; sums in int32, exact

With codes and gamma of the weights that were trained (ternary.py) this is what training computed, but for float32's
rounding of products that are exact here.

Codes lie by output feature, where a product with one token reads them in order. A feature's in-features are cut into
blocks of 256, and byte j of a block's 64 holds those at j, j + 64, j + 128 and j + 192, the first in the lowest bits:
any of the four is had by one shift, next to activations that lie side by side. In-features are padded to whole blocks
with the code 0. Two bits hold code + 1.

A product with few tokens may have a kernel that reads the codes as they lie (kernels/choice.py); all others unpack. The
sums are the same, and so are the roundings before and after, bit by bit.

Legend: `...` stack axes, D in-features, F out-features, N tokens, P padded in-features.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easylm_plus.numerics import verbs
from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode, per_matrix
from easylm_plus.numerics.kernels import choice, native
from easylm_plus.numerics.kernels.mapped import over_tokens
from easylm_plus.numerics.ternary import Rounded, int8_codes, ternary_codes
from easylm_plus.numerics.two_bits import PER_BYTE, joined, parted

BLOCK = 256
STEP = np.float32(1) / np.float32(127)  # XLA makes this of a division by 127, and is off by a last bit where it does
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
    by_output = xp.swapaxes(codes, -1, -2)
    padding = [(0, 0)] * (by_output.ndim - 1) + [(0, -by_output.shape[-1] % BLOCK)]
    quarters = xp.pad(by_output, padding).reshape(*by_output.shape[:-1], -1, PER_BYTE, BLOCK // PER_BYTE)
    return joined(quarters).reshape(*by_output.shape[:-1], -1)


def unpack(packed: Any, inputs: int) -> Any:
    """uint8[..., F, P / 4] -> int8[..., F, D]: by output feature, as they lie."""
    codes = parted(packed.reshape(*packed.shape[:-1], -1, BLOCK // PER_BYTE))
    return codes.reshape(*packed.shape[:-1], -1)[..., :inputs]


def packed(latent: jax.Array) -> PackedTernary:
    """What a latent [..., D, F] of training is served as."""
    codes, inverse = ternary_codes(latent)
    return PackedTernary(pack(codes), 1 / inverse, latent.shape[-2])


@decode.register
def _(w: PackedTernary) -> Any:
    xp = host_or_device(w.codes)
    return xp.swapaxes(unpack(w.codes, w.inputs), -1, -2).astype(xp.float32) * per_matrix(w.scale)


@verbs._project.register
def _(w: PackedTernary, x: jax.Array) -> jax.Array:
    return _product(choice.path(), x, w)


@verbs._settle.register
def _(w: PackedTernary) -> Rounded:
    return Rounded(decode(w))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(path: str, x: jax.Array, w: PackedTernary) -> jax.Array:
    return _rows(path)(x.reshape(-1, x.shape[-1]), w.codes, w.scale).reshape(*x.shape[:-1], -1)


def _backward(path: str, w: PackedTernary, dy: jax.Array) -> tuple[jax.Array, None]:
    return verbs.unembed(dy, decode(w)), None  # straight through the rounding of x


_product.defvjp(lambda path, x, w: (_product(path, x, w), w), _backward)


@cache
def _rows(path: str) -> Callable:
    """(x[N, D], codes and scale of one matrix) -> [N, F] in x's dtype, by this path; a function a path, since JAX
    remembers what it has traced of a function."""

    @over_tokens
    def rows(x_ND: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        if path == "ffi" and fits(x_ND, path):
            return native.ternary_product(x_ND, codes, scale)
        codes_ND, largest_N1 = int8_codes(x_ND)
        w = PackedTernary(codes, scale, x_ND.shape[-1])
        y_NF = integer_product(codes_ND.astype(jnp.int8), w, path)
        # in the order that XLA (jax 0.10) would make of any other
        return (y_NF.astype(jnp.float32) * (largest_N1 * (STEP * scale))).astype(x_ND.dtype)

    return rows


def fits(x_ND: jax.Array, path: str) -> bool:
    """Whether a path's kernel takes such tokens."""
    return x_ND.shape[0] <= choice.MOST_TOKENS[path] and x_ND.shape[1] <= native.MOST_INPUTS


def integer_product(x_ND: jax.Array, w: PackedTernary, path: str = "xla") -> jax.Array:
    """int8[N, D] times codes -> int32[N, F], exact."""
    if path in KERNELS and fits(x_ND, path):
        return KERNELS[path](x_ND, w.codes)
    N = x_ND.shape[0]
    x_ND = jnp.pad(x_ND, ((0, max(0, LEAST_ROWS - N)), (0, 0)))
    w_FD = unpack(w.codes, w.inputs)
    y_NF = jax.lax.dot_general(x_ND, w_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return y_NF[:N]


def _in_pallas(name: str) -> Callable:
    def kernel(x_ND: jax.Array, codes: jax.Array) -> jax.Array:
        from easylm_plus.numerics.kernels import pallas  # takes half a second, and few need it

        return getattr(pallas, name)(x_ND, codes)

    return kernel


KERNELS = {"ffi": native.integer_product, "triton": _in_pallas("triton"), "mosaic": _in_pallas("mosaic")}
