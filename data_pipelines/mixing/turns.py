"""Whose turn it is: sources take turns so that each has had its share at every moment, to within less than one turn.

R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980) 323-330: k sources with shares that may
change from step to step, C_i(n) being the sum of source i's first n shares, can take turns such that after any number
of steps n source i has had C_i(n) turns to within 1 - c, where c = 1/(2k-2). Turn j (from 0) of a source may be given
from the first step n on with C_i(n) - j >= c, and is due at the last n with C_i(n) - j <= 1 - c; giving each step to
the open turn that is due first meets all of them. Any stretch of steps is then right to within two turns.

Here the shares are those of integer weights that change a few times (`Ideal`), when a phase begins or a source is used
up. The latter happens within a step: the shares of that step are mixed, so that the source ends with exactly the turns
that it may have. All of it is exact: whole numbers, and fractions where weights change.

While weights stay the same, the windows of turns repeat after as many steps as the weights sum to, a cycle. The turns
do so too, from the second cycle on: those open at the start of a cycle are due before its end, and where two runs of
the rule differ in which of the open turns are given, they become one when the last of these is. (A source of weight 0
may hold it up: it has one turn left at most, which is given when nothing else is open.) So it is enough to keep the
first cycles, as few as it takes for the next to begin as the last one did, which is checked; one cycle that repeats;
and what comes so late that open turns are due after the next change of weights. Each is a `Segment`.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import InputError

_BLOCK = 1 << 16  # steps planned at a time
_NEVER = 1 << 42  # steps ahead of what is never due

Integers = npt.NDArray[np.int64]
Sources = npt.NDArray[np.unsignedinteger]


class Stretch(NamedTuple):
    """Weights that hold from a moment on, measured in steps; reached: every C_i at that moment."""

    start: Fraction
    weights: tuple[int, ...]
    reached: tuple[Fraction, ...]

    def turns(self, moment: Fraction | int) -> tuple[Fraction, ...]:
        """Every C_i at a moment at which these weights still hold."""
        cycles = Fraction(moment - self.start) / sum(self.weights)
        return tuple(r + cycles * w for r, w in zip(self.reached, self.weights))


class Ideal:
    """The C_i(n), piecewise linear, which sum to n. `end`: the moment at which everything is used up, None if never;
    `final`: the C_i of then."""

    def __init__(self, phases: Sequence[tuple[int, Sequence[int]]], limits: Sequence[int | None]):
        """phases: (first step, weights), ascending from 0; limits: how many turns a source may have in all. Raises
        InputError if nothing is left to draw before a phase that has something."""
        self.stretches: list[Stretch] = []
        self.end: Fraction | None = None
        moment, self.final = Fraction(0), (Fraction(0),) * len(limits)
        for number, (_, weights) in enumerate(phases):
            stop = phases[number + 1][0] if number + 1 < len(phases) else None
            while moment != stop and any(left := _left(weights, self.final, limits)):
                stretch = Stretch(moment, left, self.final)
                self.stretches.append(stretch)
                ends = [Fraction(stop)] if stop is not None else []
                for weight, reached, limit in zip(*stretch[1:], limits):
                    if weight and limit is not None:
                        ends.append(moment + (limit - reached) * Fraction(sum(left), weight))
                if not ends:
                    return
                moment = min(ends)
                self.final = stretch.turns(moment)
            if moment != stop and any(any(_left(later, self.final, limits)) for _, later in phases[number + 1 :]):
                raise InputError(
                    f"after {math.floor(moment)} draws every source with a weight is used up, but weights change at "
                    f"draw {stop}; expected an earlier change, or sources that last until then"
                )
        self.end = moment

    def turns(self, step: int) -> tuple[Fraction, ...]:
        """C_i(step) of every source."""
        if self.end is not None and step >= self.end:
            return self.final
        return next(s for s in reversed(self.stretches) if s.start <= step).turns(step)

    def last_step(self, source: int, turns: Fraction) -> int | None:
        """The last n with C_source(n) <= turns; None if that holds for ever."""
        stretch = next(s for s in reversed(self.stretches) if s.reached[source] <= turns)
        if not stretch.weights[source] or (self.end is not None and self.final[source] <= turns):
            return None
        cycles = (turns - stretch.reached[source]) / stretch.weights[source]
        return math.floor(stretch.start + cycles * sum(stretch.weights))


def _left(weights: Sequence[int], reached: Sequence[Fraction], limits: Sequence[int | None]) -> tuple[int, ...]:
    """The weights of sources that are not used up, without a common divisor."""
    left = [w if limit is None or r < limit else 0 for w, r, limit in zip(weights, reached, limits)]
    return tuple(weight // max(1, math.gcd(*left)) for weight in left)


class Segment:
    """Draws from `start` on that go through `sources` again and again, or once.

    sources: uint[n]. turn: int32[n], which of its source's turns in a cycle each is. weights: turns of every source
    in a cycle; given: turns before `start`.
    """

    def __init__(self, start: int, given: Sequence[int], sources: npt.NDArray[np.unsignedinteger]):
        self.start, self.given, self.sources = start, list(given), sources
        per_cycle = np.bincount(sources, minlength=len(self.given))
        self.weights: list[int] = per_cycle.tolist()
        order = np.argsort(sources, kind="stable").astype(np.int32)
        self._positions = np.split(order, np.cumsum(per_cycle)[:-1])
        self.turn = np.empty(len(sources), np.int32)
        for positions in self._positions:
            self.turn[positions] = np.arange(len(positions), dtype=np.int32)

    def turns(self, steps: Integers) -> tuple[npt.NDArray[np.int32], Integers]:
        """int32[n], int64[n]: the sources of steps (from 0), and which of its source's turns in all each is."""
        cycles = (steps - self.start) // len(self.sources)
        within = steps - self.start - cycles * len(self.sources)
        source = self.sources[within].astype(np.int32)
        return source, self.turn[within] + np.array(self.given)[source] + cycles * np.array(self.weights)[source]

    def counts(self, step: int) -> list[int]:
        """Turns of every source in the first `step` steps of all."""
        cycles, rest = divmod(step - self.start, len(self.sources))
        within = [int(np.searchsorted(positions, rest)) for positions in self._positions]
        return [g + cycles * w + more for g, w, more in zip(self.given, self.weights, within)]


def plan(ideal: Ideal) -> list[Segment]:
    """All turns. A stretch is at most k + 1 cycles and the rest before its end, and usually two."""
    planner = _Planner(ideal)
    ends = [stretch.start for stretch in ideal.stretches[1:]]
    for stretch, end in zip(ideal.stretches, [*ends, ideal.end]):
        planner.go_on(stretch, end)
    return planner.segments


def tijdeman(weights: Sequence[int]) -> npt.NDArray[np.int32]:
    """int32[sum(weights)]: the source of each turn of one cycle."""
    planner = _Planner(Ideal([(0, weights)], [None] * len(weights)))
    stretch = Stretch(Fraction(0), tuple(weights), (Fraction(0),) * len(weights))
    return planner.turns(stretch, None, sum(weights)).astype(np.int32)


class _Planner:
    """Gives turns from step 0 on; `given`: how many each source has had by `step`."""

    def __init__(self, ideal: Ideal):
        self.ideal, self.segments, self.step, self.given = ideal, list[Segment](), 0, [0] * len(ideal.final)
        # a lone source, for which c is not defined, always has exactly its share
        self.margin = Fraction(1, max(2, 2 * len(self.given) - 2))

    def go_on(self, stretch: Stretch, end: Fraction | None) -> None:
        """Appends the segments of a stretch."""
        cycle, rarest = sum(stretch.weights), min(weight for weight in stretch.weights if weight)
        stop, linear = None, None
        if end is not None:
            stop = math.floor(end)
            linear = math.floor(end - Fraction(cycle, rarest))  # what is open by then is due before the end
        while linear is None or self.step + 2 * cycle <= linear:
            segment = Segment(self.step, self.given, self.turns(stretch, end, self.step + cycle))
            if segment.weights == list(stretch.weights):
                self._append(segment, linear)
                break
            self._append(segment, self.step + cycle)
        if stop is not None and self.step < stop:
            self._append(Segment(self.step, self.given, self.turns(stretch, end, stop)), stop)

    def _append(self, segment: Segment, stop: int | None) -> None:
        self.segments.append(segment)
        if stop is not None:
            self.step, self.given = stop, segment.counts(stop)

    def turns(self, stretch: Stretch, end: Fraction | None, stop: int) -> Sources:
        """uint[stop - step]: the sources of the steps up to `stop`, all within the stretch."""
        blocks, given = [], list(self.given)
        small = np.min_scalar_type(len(given) - 1)
        for start in range(self.step, stop, _BLOCK):
            blocks.append(self._block(stretch, end, given, start, min(start + _BLOCK, stop)).astype(small))
            more = np.bincount(blocks[-1], minlength=len(given)).tolist()
            given = [before + new for before, new in zip(given, more)]
        return np.concatenate(blocks)

    def _block(self, stretch: Stretch, end: Fraction | None, given: list[int], start: int, stop: int) -> Integers:
        """int64[stop - start]: the turns due first, by number `due * k + source`, so that ties go by source."""
        opens, ranks = [], []
        for source, level in enumerate(stretch.turns(stop)):
            count = math.floor(level - self.margin) + 1 - given[source]
            if count > 0:
                first, due = self._windows(stretch, end, source, given[source], count, start)
                opens.append(first)
                ranks.append(due * len(given) + source)
        opened = np.concatenate(opens)
        order = np.argsort(opened, kind="stable")
        counts = np.bincount(opened - 1, minlength=stop - start).tolist()
        return np.array(_due_first(np.concatenate(ranks)[order].tolist(), counts)) % len(given)

    def _windows(
        self, stretch: Stretch, end: Fraction | None, source: int, given: int, count: int, start: int
    ) -> tuple[Integers, Integers]:
        """int64[count], int64[count]: when a source's turns from `given` on open, no earlier than in the next step,
        and are due; in steps after `start`."""
        weight, cycle = stretch.weights[source], sum(stretch.weights)
        origin = (stretch.start - start) * weight + (given - stretch.reached[source]) * cycle
        turns = np.arange(count) * cycle
        opens = -(-(turns + math.ceil(origin + self.margin * cycle)) // max(1, weight))
        due = (turns + math.floor(origin + (1 - self.margin) * cycle)) // max(1, weight)
        limit = given + count - self.margin
        if not weight or (end is not None and stretch.turns(end)[source] <= limit):
            last = self.ideal.last_step(source, limit)
            due[-1] = _NEVER if last is None else min(last - start, _NEVER)
        return np.maximum(opens, 1), due


def _due_first(ranks: list[int], opening: list[int]) -> list[int]:
    """The smallest open rank of each step. ranks: in the order in which they open; opening: how many do in a step."""
    given, ready, at = [], list[int](), 0
    for count in opening:
        if count == 1:
            given.append(heapq.heappushpop(ready, ranks[at]))
        else:
            for rank in ranks[at : at + count]:
                heapq.heappush(ready, rank)
            given.append(heapq.heappop(ready))
        at += count
    return given
