"""Ternary weights in a file: five to a byte, 1.6 bits a weight where log2(3) = 1.585 are in them; nothing is lost.

    byte = sum_i (code_i + 1) 3^i, i = 0..4        at most 242

Codes are counted through by output feature, as packed_ternary.py has them in memory, without padding but for the last
byte of a matrix. Taking them apart costs a division a digit, which a product that waits for memory does not have the
time for; so this is what is kept, and `served` makes of it what is multiplied by.

Legend: `...` stack axes, D in-features, F out-features, S bytes.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

from easylm_plus.numerics import verbs
from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.packed_ternary import PackedTernary, pack, unpack

PER_BYTE = 5
POWERS = 3 ** np.arange(PER_BYTE)
DIGITS = (np.arange(256)[:, None] // POWERS % 3 - 1).astype(np.int8)  # of each byte, those that are none as well


@struct.dataclass
class Trits(Coded):
    """A matrix [..., D, F] of {-1, 0, 1} times its scale, as a file holds it."""

    codes: jax.Array  # uint8[..., S], S = D F / 5 rounded up
    scale: jax.Array  # float32[...]: gamma
    inputs: int = struct.field(pytree_node=False)  # D
    outputs: int = struct.field(pytree_node=False)  # F

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.inputs, self.outputs)


def joined(codes: Any) -> Any:
    """{-1, 0, 1} of any signed dtype [..., n] -> uint8[..., n / 5 rounded up]."""
    xp = host_or_device(codes)
    up = (codes.astype(xp.int8) + xp.int8(1)).astype(xp.uint8)
    up = xp.pad(up, [(0, 0)] * (up.ndim - 1) + [(0, -up.shape[-1] % PER_BYTE)])
    fives = up.reshape(*up.shape[:-1], -1, PER_BYTE)
    return (fives * xp.asarray(POWERS, xp.uint8)).sum(-1, dtype=xp.uint8)


def separated(bytes_: Any, count: int) -> Any:
    """The inverse: the first `count` codes of each row, int8[..., count]."""
    xp = host_or_device(bytes_)
    return xp.asarray(DIGITS)[bytes_].reshape(*bytes_.shape[:-1], -1)[..., :count]


def filed(w: PackedTernary) -> Trits:
    """What a file keeps of a served matrix."""
    D, F = w.shape[-2:]
    codes = unpack(w.codes, D)
    return Trits(joined(codes.reshape(*codes.shape[:-2], D * F)), w.scale, D, F)


def served(w: Trits) -> PackedTernary:
    """What is multiplied by, on the host or on the device."""
    xp, (D, F) = host_or_device(w.codes), w.shape[-2:]
    by_output = separated(w.codes, D * F).reshape(*w.codes.shape[:-1], F, D)
    return PackedTernary(pack(xp.swapaxes(by_output, -1, -2)), w.scale, D)


@decode.register
def _(w: Trits) -> Any:
    return decode(served(w))


@verbs._project.register
def _(w: Trits, x: jax.Array) -> jax.Array:
    return verbs.project(x, served(w))


@verbs._settle.register
def _(w: Trits) -> Any:
    return verbs.settle(served(w))
