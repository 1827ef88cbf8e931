"""Matrices of which most weights are zero and not stored.

    TwoFour   of four in-features of an output two are kept, with two bits each for where they stand
    Sparse    a bit a weight says whether it is kept; the kept ones lie one after the other, row by row

Products decode first: these leaves take less room, and no less time. NVIDIA's sparse tensor cores multiply 2:4 matrices
up to twice as fast, but XLA does not use them: jax.experimental.sparse.nm, which did from 2024 on, is gone from jax
0.10. What is left is a Pallas kernel's `tcgen05_mma` with its operand `a_sparse_metadata`, on Blackwell only; none is
written here.

Which weights are kept is decided in compression/. Values have the dtype of the weights.

    bits a weight, of 16-bit values:  2:4  8 + 1 = 9    Sparse, 50 %  8 + 1 = 9    Sparse, 90 %  1.6 + 1 = 2.6

Legend: `...` stack axes, D in-features, F out-features, N weights kept of a matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.integer import pack_bits, unpack_bits


@struct.dataclass
class TwoFour(Coded):
    """A matrix [..., D, F] with two weights in each four in-features of an output."""

    values: jax.Array  # [..., D / 2, F]: the first and the second of each four
    index: jax.Array  # uint8[..., D / 8 rounded up, F]: four places, the first four's in the lower half of the byte

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, half, F = self.values.shape
        return (*stack, 2 * half, F)


@struct.dataclass
class Sparse(Coded):
    """A matrix [..., D, F] with N weights; of a stack each has as many."""

    values: jax.Array  # [..., N]
    bitmap: jax.Array  # uint8[..., D / 8 rounded up, F], as numerics/integer.py packs bits
    inputs: int = struct.field(pytree_node=False)  # D

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, _, F = self.bitmap.shape
        return (*stack, self.inputs, F)


def two_four(w: jax.Array, kept: jax.Array) -> TwoFour:
    """w[..., D, F] where bool[..., D, F], of which exactly two in each four in-features of an output are true.

    Raises ValueError if fours do not divide D.
    """
    *stack, D, F = w.shape
    if D % 4:
        raise ValueError(f"fours do not divide {D} in-features")
    fours = kept.reshape(*stack, D // 4, 4, F)
    first = jnp.argmax(fours, -2)
    second = 3 - jnp.argmax(fours[..., ::-1, :], -2)
    places = jnp.stack([first, second], -2)
    values = jnp.take_along_axis(w.reshape(fours.shape), places, -2).reshape(*stack, D // 2, F)
    nibbles = (first | second << 2).astype(jnp.uint8)
    nibbles = jnp.pad(nibbles, [(0, 0)] * len(stack) + [(0, D // 4 % 2), (0, 0)])
    return TwoFour(values, nibbles[..., ::2, :] | nibbles[..., 1::2, :] << 4)


def sparse(w: jax.Array, kept: jax.Array, count: int) -> Sparse:
    """w[D, F] where bool[D, F], of which `count` are true."""
    at = jnp.nonzero(kept.reshape(-1), size=count)[0]
    return Sparse(w.reshape(-1)[at], pack_bits(kept), w.shape[0])


@decode.register
def _(w: TwoFour) -> Any:
    xp = host_or_device(w.values)
    *stack, D, F = w.shape
    nibbles = xp.stack([w.index & 15, w.index >> 4], -2).reshape(*stack, -1, F)[..., : D // 4, :]
    places, pairs = (nibbles & 3, nibbles >> 2), w.values.reshape(*stack, D // 4, 2, F)
    here = xp.arange(4, dtype=xp.uint8)[:, None]
    one = lambda k: xp.where(
        places[k][..., None, :] == here, pairs[..., k : k + 1, :], xp.zeros_like(pairs[..., :1, :])
    )
    return (one(0) + one(1)).reshape(*stack, D, F)


@decode.register
def _(w: Sparse) -> Any:
    xp = host_or_device(w.values)
    *stack, D, F = w.shape
    kept = unpack_bits(w.bitmap, D).reshape(*stack, D * F)
    at = xp.cumsum(kept, -1, dtype=xp.int32) - 1
    values = xp.take_along_axis(w.values, xp.clip(at, 0, w.values.shape[-1] - 1), -1)
    return xp.where(kept != 0, values, xp.zeros_like(values)).reshape(*stack, D, F)
