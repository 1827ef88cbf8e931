"""Which example comes as the k-th draw: a function of (sizes, weights, seed, k), with no state.

Sources take turns in a repeating cycle that holds source i exactly w_i times (integer weights, W in all). Within the
cycle the turns are spread by Tijdeman's algorithm for the chairman assignment problem (R. Tijdeman, "The chairman
assignment problem", Discrete Mathematics 32 (1980) 323-330), so that after any number of draws n every source has
had n·w_i/W turns to within 1 - 1/(2k-2) of an example, k being the number of sources. All of it is integer
arithmetic. The j-th turn of a source is the example permutation(epoch)(j mod size) of epoch j // size.
"""

import functools
import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import InputError

MAX_CYCLE = 1 << 20
_ROUNDED_CYCLE = 100_000
_ROUNDS = 8  # with 6, pairs of neighbours in 30 examples were still measurably uneven (chi² 1.7 per degree)
_MASK = (1 << 64) - 1


class Draw(NamedTuple):
    """Position of the source in the mixture, its epoch, and the position of the example in the source."""

    source: int
    epoch: int
    example: int


class Mixture:
    """Draws from named sources. `weights` are relative numbers of examples; without any (absent or 0 for every
    source) a source weighs its size, so that all of them are read once in the same number of draws. Weights for some
    sources only are an error, since no common scale is given.

    Weights are taken as the decimal numbers they are written as and brought to integers exactly (0.3 and 0.7 become
    3 and 7); if the cycle would be longer than MAX_CYCLE they are rounded to shares of 1/100,000, and none to zero.
    `cycle_weights` holds the integers. The longest cycle takes 16 MiB and about a second to make.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float] | None = None, seed: int = 0):
        self.names, self.sizes, self.seed = list(sizes), list(sizes.values()), seed
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"source {name!r}: found {size} examples; expected at least one")
        if not sizes:
            raise InputError("found no sources; expected at least one")
        self.cycle_weights = _integer_weights(_numbers(sizes, weights or {}))
        self._cycle = tijdeman(self.cycle_weights)
        turns = [np.flatnonzero(self._cycle == source) for source in range(len(sizes))]
        self._turn = np.empty(len(self._cycle), np.int32)
        for positions in turns:
            self._turn[positions] = np.arange(len(positions))
        self._turns = turns

    def draw(self, k: int) -> Draw:
        """The k-th draw, k >= 0."""
        cycle, position = divmod(k, len(self._cycle))
        source = int(self._cycle[position])
        turn = cycle * self.cycle_weights[source] + int(self._turn[position])
        epoch, index = divmod(turn, self.sizes[source])
        key = permutation_key(self.seed, self.names[source], epoch)
        return Draw(source, epoch, permute(index, self.sizes[source], key))

    def counts(self, draws: int) -> dict[str, int]:
        """How many of the first `draws` draws each source has."""
        cycles, rest = divmod(draws, len(self._cycle))
        within = [int(np.searchsorted(positions, rest)) for positions in self._turns]
        return {n: cycles * w + more for n, w, more in zip(self.names, self.cycle_weights, within)}

    def draws_for_epochs(self, epochs: float) -> int:
        """As many draws as `epochs` times the examples of all sources. Without weights that reads every example
        `epochs` times; with weights `counts` tells how often a source is read."""
        return math.ceil(Fraction(str(epochs)) * sum(self.sizes))


def _numbers(sizes: Mapping[str, int], weights: Mapping[str, float]) -> list[Fraction]:
    """Weights in the order of the sources, or their sizes where no source has one."""
    if unknown := [name for name in weights if name not in sizes]:
        raise InputError(f"weights: found {unknown}; expected names among {list(sizes)}")
    if wrong := {name: w for name, w in weights.items() if not (0 <= w < math.inf)}:
        raise InputError(f"weights: found {wrong}; expected finite numbers of at least 0")
    if not any(weights.values()):
        return [Fraction(size) for size in sizes.values()]
    if missing := [name for name in sizes if not weights.get(name)]:
        raise InputError(f"weights: found none for {missing}; expected one for every source, or for none")
    return [Fraction(str(weights[name])) for name in sizes]


def _integer_weights(numbers: Sequence[Fraction]) -> list[int]:
    scale = math.lcm(*(number.denominator for number in numbers))
    exact = [int(number * scale) for number in numbers]
    if sum(exact) // math.gcd(*exact) > MAX_CYCLE:
        total = sum(exact)
        exact = [max(1, round(Fraction(weight * _ROUNDED_CYCLE, total))) for weight in exact]
    divisor = math.gcd(*exact)
    return [weight // divisor for weight in exact]


def tijdeman(weights: Sequence[int]) -> npt.NDArray[np.int32]:
    """int32[sum(weights)]: the source of each turn of one cycle.

    With share s = w/W, turn j (from 0) of a source may be given from step n on once n·s - j >= 1/(2k-2), and has to
    be given while n·s - j <= 1 - 1/(2k-2). Tijdeman proves that giving each step to the admissible turn with the
    earliest last step meets every one of them.
    """
    total, parts = sum(weights), 2 * len(weights) - 2
    cycle = np.zeros(total, np.int32)
    if parts == 0:
        return cycle
    given = [0] * len(weights)

    def first_step(source: int) -> int:
        return -(-(given[source] * parts + 1) * total // (parts * weights[source]))

    def last_step(source: int) -> int:
        return ((given[source] + 1) * parts - 1) * total // (parts * weights[source])

    waiting = [(first_step(source), source) for source in range(len(weights))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for step in range(1, total + 1):
        while waiting and waiting[0][0] <= step:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (last_step(source), source))
        source = heapq.heappop(ready)[1]
        cycle[step - 1] = source
        given[source] += 1
        if given[source] < weights[source]:
            heapq.heappush(waiting, (first_step(source), source))
    return cycle


@functools.lru_cache(maxsize=4096)
def permutation_key(seed: int, name: str, number: int) -> int:
    """64 bits that look random: a function of the seed, of what is permuted and of a running number."""
    digest = hashlib.blake2b(f"{seed}/{number}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw_rng(seed: int, name: str, draw: Draw) -> np.random.Generator:
    """Random numbers of a draw: a function of the seed, of its source's name, its epoch and its example."""
    return np.random.default_rng((permutation_key(seed, f"text of {name}", draw.epoch), draw.example))


def permute(index: int, size: int, key: int) -> int:
    """Image of index (0 <= index < size) under a permutation of range(size) that the 64-bit key selects.

    The generalised Feistel network on a x b >= size with cycle walking of J. Black and P. Rogaway, "Ciphers with
    arbitrary finite domains" (CT-RSA 2002), with the finaliser of SplitMix64 (Steele, Lea, Flood 2014) as its round
    function. Not for secrets. grain's index_shuffle does the same, but importing grain imports JAX.
    """
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    while True:
        left, right = index % left_size, index // left_size
        for rounds in range(0, _ROUNDS, 2):
            left = (left + _mix(key + rounds, right)) % left_size
            right = (right + _mix(key + rounds + 1, left)) % right_size
        index = right * left_size + left
        if index < size:
            return index


def _mix(key: int, value: int) -> int:
    mixed = (key * 0x9E3779B97F4A7C15 + value * 0xD1B54A32D192ED03) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
