"""Matrices as small integers with a scale a group: 2, 3, 4, 5, 6 or 8 bits a weight.

    symmetric    value = q s        s = max |w| / (2^(b-1) - 1)     q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   value = (q - z) s  s = (max - min) / (2^b - 1)     q = clip(round(w / s) + z, 0, 2^b - 1)
                                    z = round(-min / s)             min <= 0 <= max: zero is one of the values

A group is so many in-features of one output, by default all of them. Rounding is to nearest, half to even; better ways
to choose the same codes are in compression/. Activations stay as they are (W8A16, W4A16 and so on).

A matrix may have a factor an in-feature, by which its rows were multiplied before they were rounded (AWQ's scales,
compression/awq.py); x is divided by it, or what is the same, the decoded row.

Codes take b bits in memory, not the 8 that a byte has. They lie as b planes of bits: byte k of plane p holds bit p of
the eight in-features 8k ... 8k + 7, the first in the lowest bit. Unlike packing codes side by side this is the same for
all b, also those that do not divide 8. Codes of 8 bits are int8. What is stored is not negative: q + 2^(b-1) of the
symmetric kind (in int8: q, and q - 128 of the asymmetric one).

Legend: `...` stack axes, D in-features, F out-features, G groups, P = D / 8 rounded up, b bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode

WIDTHS = (8, 6, 5, 4, 3, 2)  # bits
LEAST = 1e-8  # a scale, so that a group of zeros has one


@struct.dataclass
class Integers(Coded):
    """A matrix [..., D, F] of integers, with a scale for each group of in-features of an output."""

    codes: jax.Array  # uint8[..., b, P, F]; of 8 bits int8[..., D, F]
    scales: jax.Array  # float32[..., G, F]
    bits: int = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)  # D
    zeros: Any = None  # z, uint8[..., G, F]; None: symmetric
    channel: Any = None  # float32[..., D]; None: ones

    @property
    def shape(self) -> tuple[int, ...]:
        stack = self.scales.shape[:-2]
        return (*stack, self.inputs, self.scales.shape[-1])


class Grid(NamedTuple):
    """The values that a group can have."""

    scale: Any  # float32[...]
    zero: Any  # float32[...]; None: symmetric


def grid(w: jax.Array, bits: int, asymmetric: bool, axis: int = -2) -> Grid:
    """The grid of each group of weights, which lie along `axis`."""
    w = w.astype(jnp.float32)
    if not asymmetric:
        return Grid(jnp.maximum(jnp.abs(w).max(axis) / (2 ** (bits - 1) - 1), LEAST), None)
    low, high = jnp.minimum(w.min(axis), 0), jnp.maximum(w.max(axis), 0)
    scale = jnp.maximum((high - low) / (2**bits - 1), LEAST)
    return Grid(scale, jnp.round(-low / scale))


def rounded(w: jax.Array, g: Grid, bits: int) -> jax.Array:
    """Codes q of weights, float32; the grid is broadcast against them."""
    q = jnp.round(w.astype(jnp.float32) / g.scale)
    if g.zero is None:
        return jnp.clip(q, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return jnp.clip(q + g.zero, 0, 2**bits - 1)


def value(q: jax.Array, g: Grid) -> jax.Array:
    """What codes mean."""
    return q * g.scale if g.zero is None else (q - g.zero) * g.scale


def integers(w: jax.Array, bits: int, group: int = 0, asymmetric: bool = False, channel: Any = None) -> Integers:
    """w[..., D, F] rounded to nearest. `group` in-features share a scale, 0: all; `channel`: float32[..., D].

    Raises ValueError if the groups do not divide D.
    """
    if channel is not None:
        w = w.astype(jnp.float32) * channel[..., None]
    grouped = by_group(w, group)
    g = grid(grouped, bits, asymmetric)
    codes = rounded(grouped, Grid(*(None if x is None else x[..., None, :] for x in g)), bits).reshape(w.shape)
    return of_codes(codes, g, bits, channel)


def by_group(w: Any, group: int) -> Any:
    """[..., D, F] -> [..., G, D / G, F]."""
    *stack, D, F = w.shape
    if D % (group or D):
        raise ValueError(f"groups of {group} do not divide {D} in-features")
    return w.reshape(*stack, -1, group or D, F)


def of_codes(q: jax.Array, g: Grid, bits: int, channel: Any = None) -> Integers:
    """The leaf of codes q[..., D, F] and the grids [..., G, F] of their groups."""
    zeros = None if g.zero is None else g.zero.astype(jnp.uint8)
    return Integers(pack(q, bits, g.zero is not None), g.scale.astype(jnp.float32), bits, q.shape[-2], zeros, channel)


def pack(q: Any, bits: int, asymmetric: bool) -> Any:
    """Codes [..., D, F] of any dtype -> what is stored of them."""
    xp = host_or_device(q)
    if bits == 8:
        return (q.astype(xp.int16) - 128 * asymmetric).astype(xp.int8)
    up = (q.astype(xp.int8) + xp.int8(0 if asymmetric else 2 ** (bits - 1))).astype(xp.uint8)
    return xp.stack([pack_bits((up >> p) & 1) for p in range(bits)], -3)


def unpack(w: Integers) -> Any:
    """The codes q, int16[..., D, F]."""
    xp = host_or_device(w.codes)
    if w.bits == 8:
        return w.codes.astype(xp.int16) + xp.int16(0 if w.zeros is None else 128)
    up = sum(unpack_bits(w.codes[..., p, :, :], w.inputs) << p for p in range(w.bits))
    return up.astype(xp.int16) - xp.int16(2 ** (w.bits - 1) if w.zeros is None else 0)


def pack_bits(bits: Any) -> Any:
    """{0, 1} [..., D, F] -> uint8[..., P, F]; the first of eight in-features in the lowest bit, zeros at the end."""
    xp = host_or_device(bits)
    *stack, D, F = bits.shape
    padded = xp.pad(bits.astype(xp.uint8), [(0, 0)] * len(stack) + [(0, -D % 8), (0, 0)])
    eights = padded.reshape(*stack, -1, 8, F)
    return (eights << xp.arange(8, dtype=xp.uint8)[:, None]).sum(-2, dtype=xp.uint8)


def unpack_bits(packed: Any, inputs: int) -> Any:
    """The inverse: uint8[..., P, F] -> {0, 1} as uint8[..., D, F]."""
    xp = host_or_device(packed)
    eights = (packed[..., None, :] >> xp.arange(8, dtype=xp.uint8)[:, None]) & xp.uint8(1)
    return eights.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :inputs, :]


@decode.register
def _(w: Integers) -> Any:
    xp = host_or_device(w.codes)
    q = unpack(w).astype(xp.float32)
    groups = q.reshape(*q.shape[:-2], w.scales.shape[-2], -1, q.shape[-1])
    if w.zeros is not None:
        groups = groups - w.zeros[..., None, :].astype(xp.float32)
    values = (groups * w.scales[..., None, :]).reshape(q.shape)
    return values if w.channel is None else values / w.channel[..., None]
