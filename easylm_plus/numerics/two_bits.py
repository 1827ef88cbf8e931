"""Four ternary codes in a byte: two bits hold code + 1, the first code in the lowest.

Which four share a byte is the caller's choice, who lays them along an axis of four.
"""

from typing import Any

from easylm_plus.numerics.coded import host_or_device

PER_BYTE = 4


def joined(fours: Any, axis: int = -2) -> Any:
    """{-1, 0, 1} of any signed dtype [..., 4, n], or with the fours along another axis, -1 -> uint8[..., n]."""
    xp = host_or_device(fours)
    up = (fours.astype(xp.int8) + xp.int8(1)).astype(xp.uint8)
    return (up << _shifts(xp, axis)).sum(axis, dtype=xp.uint8)


def parted(packed: Any, axis: int = -2) -> Any:
    """The inverse: uint8[..., n] -> int8[..., 4, n]."""
    xp = host_or_device(packed)
    return ((xp.expand_dims(packed, axis) >> _shifts(xp, axis)) & 3).astype(xp.int8) - xp.int8(1)


def _shifts(xp: Any, axis: int) -> Any:
    shifts = 2 * xp.arange(PER_BYTE, dtype=xp.uint8)
    return shifts[:, None] if axis == -2 else shifts
