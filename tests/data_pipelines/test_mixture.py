"""The mixture keeps its proportions at every prefix, exactly, and reads every example of an epoch once."""

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixture import MAX_CYCLE, Mixture, permutation_key, permute, tijdeman

AWKWARD = [1, 3, 7, 89, 977, 1013, 4001]


def worst_error(cycle, weights):
    """Largest |n·w_i/W - turns of source i among the first n|, exactly."""
    total, turns = sum(weights), np.eye(len(weights), dtype=np.int64)[cycle].cumsum(0)
    ideal = np.arange(1, len(cycle) + 1)[:, None] * np.array(weights, np.int64)
    return Fraction(int(np.abs(ideal - turns * total).max()), total)


def bound(weights):
    return 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0


def test_no_prefix_of_100_000_draws_is_off_by_an_example():
    mixture = Mixture({f"s{i}": 10 + i for i in range(7)}, {f"s{i}": w for i, w in enumerate(AWKWARD)})
    drawn = np.array([mixture.draw(k).source for k in range(100_000)])
    assert worst_error(drawn, AWKWARD) <= bound(AWKWARD) < 1
    assert mixture.counts(100_000) == {f"s{i}": n for i, n in enumerate(np.bincount(drawn))}


def test_control_simpler_schedules_are_off_by_more():
    total = sum(AWKWARD)
    round_robin = np.array([i for n in range(max(AWKWARD)) for i, w in enumerate(AWKWARD) if n < w])
    assert worst_error(round_robin, AWKWARD) > 100
    rounding = []  # the source that is furthest behind its rounded share
    given = np.zeros(7, np.int64)
    for n in range(1, total + 1):
        rounding.append(int(np.argmax(np.rint(n * np.array(AWKWARD) / total) - given)))
        given[rounding[-1]] += 1
    assert worst_error(np.array(rounding), AWKWARD) > 1


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_cycle_meets_tijdemans_bound(weights):
    cycle = tijdeman(weights)
    assert np.bincount(cycle).tolist() == weights
    assert worst_error(cycle, weights) <= bound(weights)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_are_even_and_fixed():
    pairs = Counter(
        (permute(0, 12, permutation_key(0, "a", e)), permute(1, 12, permutation_key(0, "a", e))) for e in range(13_200)
    )
    chi_squared = sum((pairs[i, j] - 100) ** 2 / 100 for i in range(12) for j in range(12) if i != j)
    assert chi_squared < 131 + 4 * (2 * 131) ** 0.5
    big = np.array([permute(i, 5003, 99) for i in range(5003)])
    assert abs(np.corrcoef(np.arange(5003), big)[0, 1]) < 0.06 and abs(np.corrcoef(big[1:], big[:-1])[0, 1]) < 0.06
    # The order is a contract with every checkpoint: these numbers may never change.
    assert [permute(i, 10, permutation_key(7, "alpaca", 1)) for i in range(10)] == FIXED
    assert permute(123, 10**12, 5) == FIXED_LARGE


FIXED = [9, 0, 2, 1, 7, 3, 6, 5, 4, 8]
FIXED_LARGE = 375387563088


def test_without_weights_an_epoch_is_every_example_once():
    sizes = {"a": 30, "b": 7, "c": 1}
    for weights in (None, {}, {"a": 0, "b": 0}):
        mixture = Mixture(sizes, weights, seed=3)
        assert mixture.draws_for_epochs(2) == 76 and mixture.draws_for_epochs(0.5) == 19
        epochs = [[mixture.draw(k) for k in range(38 * e, 38 * (e + 1))] for e in range(2)]
        for e, epoch in enumerate(epochs):
            assert sorted(d.source for d in epoch) == [0] * 30 + [1] * 7 + [2]
            assert {(d.source, d.example) for d in epoch} == {
                (s, i) for s, n in enumerate([30, 7, 1]) for i in range(n)
            }
            assert {d.epoch for d in epoch} == {e}
        assert [d.example for d in epochs[0]] != [d.example for d in epochs[1]]


def test_a_source_is_reshuffled_each_epoch_whatever_stands_beside_it():
    both, alone = Mixture({"a": 9, "b": 5}, {"a": 1, "b": 2}, seed=1), Mixture({"b": 5}, seed=1)
    drawn = [d for k in range(60) if (d := both.draw(k)).source == 1]
    assert [(d.epoch, d.example) for d in drawn] == [(d.epoch, d.example) for d in map(alone.draw, range(40))]
    assert len({tuple(alone.draw(5 * e + i).example for i in range(5)) for e in range(8)}) > 4
    assert [alone.draw(k).example for k in range(5)] != [Mixture({"b": 5}, seed=2).draw(k).example for k in range(5)]
    assert alone.draw(10**15).epoch == 2 * 10**14


def test_weights_become_integers():
    cycle_weights = lambda *weights: Mixture({str(i): 3 for i in range(len(weights))},
                                             {str(i): w for i, w in enumerate(weights)}).cycle_weights  # fmt: skip
    assert (
        cycle_weights(0.3, 0.7) == [3, 7]
        and cycle_weights(10, 20) == [1, 2]
        and cycle_weights(0.1, 1e-6) == [100_000, 1]
    )
    rounded = cycle_weights(1.0, 3.14159265358979, 1e-9)
    assert rounded[2] == 1 and sum(rounded) <= MAX_CYCLE
    assert rounded[1] / rounded[0] == pytest.approx(3.14159265358979, rel=1e-4)
    assert Mixture({"a": 2**40, "b": 3 * 2**40}).cycle_weights == [1, 3]


def test_what_cannot_be_mixed_is_named():
    for sizes, weights, message in [
        ({}, None, "no sources"),
        ({"a": 0}, None, "'a': found 0 examples"),
        ({"a": 1}, {"b": 1}, "found \\['b'\\]"),
        ({"a": 1, "b": 1}, {"a": 1}, "found none for \\['b'\\]"),
        ({"a": 1}, {"a": -1}, "'a': -1"),
        ({"a": 1}, {"a": float("nan")}, "nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixture(sizes, weights)


def test_the_package_loads_no_jax():
    modules = ["tokenization", "template", "mixture", "packing", "loader"]
    code = "import sys, json\n" + "".join(f"import data_pipelines.{m}\n" for m in modules)
    code += "print(json.dumps([m for m in ('jax', 'grain', 'tensorflow', 'easylm_plus') if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []
