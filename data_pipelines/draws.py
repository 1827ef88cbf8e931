"""Many draws of a mixture at once, as arrays: what `Mixture.draw` gives one by one."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.mixture import _ROUNDS, Mixture, permutation_key

Integers = npt.NDArray[np.int64]
_MASK = (1 << 64) - 1
_BLOCK = 1 << 14  # draws whose intermediate results stay in a core's cache


class Draws(NamedTuple):
    """Of each draw the position of its source, its epoch, and the position of its example: int64[n] each."""

    source: Integers
    epoch: Integers
    example: Integers


def draws_at(mixture: Mixture, numbers: Integers) -> Draws:
    """The draws with these numbers, in any order."""
    cycle, position = np.divmod(numbers, len(mixture._cycle))
    source = mixture._cycle[position].astype(np.int64)
    turn = cycle * np.array(mixture.cycle_weights)[source] + mixture._turn[position]
    epoch, index = np.divmod(turn, np.array(mixture.sizes)[source])
    example = np.empty_like(index)
    for number, (name, size) in enumerate(zip(mixture.names, mixture.sizes)):
        own = np.flatnonzero(source == number)
        for passed in np.unique(epoch[own]).tolist():
            chosen = own[epoch[own] == passed]
            example[chosen] = _permute(index[chosen], size, permutation_key(mixture.seed, name, passed))
    return Draws(source, epoch, example)


def phase_starts(mixture: Mixture) -> list[int]:
    """The first draws of the phases, ascending from 0."""
    return [phase.start for phase in getattr(mixture, "phases", ())] or [0]


def last_draw(mixture: Mixture) -> int | None:
    """How many draws there are; None: no end."""
    end: int | None = getattr(mixture, "end", None)
    return end


def weight_changes(mixture: Mixture) -> list[list[Any]]:
    """[first draw, weights] of the phases after the first, and [end, []], as JSON has them."""
    later = [[phase.start, list(phase.weights.values())] for phase in getattr(mixture, "phases", ())[1:]]
    end = last_draw(mixture)
    return later if end is None else [*later, [end, []]]


def _permute(index: Integers, size: int, key: int) -> Integers:
    """`permute` of each index."""
    blocks = [index[i : i + _BLOCK].astype(np.uint64) for i in range(0, len(index), _BLOCK)]
    for block in blocks:
        outside = np.arange(len(block))
        while len(outside):
            block[outside] = _network(block[outside], size, key)
            outside = outside[block[outside] >= size]
    return np.concatenate(blocks).view(np.int64)


def _network(index: npt.NDArray[np.uint64], size: int, key: int) -> npt.NDArray[np.uint64]:
    left_size = np.uint64(math.isqrt(size - 1) + 1)
    right_size = np.uint64(-(-size // int(left_size)))
    left, right = index % left_size, index // left_size
    for rounds in range(0, _ROUNDS, 2):
        left = (left + _mix(key + rounds, right) % left_size) % left_size
        right = (right + _mix(key + rounds + 1, left) % right_size) % right_size
    return right * left_size + left


def _mix(key: int, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = value * np.uint64(0xD1B54A32D192ED03) + np.uint64(key * 0x9E3779B97F4A7C15 & _MASK)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
