"""The stream of batches is the same however often it is interrupted and on however many processes it is made."""

import json
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from tiny_tokenizers import REAL, real_data, tiny

from data_pipelines import tokenize
from data_pipelines.batches.loader import POOL, Loader, evaluation_batches, merge_states
from data_pipelines.batches.packing import PACKINGS
from data_pipelines.batches.prefetch import Prefetch
from data_pipelines.batches.training_data import make_loader, open_data
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.mixing.mixture import Mixture
from data_pipelines.mixing.order import Order
from data_pipelines.prepare import prepare
from data_pipelines.templates.template import Example, load_template
from data_pipelines.workers import Workers

LENGTH = 32


def source(name, size, words):
    """Conversations of up to `words` words each."""
    texts = ["bees like honey " * (1 + i * 7 % words) for i in range(size)]
    return [Conversation(name, str(i), (Turn("user", "", 0.0), Turn("assistant", t, 1.0))) for i, t in enumerate(texts)]


def encode(conversation):
    """One id a word, no tokenizer; the id tells the conversation."""
    n = 2 + len(conversation.turns[-1].text.split())
    start = 10_000 * (conversation.source == "b") + 40 * int(conversation.id)
    ids = np.arange(start, start + n, dtype=np.int32)[: LENGTH + 1]
    return Example(ids, (np.arange(len(ids)) > 1).astype(np.float32), n - len(ids))


SOURCES = {"a": source("a", 47, 9), "b": source("b", 19, 3)}
SIZES = {"a": 47, "b": 19}


def loader(**options):
    defaults = {"batch_size": 4, "length": LENGTH, "pool": 12, "seed": 5, "manifest_hash": "h"}
    return Loader(options.pop("sources", SOURCES), options.pop("weights", None), options.pop("encode", encode),
                  **defaults | options)  # fmt: skip


def take(batches, number):
    return [next(batches) for _ in range(number)]


def require_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.examples == other.examples
        assert all((one.arrays[name] == other.arrays[name]).all() for name in other.arrays)


def joined(parts):
    """The batches of several processes side by side."""
    return [
        type(step[0])(
            {name: np.concatenate([part.arrays[name] for part in step]) for name in step[0].arrays},
            [row for part in step for row in part.examples],
        )
        for step in zip(*parts)
    ]


def rows_of(batch_size, processes):
    share = batch_size // processes
    return [range(i * share, (i + 1) * share) for i in range(processes)]


ORDERS = {
    "plain": {},
    "shards": {"shards": 8, "pool": 5},
    "weights": {"weights": {"a": 2, "b": 3}},
    "phases": {"weights": Mixture(SIZES, {"a": 1, "b": 1}, 5, schedule=[(61, {"a": 4, "b": 1}), (150, {})])},
    "used up": {"weights": Mixture(SIZES, {"a": 1, "b": 3}, 5, max_epochs={"b": 1.5})},
    **{packing: {"packing": packing} for packing in PACKINGS[1:]},
}


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
def test_resuming_is_exact(options):
    expected = take(loader(**options), 12)
    for at in (0, 1, 4, 7, 11):
        first = loader(**options)
        take(first, at)
        state = json.loads(json.dumps(first.get_state()))
        second = loader(**options)
        second.set_state(state)
        assert second.get_state() == state
        require_same(take(second, 12 - at), expected[at:])


@pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)
def test_any_step_is_found_by_lengths_alone(options):
    """From the beginning, from before, from after; also past the end of the data."""
    options = {"draws": 500, "pool": 8, **options}
    walking, expected = loader(**options), []
    states = [walking.get_state()]
    for batch in walking:
        expected.append(batch)
        states.append(walking.get_state())
    for start, step in [(0, 0), (0, 1), (0, 13), (5, 6), (3, len(expected)), (9, 4), (2, len(expected) - 1)]:
        seeking = loader(**options)
        seeking.set_state(json.loads(json.dumps(states[start])))
        told = []
        seeking.seek(step, lambda *counts, told=told: told.append(counts))
        assert seeking.get_state() == states[step]
        require_same(take(seeking, len(expected) - step), expected[step:])
        assert all(done <= total for done, total in told)
    past = loader(**options)
    past.seek(len(expected) + 5)
    assert next(past, None) is None


def test_seeking_tokenises_only_what_it_must():
    seen, counted = [], lambda c: seen.append(c.id) or encode(c)
    walking, seeking = loader(batch_size=2), loader(batch_size=2, encode=counted, cache_bytes=0)
    take(walking, 60)
    seeking.seek(60)
    passed = len(seen)
    assert passed <= 66, "each example once, however often it is drawn"
    require_same(take(seeking, 1), take(walking, 1))
    assert len(seen) - passed <= 2 * 12


@settings(max_examples=8, deadline=None)
@given(step=st.integers(0, 40), processes=st.sampled_from([1, 2, 4]))
@pytest.mark.parametrize("packing", PACKINGS)
def test_seeking_on_any_number_of_processes(packing, step, processes):
    options = {"packing": packing, "pool": 8}
    expected = take(loader(**options), step + 2)[step:]
    parts = [loader(rows=rows, **options) for rows in rows_of(4, processes)]
    for part in parts:
        part.seek(step)
    require_same(joined([take(part, 2) for part in parts]), expected)
    merged = merge_states([part.get_state() for part in parts])
    whole = loader(**options)
    take(whole, step + 2)
    assert merged == whole.get_state()


@settings(max_examples=20, deadline=None)
@given(
    shards=st.sampled_from([1, 2, 3, 8, 12, 16, 24]),
    counts=st.lists(st.sampled_from([1, 2, 4, 8]), max_size=4),
    order=st.sampled_from(list(ORDERS)),
)
def test_any_number_of_processes_makes_the_same_stream(shards, counts, order):
    options = {**ORDERS[order], "batch_size": 8, "shards": shards, "pool": 6}
    expected = take(loader(**options), 3 * len(counts))
    state = loader(**options).get_state()
    for i, processes in enumerate(counts):
        parts = [loader(rows=rows, **options) for rows in rows_of(8, processes)]
        for part in parts:
            part.set_state(state)
        require_same(joined([take(part, 3) for part in parts]), expected[3 * i : 3 * i + 3])
        state = json.loads(json.dumps(merge_states([part.get_state() for part in parts])))


def test_a_process_follows_its_own_shards_only():
    seen = []
    part = loader(batch_size=8, rows=range(2, 4), encode=lambda c: seen.append(c.id) or encode(c))
    take(part, 1)
    assert [p is None for p in part.get_state()["positions"]] == [i not in (2, 3) for i in range(8)]
    assert len(seen) < 2 * 12


def test_a_state_of_another_order_is_refused_field_by_field():
    state = loader().get_state()
    with pytest.raises(ValueError, match=r"batch_size: found 4, expected 8; shards: found 4, expected 8$"):
        loader(batch_size=8).set_state(state)
    for field, value in [("length", 64), ("seed", 6), ("pool", 13), ("manifest_hash", "other"), ("draws", 66)]:
        with pytest.raises(ValueError, match=f"{field}: found {state[field]}, expected {value}$"):
            loader(**{field: value}).set_state(state)
    with pytest.raises(ValueError, match=r"weights: found \[\['a', 47\], \['b', 19\]\], expected \[\['a', 1\]"):
        loader(weights={"a": 1, "b": 1}).set_state(state)
    with pytest.raises(ValueError, match="packing: found best_fit, expected none"):
        loader(packing="none").set_state(state)
    with pytest.raises(ValueError, match="version: found 0, expected 1"):
        loader().set_state({**state, "version": 0})
    for name, told in (("phases", r"\[\[61, \[4, 1\]\], \[150, \[47, 19\]\]\]"), ("used up", r"\[\[\d+, \[1, 0\]\]\]")):
        changed = loader(**ORDERS[name])
        with pytest.raises(ValueError, match=f"weights: found .*; changes: found nothing, expected {told}"):
            changed.set_state(state)
        with pytest.raises(ValueError, match=f"weights: found .*; changes: found {told}, expected nothing"):
            loader().set_state(changed.get_state())


def test_states_that_do_not_belong_together_are_refused():
    parts = [loader(rows=rows) for rows in rows_of(4, 2)]
    states = [part.get_state() for part in parts]
    with pytest.raises(ValueError, match=r"no positions for shards \[2, 3\]"):
        parts[1].set_state(states[0])
    next(parts[0])
    with pytest.raises(ValueError, match=r"differ in \['step'\]"):
        merge_states([parts[0].get_state(), states[1]])
    with pytest.raises(ValueError, match=r"shard 0 stands at \[0, 0\] and at \[7, 7\]"):
        merge_states([states[0], {**states[0], "positions": [[7, 7]] * 4}])
    broken = loader()
    broken.set_state({**loader().get_state(), "positions": [[0, 999]] * 4})
    with pytest.raises(ValueError, match="the state is at row 999 of a pool of"):
        next(broken)


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": "none"}, {"packing": "first_fit"}, {"shards": 8}, {"shards": 3}, {"pool": 1000}, {"pool": 1}],
)
def test_an_epoch_reads_everything_once_and_fills_up_with_empty_rows(options):
    whole = loader(draws=66, **options)
    batches = list(whole)
    seen = Counter(example for batch in batches for row in batch.examples for example in row)
    assert seen == Counter({(c.source, c.id): 1 for s in SOURCES.values() for c in s})
    assert whole.exhausted and next(whole, None) is None and any(batches[-1].examples)
    tokens = sum(len(encode(c).ids) - 1 for s in SOURCES.values() for c in s)
    assert sum(np.count_nonzero(b.arrays["segment_ids"]) for b in batches) == tokens
    stats = whole.stats()
    assert (stats["examples"], stats["tokens"], stats["dropped"]) == (66, tokens, {})
    assert stats["padding_share"] == pytest.approx(1 - tokens / (len(batches) * 4 * LENGTH))
    assert stats["loss_tokens"] == sum(np.count_nonzero(b.arrays["loss_weights"]) for b in batches)
    assert stats["sources"]["b"]["examples"] == 19
    assert stats["examples_cut"] == sum(encode(c).cut > 0 for s in SOURCES.values() for c in s)


def whole_example(conversation):
    """Nothing is cut: for rows that split."""
    n = 2 + len(conversation.turns[-1].text.split())
    ids = np.arange(10_000 * (conversation.source == "b") + 40 * int(conversation.id), 10**6, dtype=np.int32)[:n]
    return Example(ids, (np.arange(n) > 1).astype(np.float32))


def test_splitting_loses_nothing_and_says_what_it_split():
    """Rows of 7 of examples of 4 to 28 positions: every target once, in order, whatever row its piece is in."""
    batches = list(whole := loader(draws=66, length=7, packing="concat_split", encode=whole_example))
    found, pieces = Counter(), {}
    for batch in batches:
        for row, examples in enumerate(batch.examples):
            for segment, (name, number, *span) in enumerate(examples, start=1):
                here = batch.arrays["segment_ids"][row] == segment
                start, stop = span or (0, int(here.sum()))
                assert stop - start == here.sum()
                pieces.setdefault((name, number), []).append((start, stop))
                targets, weights = (batch.arrays[key][row, here].tolist() for key in ("targets", "loss_weights"))
                found.update(zip([name] * len(targets), targets, weights))
    expected = Counter()
    for conversations in SOURCES.values():
        for conversation in conversations:
            _, targets, weights = (array.tolist() for array in whole_example(conversation).row())
            expected.update(zip([conversation.source] * len(targets), targets, weights))
            own = sorted(pieces[conversation.source, conversation.id])
            assert [a for a, _ in own] == [0, *(b for _, b in own[:-1])] and own[-1][1] == len(targets)
    assert found == expected
    stats, split = whole.stats(), sum(len(own) > 1 for own in pieces.values())
    assert (stats["examples"], stats["examples_split"], stats["examples_cut"]) == (66, split, 0) and split > 20
    assert stats["loss_tokens"] == sum(weight > 0 for _, _, weight in expected.elements())
    parts = [
        loader(draws=66, length=7, packing="concat_split", encode=whole_example, rows=rows) for rows in rows_of(4, 2)
    ]
    require_same(joined([take(part, len(batches)) for part in parts]), batches)
    assert sum(part.stats()["examples_split"] for part in parts) == split


@pytest.mark.parametrize("packing", PACKINGS)
def test_phases_do_not_mix_in_rows_and_come_in_proportion(packing, monkeypatch):
    """Up to draw 200 there is no b, from then on nothing else: no row has both, and none of the second comes early."""
    mixture = Mixture(SIZES, {"a": 1, "b": 0}, 5, schedule=[(200, {"a": 0, "b": 1})])
    made = lambda: loader(weights=mixture, draws=400, packing=packing, batch_size=1, shards=1, pool=32)
    sources = lambda of: ["".join(sorted({name for name, *_ in row})) for batch in of for row in batch.examples]
    names = sources(rows := made())
    assert names == sorted(names) and set(names) == {"a", "b"}
    counts = rows.stats()["sources"]
    assert all(counts[name]["examples"] == pytest.approx(200, abs=1) for name in "ab")
    monkeypatch.setattr(mixture, "phases", mixture.phases[:1])  # control: pools that know of no phases
    names = sources(made())
    assert names != sorted(names)


def test_the_data_end_where_the_mixture_does():
    mixture = Mixture(SIZES, None, 5, max_epochs={"a": 2, "b": 1})
    whole = loader(weights=mixture)
    seen = Counter(example for batch in whole for row in batch.examples for example in row)
    assert seen == Counter({(c.source, c.id): 2 if name == "a" else 1 for name, s in SOURCES.items() for c in s})
    assert whole.exhausted and whole.get_state()["changes"][-1] == [2 * 47 + 19, []]


def test_a_mixture_of_other_sources_is_refused():
    with pytest.raises(ValueError, match="found one of other sources"):
        loader(weights=Mixture({"a": 47, "b": 20}))


def test_a_part_of_the_rows_goes_on_with_empty_batches_at_the_end():
    expected = list(loader(draws=66))
    parts = [loader(draws=66, rows=rows) for rows in rows_of(4, 2)]
    made = joined([take(part, len(expected) + 2) for part in parts])
    require_same(made[: len(expected)], expected)
    assert all(part.exhausted for part in parts)
    assert not any(array.any() for batch in made[len(expected) :] for array in batch.arrays.values())


def test_rows_say_where_they_come_from():
    for batch in take(loader(), 5):
        for row, examples in enumerate(batch.examples):
            for segment, (name, number) in enumerate(examples, start=1):
                here = batch.arrays["segment_ids"][row] == segment
                assert set(batch.arrays["source_ids"][row, here]) == {["a", "b"].index(name)}
                assert batch.arrays["inputs"][row, here][0] == 10_000 * (name == "b") + 40 * int(number)


def test_proportions_hold_although_one_source_fills_rows_faster(monkeypatch):
    sources = {"a": source("a", 40, 1), "b": [Conversation("b", str(i), source("b", 1, 1)[0].turns) for i in range(40)]}
    long = lambda c: Example(np.arange(30, dtype=np.int32), np.ones(30, np.float32)) if c.source == "a" else encode(c)

    def share(kind):
        batches = kind(sources, {"a": 1, "b": 1}, long, batch_size=4, length=LENGTH, pool=16)
        take(batches, 150)
        stats = batches.stats()
        return stats["sources"]["a"]["examples"] / stats["examples"]

    assert share(Loader) == pytest.approx(0.5, abs=0.03)
    unrotated = lambda order, chunk: np.zeros(1024, np.int32)  # control: shard s takes the draws k = s (mod S)
    monkeypatch.setattr(Order, "_rotations", unrotated)
    assert share(Loader) < 0.3


def test_rows_of_a_pool_are_not_in_the_order_of_their_length():
    first = loader(sources={"a": SOURCES["a"]}, batch_size=1, pool=47, draws=47, packing="none")
    lengths = [np.count_nonzero(batch.arrays["segment_ids"]) for batch in first]
    assert sorted(lengths) != lengths != sorted(lengths, reverse=True)
    best_fit = loader(sources={"a": SOURCES["a"]}, batch_size=1, pool=47, draws=47)
    longest = [np.bincount(batch.arrays["segment_ids"][0])[1:].max() for batch in best_fit]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.6  # sorted: -0.95


def test_shards_do_not_all_tokenise_in_the_same_step():
    seen, made = [], []
    batches = loader(batch_size=8, pool=64, cache_bytes=0, encode=lambda c: seen.append(c.id) or encode(c))
    for _ in range(12):
        seen.clear()
        next(batches)
        made.append(len(seen))
    assert made[0] < 8 * 64 * 0.6 and max(made[1:]) <= 4 * 64


def test_what_carries_no_loss_is_dropped_and_counted():
    half = lambda c: None if int(c.id) % 2 else encode(c)
    some = loader(draws=66, encode=half)
    names = [example for batch in some for row in batch.examples for example in row]
    assert len(names) == 24 + 10 and all(int(number) % 2 == 0 for _, number in names)
    assert some.stats()["dropped"] == {"no loss tokens": 23 + 9}
    assert some.stats()["sources"]["b"]["dropped"] == {"no loss tokens": 9}
    assert list(loader(draws=66, encode=lambda c: None)) == []
    with pytest.raises(ValueError, match="draws in a row left nothing that carries loss"):
        next(loader(encode=lambda c: None, pool=1000))
    with pytest.raises(ValueError, match="draws in a row left nothing that carries loss"):
        loader(encode=lambda c: None, pool=1000).seek(3)


def test_later_epochs_come_from_the_cache():
    calls = []
    counting = lambda c: calls.append((c.source, c.id)) or encode(c)
    expected = list(loader(draws=132, encode=counting))
    assert len(calls) == len(set(calls)) == 66
    calls.clear()
    require_same(list(loader(draws=132, encode=counting, cache_bytes=0)), expected)
    assert len(calls) > 100


def test_with_a_real_template_and_all_at_once():
    template = load_template("koala", tiny("bytes"), max_length=65)
    together = Loader(SOURCES, None, template, batch_size=2, length=64, pool=8, draws=66)
    one_by_one = Loader(SOURCES, None, template.encode, batch_size=2, length=64, pool=8, draws=66)
    require_same(list(together), list(one_by_one))
    assert together.stats()["examples"] > 0


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"pool": 0}, {"rows": range(0)}, {"rows": range(3, 5)}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        loader(**wrong)


# --- prefetching


def test_prefetching_gives_the_same_batches_each_with_its_own_state():
    expected = list(loader(draws=66))
    with Prefetch(loader(draws=66), depth=3) as ahead:
        pairs = list(ahead)
        assert next(ahead, "end") == "end"
    require_same([batch for batch, _ in pairs], expected)
    resumed = loader(draws=66)
    resumed.set_state(pairs[2][1])
    require_same(list(resumed), expected[3:])


def test_prefetching_passes_errors_on_and_can_be_closed_at_any_time():
    def failing(conversation):
        if int(conversation.id) == 30:
            raise OSError("disk gone")
        return encode(conversation)

    before = set(threading.enumerate())
    with Prefetch(loader(encode=failing)) as ahead, pytest.raises(OSError, match="disk gone"):
        for _ in ahead:
            pass
    for depth in (1, 5):
        ahead = Prefetch(loader(), depth)
        next(ahead)
        time.sleep(0.02)
        ahead.close()
        ahead.close()
        with pytest.raises(ValueError, match="closed"):
            next(ahead)
    assert set(threading.enumerate()) <= before


# --- evaluation


@pytest.mark.parametrize("packing", ["best_fit", "first_fit", "none"])
def test_evaluation_sees_every_example_once_in_every_process(packing):
    options = {"batch_size": 4, "length": LENGTH, "packing": packing, "pool": 7}
    batches = list(evaluation_batches(SOURCES, encode, **options))
    seen = Counter(example for batch in batches for row in batch.examples for example in row)
    assert seen == Counter({(c.source, c.id): 1 for s in SOURCES.values() for c in s})
    assert all(batch.arrays["inputs"].shape == (4, LENGTH) for batch in batches)
    assert all(all(batch.examples) for batch in batches[:-1])
    require_same(list(evaluation_batches(SOURCES, encode, **options)), batches)
    parts = [list(evaluation_batches(SOURCES, encode, rows=rows, **options)) for rows in rows_of(4, 2)]
    require_same(joined(parts), batches)


def test_evaluation_of_a_few_and_of_none():
    few = list(evaluation_batches(SOURCES, encode, batch_size=4, length=LENGTH, limit_per_source=3))
    names = sorted(example for batch in few for row in batch.examples for example in row)
    assert names == [(s, str(i)) for s in "ab" for i in range(3)] and few[-1].examples[-1] == []
    assert list(evaluation_batches(SOURCES, lambda c: None, batch_size=4, length=LENGTH)) == []
    assert list(evaluation_batches({"a": []}, encode, batch_size=4, length=LENGTH)) == []


class TestRealFiles:
    pytestmark = real_data

    def test_the_koala_mixture_fills_rows_of_2048(self, tmp_path):
        """Half an epoch with the default pool; with a quarter of it, the control, rows are not so full."""
        text = (Path(__file__).parents[3] / "configs/data/koala.py").read_text("utf-8")
        config = {"__name__": "koala"}
        exec(text, config)
        settings = {**config["get_config"]().to_dict(), "missing": "skip"}
        for options in settings["sources"].values():
            options.pop("stages", None)  # what is left out changes little
        prepare(ConfigDict({**settings, "stages": {}}), REAL / "koala", tmp_path / "data")
        tokenizer = str(REAL / "tokenizers" / "llama2_sp32000")
        with Workers(1) as pool:
            tokenize.tokenise(tokenize.Job(str(tmp_path / "data"), "koala", tokenizer, 2048), pool)
        section = {"path": str(tmp_path / "data"), "sources": (), "tokenizer": tokenizer, "template": "koala",
                   "length": 2048, "batch_size": 8, "packing": "best_fit", "shards": 0}  # fmt: skip
        data = open_data(section)
        assert len(data.tokens) == len(data.train) == 7

        def padding(pool):
            loader = make_loader({**section, "pool": pool}, data, 0)
            for _ in range(300):
                next(loader)
            return loader.stats()["padding_share"]

        assert padding(POOL) <= 0.01 < padding(POOL // 4)
        plain = make_loader({**section, "pool": POOL}, data._replace(tokens={}), 0)
        require_same(take(plain, 3), take(make_loader({**section, "pool": POOL}, data, 0), 3))
