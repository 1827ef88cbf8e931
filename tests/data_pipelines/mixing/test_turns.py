"""Turns are Tijdeman's, step for step, however weights change, and what is kept of them stays small."""

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixing.turns import Ideal, plan, tijdeman

AWKWARD = [1, 3, 7, 89, 977, 1013, 4001]


def worst_error(cycle, weights):
    """Largest |n·w_i/W - turns of source i among the first n|, exactly."""
    total, given = sum(weights), np.eye(len(weights), dtype=np.int64)[cycle].cumsum(0)
    ideal = np.arange(1, len(cycle) + 1)[:, None] * np.array(weights, np.int64)
    return Fraction(int(np.abs(ideal - given * total).max()), total)


def bound(count):
    return 1 - Fraction(1, 2 * count - 2) if count > 1 else 0


def step_by_step(phases, limits, steps):
    """C(n) of n = 0, 1, ...: the definition, without looking ahead. Up to the end, with one more if that is within
    a step."""
    reached = [Fraction(0)] * len(limits)
    known = [tuple(reached)]
    for step in range(steps):
        weights = next(w for start, w in reversed(phases) if start <= step)
        rest = Fraction(1)
        while rest:
            left = [w if limit is None or r < limit else 0 for w, limit, r in zip(weights, limits, reached)]
            if not any(left):
                return known if rest == 1 else [*known, tuple(reached)]
            until = [(m - r) * sum(left) / w for w, m, r in zip(left, limits, reached) if w and m is not None]
            past = min([rest, *until])
            reached = [r + past * Fraction(w, sum(left)) for w, r in zip(left, reached)]
            rest -= past
        known.append(tuple(reached))
    return known


def earliest_due(known, steps, due_by=None):
    """Tijdeman's rule as it is written, on C(n). due_by(source, turns, step): when C_source is at `turns`, for a rule
    that does not know."""
    count = len(known[0])
    margin, given, order = Fraction(1, max(2, 2 * count - 2)), [0] * count, []
    of_source = list(zip(*known))

    def due(source, turns, step):
        last = bisect.bisect_right(of_source[source], turns) - 1
        return last if last < len(known) - 1 else math.inf

    for step in range(1, steps + 1):
        ready = [i for i in range(count) if of_source[i][step] - given[i] >= margin]
        order.append(min(ready, key=lambda i: ((due_by or due)(i, given[i] + 1 - margin, step), i)))
        given[order[-1]] += 1
    return order


def sources_of(segments, first, last):
    """Sources of the steps from `first` on, below `last`."""
    pieces = [np.empty(0, int)]
    for segment, following in zip(segments, [*segments[1:], None]):
        stop = last if following is None else min(last, following.start)
        pieces.append(segment.turns(np.arange(max(first, segment.start), max(first, segment.start, stop)))[0])
    return np.concatenate(pieces).tolist()


def worst_prefix(known, order):
    """Largest distance from C(n), exactly."""
    given, worst = [0] * len(known[0]), Fraction(0)
    for ideal, source in zip(known[1:], order):
        given[source] += 1
        worst = max(worst, *(abs(c - g) for c, g in zip(ideal, given)))
    return worst


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_cycle_meets_tijdemans_bound(weights):
    cycle = tijdeman(weights)
    assert np.bincount(cycle).tolist() == weights
    assert worst_error(cycle, weights) <= bound(len(weights))


@st.composite
def changing_weights(draw):
    count = draw(st.integers(1, 5))
    weights = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 7]), min_size=count, max_size=count).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 220), max_size=3)))
    limits = draw(st.lists(st.one_of(st.none(), st.integers(0, 90)), min_size=count, max_size=count))
    return [(start, draw(weights)) for start in (0, *starts)], limits


@settings(max_examples=80, deadline=None)
@given(changing_weights())
def test_turns_are_those_of_the_rule_step_by_step(case):
    phases, limits = case
    try:
        ideal = Ideal(phases, limits)
    except ValueError:  # used up before weights change, which is so
        assert len(step_by_step(phases, limits, 220)) <= phases[-1][0] + 1
        return
    known = step_by_step(phases, limits, 500)
    steps = 250 if ideal.end is None else min(250, math.floor(ideal.end))
    if ideal.end is not None and ideal.end < 500:
        assert known[-1] == ideal.final and len(known) - 1 == math.ceil(ideal.end)
    segments = plan(ideal)
    order = sources_of(segments, 0, steps)
    assert order == earliest_due(known, steps)
    assert worst_prefix(known, order) <= bound(len(limits))
    for n in range(steps + 1):
        assert ideal.turns(n) == known[n]
    for n in range(0, steps + 1, 7):
        given = next(s for s in reversed(segments) if s.start <= n).counts(n) if segments else []
        assert given == [order[:n].count(source) for source in range(len(given))]
        assert all(limit is None or g <= limit for g, limit in zip(given, limits))


def test_control_simpler_rules_are_off_by_more_where_weights_change():
    phases = [(0, [1, 1, 1]), (28, [0, 50, 1])]
    known = step_by_step(phases, [None] * 3, 400)
    assert worst_prefix(known, sources_of(plan(Ideal(phases, [None] * 3)), 0, 200)) <= bound(3)

    def as_if_weights_stayed(source, turns, step):
        weights = next(w for start, w in reversed(phases) if start < step)
        return (turns - known[step][source]) * sum(weights) / weights[source] if weights[source] else math.inf

    assert worst_prefix(known, earliest_due(known, 200, as_if_weights_stayed)) > bound(3)

    phases = [(0, [3, 2, 5, 2]), (10, [8, 8, 7, 4]), (16, [8, 1, 7, 7])]
    known = step_by_step(phases, [None] * 4, 200)
    assert worst_prefix(known, sources_of(plan(Ideal(phases, [None] * 4)), 0, 100)) <= bound(4)
    anew = [*tijdeman(phases[0][1])[:10], *tijdeman(phases[1][1])[:6], *tijdeman(phases[2][1])]
    assert worst_prefix(known, anew) > 1


def test_phases_of_a_thousand_million_steps_take_no_more_than_a_few_cycles():
    phases = [(0, [60, 10, 20, 25]), (10**9, [100, 37, 200, 0]), (2 * 10**9 + 7, [97, 1, 200, 125])]
    ideal = Ideal(phases, [3 * 10**8, None, None, None])
    segments = plan(ideal)
    assert sum(len(s.sources) for s in segments) < 3000 and len(ideal.stretches) == 4
    for stretch in [*ideal.stretches, ideal.stretches[-1]._replace(start=Fraction(10**13))]:
        around = math.floor(stretch.start)
        first, last = max(0, around - 700), around + 700
        given = next(s for s in reversed(segments) if s.start <= first).counts(first)
        order = sources_of(segments, first, last)
        for n, source in enumerate([*order, 0], first):
            assert max(abs(c - g) for c, g in zip(ideal.turns(n), given)) <= bound(4)
            given[source] += 1
    assert next(s for s in reversed(segments) if s.start <= 10**13).counts(10**13)[0] == 3 * 10**8


def test_a_phase_without_something_to_draw_is_an_error():
    with pytest.raises(ValueError, match=r"after 4 draws .* at draw 6"):
        Ideal([(0, [1, 0]), (6, [1, 1])], [4, None])
    assert Ideal([(0, [1, 0]), (6, [1, 1])], [4, 0]).end == 4
    assert Ideal([(0, [1, 0]), (4, [1, 1])], [4, None]).end is None
