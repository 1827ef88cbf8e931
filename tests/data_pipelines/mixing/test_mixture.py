"""The mixture keeps its proportions at every prefix, exactly, and reads every example of an epoch once."""

import hashlib
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixing.mixture import Mixture
from data_pipelines.mixing.turns import tijdeman

KOALA = {
    "sharegpt": 30_000, "hc3": 87_000, "oig": 30_000, "alpaca": 52_000, "hh": 160_000, "webgpt": 20_000,
    "summarize": 93_000,
}  # fmt: skip
DRAWS = 1_000_000


def named(*weights):
    return dict(zip(KOALA, weights))


MIXTURES = {
    "sizes": {},
    "weights": {"weights": named(3, 0.5, 1, 1.25, 2, 0.1, 1)},
    "rounded": {"weights": named(3.14159265358979, 0.5, 1, 1.25, 2, 0.1, 1e-7)},
    "temperature": {"temperature": 3.3},
    "three phases and caps": {
        "weights": named(3, 0.5, 1, 1.25, 2, 0, 1),
        "schedule": [(300_007, named(1, 0.37, 2, 0, 1.731, 0.113, 1)), (650_001, named(0.97, 0, 2, 1.25, 1.3, 0.7, 3))],
        "max_epochs": {"sharegpt": 4, "webgpt": 1.5, "oig": 6.01},
    },
}  # fmt: skip


def errors(mixture, sources):
    """float[n + 1, k]: turns of each source less its shares, after 0, 1, ... n draws."""
    turns = np.zeros((len(sources) + 1, len(mixture.names)))
    np.cumsum(sources[:, None] == np.arange(turns.shape[1]), axis=0, out=turns[1:])
    stops = [phase.start for phase in mixture.phases[1:]] + [len(sources) + 1]
    for phase, stop in zip(mixture.phases, stops):
        reached = np.array([float(turns) for turns in mixture.expected(phase.start).values()])
        steps = np.arange(len(turns[phase.start : stop]))[:, None]
        turns[phase.start : stop] -= reached + steps * np.array(list(phase.shares.values()))
    return turns


def worst(errors):
    """Of every prefix, and of every window."""
    return np.abs(errors).max(), (errors.max(0) - errors.min(0)).max()


@pytest.fixture(scope="module", params=MIXTURES)
def million(request):
    make = lambda: Mixture(KOALA, seed=5, **MIXTURES[request.param])
    return make, make().draw_many(range(DRAWS))


def test_no_prefix_of_a_million_draws_is_off_by_an_example_and_no_window_by_two(million):
    mixture, drawn = million[0](), million[1]
    prefix, window = worst(errors(mixture, drawn.source))
    assert prefix < 1 and window < 2
    assert prefix > 0.3  # so much is left of whole examples and broken shares
    for n in (0, 1, 299_999, 300_007, 650_001, 999_999, DRAWS):
        assert list(mixture.counts(n).values()) == np.bincount(drawn.source[:n], minlength=7).tolist()


@pytest.mark.parametrize(("name", "phases"), (("weights", 1), ("three phases and caps", 6)))
def test_control_random_draws_and_phases_that_begin_anew_are_off_by_more(name, phases):
    mixture = Mixture(KOALA, **MIXTURES[name])
    lengths = np.diff([*(phase.start for phase in mixture.phases), DRAWS])
    assert len(lengths) == phases
    rng = np.random.default_rng(0)
    at_random = [rng.choice(7, n, p=list(phase.shares.values())) for phase, n in zip(mixture.phases, lengths)]
    prefix, window = worst(errors(mixture, np.concatenate(at_random)))
    assert prefix > 100 and window > 100
    anew = np.concatenate([phase_anew(phase, n) for phase, n in zip(mixture.phases, lengths)])
    assert (worst(errors(mixture, anew))[0] > 1) == (phases > 1)


def phase_anew(phase, length):
    kept = [source for source, weight in enumerate(phase.weights.values()) if weight]
    cycle = np.array(kept)[tijdeman([weight for weight in phase.weights.values() if weight])]
    return np.resize(cycle, length)


def test_every_epoch_of_a_million_draws_is_a_permutation_whatever_weights_do(million):
    _, drawn = million
    assert (drawn.source.dtype, drawn.epoch.dtype, drawn.example.dtype) == (np.int32, np.int64, np.int64)
    for source, (name, size) in enumerate(KOALA.items()):
        of_source = drawn.source == source
        epoch, example = drawn.epoch[of_source], drawn.example[of_source]
        assert (epoch == np.arange(len(epoch)) // size).all()
        whole = len(epoch) // size
        assert (np.sort(example[: whole * size].reshape(whole, size)) == np.arange(size)).all()
        assert len(np.unique(example[whole * size :])) == len(epoch) - whole * size
        alone = Mixture({name: size}, seed=5).draw_many(range(len(epoch)))
        assert (alone.example == example).all() and (alone.epoch == epoch).all()


def test_a_run_goes_on_from_any_draw(million):
    make, drawn = million
    again = make()
    rng = np.random.default_rng(1)
    for start in [0, 300_000, *rng.integers(0, DRAWS, 5).tolist()]:
        stop = min(start + 200, DRAWS)
        rows = zip(*(array[start:stop].tolist() for array in drawn))
        assert [tuple(again.draw(k)) for k in range(start, stop)] == list(rows)
    anywhere = rng.integers(0, DRAWS, 3000)
    assert all((a == b[anywhere]).all() for a, b in zip(again.draw_many(anywhere), drawn))
    assert all(len(array) == 0 for array in again.draw_many([]))


TENTHS = ({"a": 9, "b": 5, "c": 1}, {"a": 0.3, "b": 0.6, "c": 0.1})


def test_draws_are_what_they_always_were():
    """The first 1000 of a few mixtures: every checkpoint depends on them."""
    for sizes, weights, seed, digest in [
        (KOALA, None, 0, "a264de401364f77a8073dc5f6cfa232d5b8d611696e3da2f5b22e450f4eb2c81"),
        (KOALA, MIXTURES["weights"]["weights"], 7, "954a817a691392a51013db8a7dbe7112994452cd6bca11d9852992cf662af06c"),
        (KOALA, MIXTURES["rounded"]["weights"], 1, "b67ed4abf6390d4ff5ca1f900c60d3d38ae6f17d9bdd8fdf8c74f42ba290e61c"),
        ({"a": 5}, None, 2, "6343d584075aa591fd326553f4b6c8d512e2b36b74fada95e737e5b0a8587309"),
        (TENTHS[0], TENTHS[1], 3, "203ecc5bcbe5ad91443973f855d4e2a103e8c88aa4280b8cf4f0904cb4bc55a7"),
    ]:
        mixture = Mixture(sizes, weights, seed)
        drawn = json.dumps([list(mixture.draw(k)) for k in range(1000)])
        assert hashlib.sha256(drawn.encode()).hexdigest() == digest


def test_caps_are_met_exactly_and_end_the_mixture():
    sizes = {"a": 30, "b": 7, "c": 100}
    mixture = Mixture(sizes, {"a": 1, "b": 3, "c": 2}, max_epochs={"a": 1.5, "b": 4, "c": 0.29})
    assert mixture.limits == {"a": 45, "b": 28, "c": 29}
    assert mixture.end == 45 + 28 + 29 and mixture.draws_for_epochs(9) == mixture.end
    drawn = mixture.draw_many(range(mixture.end))
    assert np.bincount(drawn.source).tolist() == [45, 28, 29] == list(mixture.counts(mixture.end).values())
    assert [(p.start, p.weights, p.used_up) for p in mixture.phases] == [
        (0, {"a": 1, "b": 3, "c": 2}, ()),
        (56, {"a": 1, "b": 0, "c": 2}, ("b",)),
        (72, {"a": 1, "b": 0, "c": 0}, ("b", "c")),
    ]
    assert mixture.phases[1].shares == {"a": 1 / 3, "b": 0, "c": 2 / 3}
    for phase, source in zip(mixture.phases[1:], (1, 2)):
        assert (drawn.source[phase.start :] != source).all() and (drawn.source[: phase.start] == source).any()
    for wrong in (lambda: mixture.draw(mixture.end), lambda: mixture.counts(mixture.end + 1), lambda: mixture.draw(-1),
                  lambda: mixture.draw_many(range(100, 103))):  # fmt: skip
        with pytest.raises(IndexError, match="0 to 101"):
            wrong()
    once = Mixture(sizes, max_epochs=dict.fromkeys(sizes, 1))
    assert once.end == 137 and len(once.phases) == 1 and once.counts(137) == sizes
    assert [once.draw(k) for k in range(137)] == [Mixture(sizes).draw(k) for k in range(137)]
    open_end = Mixture(sizes, max_epochs={"a": 1, "b": 2})
    assert open_end.end is None and open_end.counts(10**6) == {"a": 30, "b": 14, "c": 10**6 - 44}


def test_a_source_may_wait_and_leave():
    sizes = {"early": 20, "late": 30, "always": 10}
    mixture = Mixture(
        sizes,
        {"early": 2, "late": 0, "always": 1},
        schedule=[(100, {"early": 0, "late": 1, "always": 1}), (300, {})],
        seed=4,
    )
    drawn = mixture.draw_many(range(600))
    assert [p.start for p in mixture.phases] == [0, 100, 300]
    assert list(mixture.phases[2].weights.values()) == [2, 3, 1]
    late, early = np.flatnonzero(drawn.source == 1), np.flatnonzero(drawn.source == 0)
    assert 100 <= late[0] < 104 and np.sum((early >= 100) & (early < 300)) <= 1
    assert mixture.expected(300) == {"early": Fraction(200, 3), "late": 100, "always": Fraction(400, 3)}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**40))
def test_any_mixture_is_one_stream_of_permutations(data, seed):
    names = "abcde"[: data.draw(st.integers(1, 5))]
    sizes = {name: data.draw(st.integers(1, 40)) for name in names}
    weights = st.fixed_dictionaries({name: st.sampled_from([0.1, 0.25, 1, 3, 7.5]) for name in names})
    starts = sorted(data.draw(st.sets(st.integers(1, 400), max_size=3)))
    mixture = Mixture(
        sizes,
        data.draw(weights),
        seed,
        temperature=data.draw(st.sampled_from([1, 1, 2.0, math.inf])),
        schedule=[(start, data.draw(weights)) for start in starts],
        max_epochs=data.draw(st.dictionaries(st.sampled_from(names[1:] or "a"), st.sampled_from([9, 20.5])))
        if names[1:]
        else {},
    )
    drawn = mixture.draw_many(range(800))
    assert worst(errors(mixture, drawn.source))[0] < 1
    assert [tuple(mixture.draw(k)) for k in range(0, 800, 37)] == list(zip(*(array[::37].tolist() for array in drawn)))
    for source, (name, size) in enumerate(sizes.items()):
        turns = drawn.source == source
        alone = Mixture({name: size}, seed=seed).draw_many(range(turns.sum()))
        assert (alone.example == drawn.example[turns]).all() and (alone.epoch == drawn.epoch[turns]).all()
        assert len(set(zip(alone.epoch.tolist(), alone.example.tolist()))) == turns.sum()


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


def test_what_cannot_be_mixed_is_named():
    for sizes, weights, options, message in [
        ({}, None, {}, "no sources"),
        ({"a": 0}, None, {}, "'a': found 0 examples"),
        ({"a": 1}, {"b": 1}, {}, "found \\['b'\\]"),
        ({"a": 1, "b": 1}, {"a": 1}, {}, "found none for \\['b'\\]"),
        ({"a": 1, "b": 1}, {"a": 1, "b": 0}, {"max_epochs": {"a": 1}}, "found none for \\['b'\\]"),
        ({"a": 1, "b": 1}, {"a": 1}, {"schedule": [(5, {})]}, "found none for \\['b'\\]; .*0: it has no share"),
        ({"a": 1}, {"a": -1}, {}, "'a': -1"),
        ({"a": 1}, {"a": float("nan")}, {}, "nan"),
        ({"a": 1}, None, {"temperature": -1}, "temperature: found -1"),
        ({"a": 1}, None, {"schedule": [(0, {})]}, "schedule: .*\\[0\\]"),
        ({"a": 1}, None, {"schedule": [(5, {}), (5, {})]}, "schedule: .*\\[5, 5\\]"),
        ({"a": 1}, None, {"schedule": [(5.5, {})]}, "schedule: .*whole"),
        ({"a": 1, "b": 1}, {"a": 1, "b": 0}, {"schedule": [(5, {"a": 2, "b": 0})]}, "0 for \\['b'\\] in every phase"),
        ({"a": 1}, None, {"max_epochs": {"b": 1}}, "max_epochs: found \\['b'\\]"),
        ({"a": 1}, None, {"max_epochs": {"a": 0.5}}, "nothing to draw"),
        ({"a": 1, "b": 1}, {"a": 1, "b": 0}, {"schedule": [(5, {})], "max_epochs": {"a": 3}}, "after 3 draws"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixture(sizes, weights, **options)


def test_the_package_loads_no_jax():
    modules = ["tokenizers.tokenizer", "templates.template", "mixing.mixture", "batches.packing", "batches.loader"]
    code = "import sys, json\n" + "".join(f"import data_pipelines.{m}\n" for m in modules)
    code += "print(json.dumps([m for m in ('jax', 'grain', 'tensorflow', 'easylm_plus') if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []
