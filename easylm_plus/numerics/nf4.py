"""NF4: weights in 4 bits, for matrices whose entries look normal (QLoRA, Dettmers et al. 2023, arXiv:2305.14314,
section 3).

    value = LEVELS[code] absmax        code the nearest of 16, absmax one number a block of 64 in-features

LEVELS are quantiles of the normal distribution, scaled to +-1, with an exact 0 (equation 4). By "double quantisation"
the absmaxes are rounded as well, which leaves 4.127 bits a weight of 4.5:

    absmax = DYNAMIC[code] factor + mean    code 8 bits, factor one number a block of 256 absmaxes, mean one a matrix

Codes lie as bitsandbytes has them, so its bytes are ours: that library cuts a torch matrix [out, in] into blocks in the
order of its memory, two codes a byte, the first in the high nibble. Where 64 does not divide the in-features its blocks
run on into the next output feature; here every feature is padded with zeros to whole blocks, and a layer of stacked
ones, or an expert, is a matrix of its own.

Legend: `...` stack axes, D in-features, F out-features, P in-features padded to whole blocks, B = P / block blocks.
"""

from typing import Any, ClassVar

import jax
import numpy as np
from flax import struct

from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode, per_matrix

# as released: float32, so that what was rounded elsewhere decodes bit by bit
LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
ZERO = 7
BLOCK, DOUBLE_BLOCK = 64, 256


@struct.dataclass
class NF4(Coded):
    """A matrix [..., D, F] in 4 bits and a fraction."""

    codes: jax.Array  # uint8[..., F, P / 2]
    absmax: jax.Array  # float32[..., F, B]; uint8 codes of them where they are rounded too
    inputs: int = struct.field(pytree_node=False)  # D
    factor: Any = None  # float32[..., ceil(F B / 256)], or nothing where absmax is float32
    mean: Any = None  # float32[...], likewise
    by_output: ClassVar[tuple[str, ...]] = ("codes", "absmax")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-2])


def nf4(w: Any, block: int = BLOCK, double: bool = False) -> NF4:
    """w[..., D, F] of any float dtype in NF4, on the host if it is NumPy's. `block` is even; `double`: absmaxes too."""
    xp, D = host_or_device(w), w.shape[-2]
    w_FD = xp.swapaxes(w, -1, -2).astype(xp.float32)
    w_FP = xp.pad(w_FD, [(0, 0)] * (w_FD.ndim - 1) + [(0, -D % block)])
    blocks = w_FP.reshape(*w_FP.shape[:-1], -1, block)
    absmax = xp.abs(blocks).max(-1)
    codes = _nearest(xp, blocks / xp.where(absmax > 0, absmax, 1)[..., None], LEVELS).reshape(w_FP.shape)
    packed = (codes[..., ::2] << 4) | codes[..., 1::2]
    if not double:
        return NF4(packed, absmax, D)
    flat = absmax.reshape(*absmax.shape[:-2], -1)
    mean = flat.mean(-1)
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % DOUBLE_BLOCK)]
    rest = xp.pad(flat - mean[..., None], padding).reshape(*flat.shape[:-1], -1, DOUBLE_BLOCK)
    factor = xp.abs(rest).max(-1)
    rounded = _nearest(xp, rest / xp.where(factor > 0, factor, 1)[..., None], DYNAMIC)
    return NF4(packed, rounded.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]].reshape(absmax.shape), D,
               factor, mean)  # fmt: skip


@decode.register
def _(w: NF4) -> Any:
    xp = host_or_device(w.codes)
    codes = xp.stack([w.codes >> 4, w.codes & 15], -1)
    values = xp.asarray(LEVELS)[codes].reshape(*w.absmax.shape, -1) * _absmaxes(w)[..., None]
    w_FP = values.reshape(*w.codes.shape[:-1], -1)
    return xp.swapaxes(w_FP[..., : w.inputs], -1, -2)


def _absmaxes(w: NF4) -> Any:
    """float32[..., F, B]."""
    if w.factor is None:
        return w.absmax
    xp = host_or_device(w.codes)
    rest = xp.asarray(DYNAMIC)[w.absmax].reshape(*w.absmax.shape[:-2], -1)
    each = xp.repeat(w.factor, DOUBLE_BLOCK, axis=-1)[..., : rest.shape[-1]]
    return (rest * each).reshape(w.absmax.shape) + per_matrix(w.mean)


def _nearest(xp: Any, x: Any, levels: np.ndarray) -> Any:
    """The number of the nearest level, uint8[...]; of two as near the lower."""
    midpoints = (levels[1:] + levels[:-1]) / 2
    if xp is np or len(levels) > 16:
        return xp.searchsorted(xp.asarray(midpoints), x).astype(xp.uint8)
    return sum((x > middle).astype(xp.uint8) for middle in midpoints)


def _dynamic() -> np.ndarray:
    """float32[256]: what 8-bit absmaxes mean (Dettmers 2015, arXiv:1511.04561): seven decades with 1, 2, ... 64 means
    of neighbours on an even grid from 0.1 to 1, of either sign; and 0, and 1.

    The grid as torch makes it: from its nearer end, each point rounded to float32 once.
    """
    first, one = np.float32(0.1), np.float32(1)
    means = []
    for decade in range(7):
        parts = 2**decade
        step, i = float((one - first) / np.float32(parts)), np.arange(parts + 1)
        grid = np.where(i < (parts + 1) // 2, float(first) + step * i, 1 - step * (parts - i)).astype(np.float32)
        means.append((grid[1:] + grid[:-1]) / 2 * np.float32(10.0 ** (decade - 6)))
    positive = np.concatenate(means)
    return np.sort(np.concatenate([positive, -positive, [0, 1]])).astype(np.float32)


DYNAMIC = _dynamic()
