"""Four ternary codes in a byte: two bits hold code + 1, the first code in the lowest.

Which four share a byte is the caller's choice, who lays them along an axis of four.
"""

from typing import Any

from easylm_plus.numerics.coded import host_or_device

PER_BYTE = 4


def joined(fours: Any) -> Any:
    """{-1, 0, 1} of any signed dtype [..., 4, n] -> uint8[..., n]."""
    xp = host_or_device(fours)
    up = (fours.astype(xp.int8) + xp.int8(1)).astype(xp.uint8)
    return (up << _shifts(xp)).sum(-2, dtype=xp.uint8)


def parted(packed: Any) -> Any:
    """The inverse: uint8[..., n] -> int8[..., 4, n]."""
    xp = host_or_device(packed)
    return ((packed[..., None, :] >> _shifts(xp)) & 3).astype(xp.int8) - xp.int8(1)


def _shifts(xp: Any) -> Any:
    return 2 * xp.arange(PER_BYTE, dtype=xp.uint8)[:, None]
