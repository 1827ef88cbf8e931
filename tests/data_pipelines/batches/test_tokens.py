"""Stored tokens are those that would be made, wherever the writing was interrupted, and are found by what made them."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ml_collections import ConfigDict
from tiny_tokenizers import tiny

from data_pipelines import datasets, tokenize
from data_pipelines.batches import tokens
from data_pipelines.batches.loader import Loader, merge_states
from data_pipelines.batches.packing import PACKINGS
from data_pipelines.batches.tokens import TokenStore, from_record, store_path, to_record, write_part, write_tokens
from data_pipelines.batches.training_data import Unopened, heldout_batches, make_loader, open_data
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.datasets import DatasetError
from data_pipelines.prepare import prepare
from data_pipelines.templates.template import Example, load_template
from data_pipelines.workers import Workers

TOKENIZER = tiny("bytes")
TEMPLATE = load_template("koala", TOKENIZER, max_length=65)


def conversations(size, name="a"):
    """Every seventh has nothing to learn; some are longer than a row; ids with what JSON escapes."""
    text = lambda i: "bees like honey " * (1 + i % 9)
    weight = lambda i: 0.0 if i % 7 == 3 else (1.0, 0.5)[i % 2]
    turns = lambda i: (Turn("user", f"{i}?", 0.0), Turn("assistant", text(i), weight(i))) * (1 + i % 3)
    return [Conversation(name, f'ü"{i}', turns(i)) for i in range(size)]


SOURCES = {"a": conversations(50), "b": conversations(23, "b")}


def store(folder, source, size=None, template=TEMPLATE):
    path = store_path(folder, source[0].source, "train", "hash", template)
    write_tokens(source[:size], template, path, "hash")
    return TokenStore(path)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(tokens, "PART", 20)


@settings(max_examples=200, deadline=None)
@given(
    ids=arrays.arrays(np.int32, st.integers(1, 60), elements=st.integers(0, 65535)),
    data=st.data(),
    cut=st.integers(0, 2**32 - 1),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    dtype=st.sampled_from(("<u2", "<u4")),
)
def test_a_record_gives_back_every_bit(ids, data, cut, name, dtype):
    weights = st.sampled_from((0.0, 1.0, 0.1, float(np.nextafter(np.float32(1), np.float32(2)))))
    example = Example(ids, data.draw(arrays.arrays(np.float32, len(ids), elements=weights)), cut)
    found, again = from_record(to_record(name, example, dtype), np.dtype(dtype))
    assert (found, again.cut, again.targets) == (name, cut, None)
    assert (again.ids.dtype, again.weights.dtype) == (np.int32, np.float32)
    assert again.ids.tobytes() == ids.tobytes() and again.weights.tobytes() == example.weights.tobytes()


def test_a_record_of_nothing_and_records_that_are_none():
    assert from_record(to_record("x", None, "<u2"), np.dtype("<u2"))[1].ids.tolist() == []
    record = to_record("name", Example(np.arange(9, dtype=np.int32), np.ones(9, np.float32)), "<u2")
    for broken in (b"", record[:15], record[:-1], record + b"x"):
        with pytest.raises(ValueError, match="bytes; expected"):
            from_record(broken, np.dtype("<u2"))
    with pytest.raises(ValueError, match="runs of 4294967295 weights; expected 9"):
        from_record(record[:16] + b"\xff" * 4 + record[20:], np.dtype("<u2"))


@pytest.mark.parametrize("packing", ("best_fit", "first_fit", "concat_split", "none"))
def test_batches_from_a_store_are_the_same_bits(tmp_path, small_parts, packing):
    template = load_template("koala", TOKENIZER, max_length=None if packing == "concat_split" else 65)
    stores = {name: store(tmp_path, source, template=template) for name, source in SOURCES.items()}
    options = {"batch_size": 4, "length": 64, "pool": 12, "packing": packing, "seed": 5, "draws": 200}
    plain = Loader(SOURCES, {"a": 1, "b": 2}, template, **options)
    for read in (stores, {**stores, "b": SOURCES["b"]}):  # all of it stored, and one source of two
        stored = Loader(read, {"a": 1, "b": 2}, template, **options)
        expected, found = list(plain), list(stored)
        assert len(found) == len(expected) > 5
        for one, other in zip(found, expected):
            assert one.examples == other.examples
            assert all(one.arrays[name].tobytes() == other.arrays[name].tobytes() for name in other.arrays)
        assert stored.stats() == plain.stats() and stored.get_state() == plain.get_state()
        plain = Loader(SOURCES, {"a": 1, "b": 2}, template, **options)
    assert plain.stats() != stored.stats() and stored.stats()["dropped"]["no loss tokens"] > 10
    assert (stored.stats()["examples_split"] > 0) == (packing == "concat_split")
    assert (stored.stats()["examples_cut"] > 0) == (packing != "concat_split")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("processes", (1, 2, 4))
def test_any_step_on_any_number_of_processes(tmp_path, packing, processes):
    """States of a run that tokenised are those of one that does not, and the other way round."""
    template = load_template("koala", TOKENIZER, max_length=None if packing == "concat_split" else 65)
    stores = {name: store(tmp_path, source, template=template) for name, source in SOURCES.items()}
    made = lambda sources, rows=None: Loader(
        sources, None, template, batch_size=4, length=64, pool=12, packing=packing, seed=5, rows=rows
    )
    expected = [next(plain) for plain in [made(SOURCES)] for _ in range(9)]
    rows = [range(i * 4 // processes, (i + 1) * 4 // processes) for i in range(processes)]
    for step in (0, 3, 7):
        parts = [made(stores, each) for each in rows]
        for part in parts:
            part.seek(step)
        state = merge_states([part.get_state() for part in parts])
        resumed = made(SOURCES)
        resumed.set_state(state)
        for batch in expected[step : step + 2]:
            examples = [row for part in parts for row in next(part).examples]
            assert examples == batch.examples == next(resumed).examples


def test_lengths_and_files(tmp_path, small_parts):
    kept = store(tmp_path, SOURCES["a"])
    examples = TEMPLATE.encode_many(SOURCES["a"])
    assert len(kept) == 50 and sum(example is None for example in examples) == 7
    expected = [0 if example is None else example.positions for example in examples]
    assert kept.positions(np.arange(50)).tolist() == expected and kept.positions(np.array([49, 1, 1])).tolist() == [
        expected[i] for i in (49, 1, 1)
    ]
    lengths = np.load(kept.path / "lengths.npy")
    assert lengths[:, 1].tolist() == [0 if e is None else np.count_nonzero(e.weights[1:]) for e in examples]
    assert sorted(path.name for path in kept.path.iterdir()) == [
        "lengths.npy", "meta.json", *(f"tokens-{part:05d}.array_record" for part in range(3))]  # fmt: skip
    meta = json.loads((kept.path / "meta.json").read_text())
    assert (meta["dtype"], meta["examples"], meta["ids"]) == ("<u2", 50, int(lengths[:, 0].sum())) and kept.ids == meta[
        "ids"
    ]
    for index in (0, 19, 20, 49):
        name, example = kept.read(index)
        assert name == SOURCES["a"][index].id and example.ids.tolist() == examples[index].ids.tolist()
    empty = tmp_path / "empty"
    write_tokens([], TEMPLATE, empty, "hash")
    assert len(TokenStore(empty)) == 0


def test_what_the_key_depends_on(tmp_path, monkeypatch):
    path = lambda template=TEMPLATE, split="hash": store_path(tmp_path, "a", "train", split, template)
    other = tiny("objectives")
    others = [
        path(split="other"),
        path(load_template("koala", TOKENIZER, max_length=64)),
        path(load_template("koala", TOKENIZER, max_length=None)),
        path(load_template("text", TOKENIZER, max_length=65)),
        path(load_template("koala", other, max_length=65)),
    ]
    same, named = path(load_template("koala", tiny("bytes"), max_length=65)), copy.copy(TOKENIZER)
    named.special_tokens = {**named.special_tokens, "<new>": 7}
    assert path() == same
    assert len({path(), path(load_template("koala", named, max_length=65)), *others}) == 7
    monkeypatch.setattr(tokens, "code_of", lambda module: "changed")
    assert path() != same


def test_a_killed_writer_goes_on_with_the_next_part(tmp_path, small_parts, monkeypatch):
    expected = store(tmp_path / "whole", SOURCES["a"])
    path = store_path(tmp_path / "killed", "a", "train", "hash", TEMPLATE)
    seen = []

    class Killed(Exception):
        pass

    class Dying(type(TEMPLATE)):
        def encode_many(self, some):
            if seen and seen[-1] == 'ü"20':
                raise Killed
            seen.extend(conversation.id for conversation in some[:1])
            return super().encode_many(some)

    with pytest.raises(Killed):
        write_tokens(SOURCES["a"], Dying(TOKENIZER, 65, False, "koala"), path, "hash")
    assert not path.exists() and path.with_name(f"{path.name}.tmp").exists()
    made = []
    plain = type(TEMPLATE).encode_many
    monkeypatch.setattr(type(TEMPLATE), "encode_many", lambda self, some: made.extend(some) or plain(self, some))
    write_tokens(SOURCES["a"], TEMPLATE, path, "hash")
    assert [conversation.id for conversation in made] == [conversation.id for conversation in SOURCES["a"][40:]]
    again = TokenStore(path)
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in expected.path.iterdir()), "no strays"
    records = lambda of: [(name, e.ids.tobytes(), e.weights.tobytes(), e.cut) for name, e in map(of.read, range(50))]
    assert records(again) == records(expected)
    write_tokens(SOURCES["a"], TEMPLATE, path, "hash")
    assert len(made) == 10, "a complete store is left alone"


def damage(path, kind):
    part = path / "tokens-00000.array_record"
    if kind == "short":
        part.write_bytes(part.read_bytes()[:-100])
    elif kind == "missing":
        part.unlink()
    elif kind == "flipped":
        content = part.read_bytes()
        at = content.index(SOURCES["a"][7].id.encode())
        part.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    elif kind == "lengths":
        np.save(path / "lengths.npy", np.zeros((3, 2), np.int32))
    else:
        (path / "meta.json").write_text("{}")


@pytest.mark.parametrize("kind", ("short", "missing", "flipped", "lengths", "meta"))
def test_damage_is_found(tmp_path, small_parts, kind):
    kept = store(tmp_path, SOURCES["a"])
    damage(kept.path, kind)
    with pytest.raises(DatasetError, match=r"damaged|expected a file of .* bytes"):
        again = TokenStore(kept.path)
        for index in range(50):
            again.read(index)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(tokens, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="No space left"):
        write_part(SOURCES["a"], TEMPLATE, tmp_path / "x", 0)


# --- beside prepared data ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    source = lambda task: {"kind": "exact", "tasks": (task,), "train": 70, "heldout": 9}
    tokenizer = {"train": True, "vocab_size": 300, "special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
    sources = {"sums": source("addition"), "letters": source("reversal")}
    path = tmp_path_factory.mktemp("data") / "data"
    prepare(ConfigDict({"sources": sources, "tokenizer": tokenizer}), None, path)
    return path


SECTION = {"sources": (), "tokenizer": "", "template": "chat", "length": 64, "batch_size": 4, "packing": "best_fit",
           "pool": 20, "shards": 0}  # fmt: skip


def job(path, **values):
    return tokenize.Job(str(path), **{"template": "chat", "tokenizer": "", "length": 64} | values)


def tokenised(wanted, processes=1):
    with Workers(processes) as pool:
        return tokenize.tokenise(wanted, pool)


def digests(section):
    data = open_data(section)
    loader = make_loader(section, data, 3)
    every = [*(next(loader) for _ in range(8)), *heldout_batches(section, data, 5)]
    return data, [[array.tobytes() for array in batch.arrays.values()] for batch in every]


@pytest.mark.parametrize("processes", (1, 2))
def test_the_command_and_what_finds_its_stores(prepared, tmp_path, processes, monkeypatch):
    section = {**SECTION, "path": str(prepared)}
    plain, expected = digests(section)
    assert not plain.tokens
    try:
        paths = tokenised(job(prepared), processes)
        assert len(paths) == 4 and all(path.is_dir() for path in paths)
        stored, found = digests(section)
        assert list(stored.tokens) == ["letters", "sums"] == list(stored.heldout_tokens)
        assert found == expected and stored.hash == plain.hash
        assert isinstance(stored.train["sums"], Unopened) and stored.train["sums"][3] == plain.train["sums"][3]
        for other in ({"length": 32}, {"packing": "concat_split"}):
            assert not (other_rows := open_data({**section, **other})).tokens, "made for other rows"
            assert other_rows.unused_tokens == ("letters", "sums")
        assert (
            list(open_data({**section, "fim_rate": 0.0}).tokens)
            and not open_data({**section, "corruption": "masked", "mask_token": "300"}).tokens
        ), "what changes from epoch to epoch is never stored"
        monkeypatch.setattr(datasets, "open_source", lambda *place: pytest.fail("conversations are not needed"))
        next(make_loader(section, open_data(section), 3))
    finally:
        shutil.rmtree(prepared / "tokens")


def test_training_examples_are_whole_where_packing_splits_and_held_out_ones_are_not(prepared):
    section = {**SECTION, "path": str(prepared), "length": 20, "packing": "concat_split"}
    try:
        tokenised(job(prepared, length=20, packing="concat_split"))
        data = open_data(section)
        assert set(data.tokens) == set(data.heldout_tokens) == {"letters", "sums"}
        longest = lambda stores: max(s.positions(np.arange(len(s))).max() for s in stores.values())
        assert longest(data.tokens) > 20 == longest(data.heldout_tokens)
    finally:
        shutil.rmtree(prepared / "tokens")


def test_a_killed_command_goes_on(prepared, tmp_path):
    """Killed as soon as a first file is there; the second run completes what the first began."""
    command = [
        sys.executable,
        "-m",
        "data_pipelines.tokenize",
        str(prepared),
        "--template=chat",
        "--length=64",
        "--workers=1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while process.poll() is None and not list(prepared.glob("tokens/*/*.tmp/tokens-*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        second = subprocess.run(command, capture_output=True, text=True, check=True)
        assert second.stdout.count("70 examples") == 2 and second.stdout.count("9 examples") == 2
        assert not list(prepared.glob("tokens/*/*.tmp"))
        assert open_data({**SECTION, "path": str(prepared)}).tokens.keys() == {"letters", "sums"}
    finally:
        shutil.rmtree(prepared / "tokens")


def test_masked_spans_are_not_split_from_their_text(prepared):
    with pytest.raises(ValueError, match=r"data\.packing = 'concat_split': expected another one"):
        open_data({**SECTION, "path": str(prepared), "packing": "concat_split", "corruption": "spans"})


@pytest.mark.parametrize(
    ("values", "message"),
    [({"sources": ("sum",)}, "data.sources: found 'sum'"), ({"template": "nothing"}, "template: found 'nothing'")],
)
def test_wrong_options_are_named(prepared, values, message):
    with pytest.raises(ValueError, match=message):
        tokenised(dataclasses.replace(job(prepared), **values))
