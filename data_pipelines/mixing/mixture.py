"""Which example comes as the k-th draw: a function of (sizes, weights, seed, k), with no state.

Sources take turns so that after any number of draws each has had its share to within less than one example
(turns.py). The j-th turn of a source is the example permutation(epoch)(j mod size) of epoch j // size. Turns are
counted over the whole run: where weights change nothing is shuffled again, and what a source has left of its
epoch comes next.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import InputError
from data_pipelines.mixing.permutation import permutation_key, permute, permute_many
from data_pipelines.mixing.shares import integer_weights, turn_limits
from data_pipelines.mixing.turns import Ideal, plan

_BLOCK = 1 << 16  # draws whose arrays stay in a core's cache

Integers = npt.NDArray[np.int64]


class Draw(NamedTuple):
    """Position of the source in the mixture, its epoch, and the position of the example in the source."""

    source: int
    epoch: int
    example: int


class Draws(NamedTuple):
    """The same of n draws."""

    source: npt.NDArray[np.int32]
    epoch: Integers
    example: Integers


class Phase(NamedTuple):
    """What is drawn from the draw `start` on: integer weights, 0 for a source that is not; used_up: the sources that
    have by then come as often as they may."""

    start: int
    weights: dict[str, int]
    used_up: tuple[str, ...]

    @property
    def shares(self) -> dict[str, float]:
        return {name: weight / sum(self.weights.values()) for name, weight in self.weights.items()}


class Mixture:
    """Draws from named sources.

    sizes: name -> examples. weights: relative numbers of examples; without any (absent or 0 for every source) a source
    weighs its size. temperature: makes shares more even; see `shares`. max_epochs: a source is drawn at most
    floor(epochs * size) times in all, and exactly so often if the run is long enough; the others then go on in their
    proportions. schedule: (first draw, weights), ascending: the weights from that draw on, {} for the sizes.

    Weights for some sources only are an error. With a schedule a source may wait, or leave: its weight in a phase is
    then written as 0 (what is absent is still an error), but above 0 in some phase. A source that leaves has been drawn
    its share to within less than one example like every other, and may therefore come once more.

    `cycle_weights` holds the integers of the weights given first, `phases` all of them and where they begin, `limits`
    name -> draws of sources with max_epochs, `end` how many draws there are: None, unless everything that may still be
    drawn is used up. (If a source has left before that, one of the others may lack its last example.) A phase keeps
    at most a few cycles in memory, one if it is the only one: 9 MiB for the longest, made in a third of a second.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        max_epochs: Mapping[str, float] | None = None,
        schedule: Sequence[tuple[int, Mapping[str, float]]] = (),
    ):
        self.names, self.sizes, self.seed = list(sizes), list(sizes.values()), seed
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"source {name!r}: found {size} examples; expected at least one")
        if not sizes:
            raise InputError("found no sources; expected at least one")
        phases = _phase_weights(sizes, weights or {}, temperature, schedule)
        self.limits = turn_limits(sizes, max_epochs or {})
        limits = [self.limits.get(name) for name in sizes]
        self.cycle_weights = phases[0][1]
        self._ideal = Ideal(phases, limits)
        self.end = None if self._ideal.end is None else math.floor(self._ideal.end)
        if self.end == 0:
            raise InputError(f"max_epochs: found {dict(max_epochs or {})}, which leave nothing to draw")
        self.phases = self._phases(limits)
        self._segments = plan(self._ideal)
        self._starts = [segment.start for segment in self._segments]

    def _phases(self, limits: Sequence[int | None]) -> list[Phase]:
        phases: dict[int, Phase] = {}
        for stretch in self._ideal.stretches:
            used_up = tuple(name for name, r, limit in zip(self.names, stretch.reached, limits) if r == limit)
            start = math.ceil(stretch.start)
            phases[start] = Phase(start, dict(zip(self.names, stretch.weights)), used_up)
        return [phase for start, phase in phases.items() if start != self.end]

    def draw(self, k: int) -> Draw:
        """The k-th draw, 0 <= k < end."""
        self._check(k, k)
        segment = self._segments[bisect.bisect_right(self._starts, k) - 1]
        cycle, position = divmod(k - segment.start, len(segment.sources))
        source = int(segment.sources[position])
        turn = segment.given[source] + cycle * segment.weights[source] + int(segment.turn[position])
        epoch, index = divmod(turn, self.sizes[source])
        key = permutation_key(self.seed, self.names[source], epoch)
        return Draw(source, epoch, permute(index, self.sizes[source], key))

    def draw_many(self, draws: range | npt.ArrayLike) -> Draws:
        """`draw` of many at once, in their order."""
        exact = np.arange(draws.start, draws.stop, draws.step) if isinstance(draws, range) else draws
        steps: Integers = np.asarray(exact, np.int64)
        if len(steps):
            self._check(int(np.min(steps)), int(np.max(steps)))
        blocks = [self._draw_block(steps[at : at + _BLOCK]) for at in range(0, max(1, len(steps)), _BLOCK)]
        return Draws(*map(np.concatenate, zip(*blocks)))

    def _draw_block(self, steps: Integers) -> Draws:
        source, turn = np.empty(len(steps), np.int32), np.empty(len(steps), np.int64)
        which = np.searchsorted(self._starts, steps, side="right") - 1
        for number in np.unique(which):
            at = np.flatnonzero(which == number)
            source[at], turn[at] = self._segments[number].turns(steps[at])
        epoch, example = np.empty_like(turn), np.empty_like(turn)
        order = np.argsort(source.astype(np.min_scalar_type(len(self.sizes) - 1)), kind="stable")
        for at in np.split(order, np.cumsum(np.bincount(source, minlength=len(self.sizes)))[:-1]):
            if len(at):
                epoch[at], example[at] = self._examples(int(source[at[0]]), turn[at])
        return Draws(source, epoch, example)

    def _examples(self, source: int, turn: Integers) -> tuple[Integers, Integers]:
        """Epochs and examples of turns of one source."""
        epoch = turn // self.sizes[source]
        distinct, which = np.unique(epoch, return_inverse=True)
        keys = [permutation_key(self.seed, self.names[source], number) for number in distinct.tolist()]
        index = turn - epoch * self.sizes[source]
        return epoch, permute_many(index, self.sizes[source], np.array(keys, np.uint64)[which])

    def counts(self, draws: int) -> dict[str, int]:
        """How many of the first `draws` draws each source has."""
        self._check(draws, draws - 1)
        return dict(zip(self.names, self._segments[bisect.bisect_right(self._starts, draws) - 1].counts(draws)))

    def _check(self, first: int, last: int) -> None:
        if first < 0 or (self.end is not None and last >= self.end):
            has = "and so on" if self.end is None else f"to {self.end - 1}"
            raise IndexError(f"found draws {first} to {last}; expected some of 0 {has}")

    def expected(self, draws: int) -> dict[str, Fraction]:
        """The sum of each source's shares in the first `draws` draws, from which `counts` is less than one away."""
        return dict(zip(self.names, self._ideal.turns(draws)))

    def draws_for_epochs(self, epochs: float) -> int:
        """As many draws as `epochs` times the examples of all sources, or all there are. Without weights that reads
        every example `epochs` times; with weights `counts` tells how often a source is read."""
        draws = math.ceil(Fraction(str(epochs)) * sum(self.sizes))
        return draws if self.end is None else min(draws, self.end)


def _phase_weights(
    sizes: Mapping[str, int],
    weights: Mapping[str, float],
    temperature: float,
    schedule: Sequence[tuple[int, Mapping[str, float]]],
) -> list[tuple[int, list[int]]]:
    """The first draw of every phase and its whole weights."""
    starts = [start for start, _ in schedule]
    if any(start != int(start) or before >= start for before, start in zip([0, *starts], starts)):
        raise InputError(f"schedule: found phases from draws {starts}; expected whole numbers above 0, ascending")
    partial = bool(schedule)
    phases = [(int(at), integer_weights(sizes, each, temperature, partial)) for at, each in [(0, weights), *schedule]]
    if never := [name for i, name in enumerate(sizes) if not any(each[i] for _, each in phases)]:
        raise InputError(f"weights: found 0 for {never} in every phase; expected one above 0, or no such source")
    return phases


def draw_rng(seed: int, name: str, draw: Draw) -> np.random.Generator:
    """Random numbers of a draw: a function of the seed, of its source's name, its epoch and its example."""
    return np.random.default_rng((permutation_key(seed, f"text of {name}", draw.epoch), draw.example))
