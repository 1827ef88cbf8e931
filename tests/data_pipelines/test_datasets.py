"""What is written is what is read, in order; damage is noticed and named."""

import dataclasses
import hashlib
import itertools
import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_tokenizers import tiny

from data_pipelines import datasets, inspect
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.datasets import DatasetError, open_source, read_manifest, records_of, write_manifest, write_source
from data_pipelines.stages.chunk import Sample
from data_pipelines.templates.template import load_template
from data_pipelines.templates.text_objective import text_objective


def conversations(count, text="tell é"):
    """Ids in an order that neither sorting nor hashing would give."""
    for i in range(count):
        turns = Turn("user", f"ask {i}", 0.0), Turn("assistant", text, 0.5, helpful=bool(i % 2))
        yield Conversation("chat", f"{(i * 7) % count}", turns)


def prepared(folder, splits):
    entry = {"rows": 9, "kept_rows": 7, "rejected": {"tie": 2}, "repaired": {}, "weight": 0, "files": []}
    entry["splits"] = write_source(folder, "chat", itertools.chain(*itertools.starmap(records_of, splits.items())))
    left = sum(split["examples"] for split in entry["splits"].values())
    entry["stages"] = {"split": {"entered": left, "left": left, "dropped": {}}}
    return write_manifest(folder, {"sources": {"chat": entry}, "tokenizer": None})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "out"
    folder.mkdir()
    prepared(folder, {"train": conversations(2500), "heldout": iter(())})
    return folder


def test_round_trip_in_order(folder):
    train = open_source(folder, "chat", "train")
    expected = list(conversations(2500))
    assert len(train) == 2500
    assert train[:] == expected
    assert (train[7], train[-1], train[10:13]) == (expected[7], expected[-1], expected[10:13])
    assert list(open_source(folder, "chat", "heldout")) == []
    with pytest.raises(IndexError, match="found index 2500; expected one of 2500"):
        train[2500]


def test_comparisons_are_opened_as_pairs(tmp_path):
    def half(number, end):
        return Conversation("chat", f"x:{number}:{end}", (Turn("assistant", end, 1.0, helpful=end == "chosen"),))

    pairs = [(half(i, "chosen"), half(i, "rejected")) for i in range(5)]
    prepared(tmp_path, {"train": [c for pair in pairs for c in pair], "heldout": iter([half(1, "chosen")])})
    opened = datasets.open_pairs(tmp_path, "chat", "train")
    assert (len(opened), list(opened), opened[-1], opened[1:3]) == (5, pairs, pairs[-1], pairs[1:3])
    with pytest.raises(DatasetError, match="found 1 examples; expected pairs"):
        datasets.open_pairs(tmp_path, "chat", "heldout")


def test_what_is_no_comparison_is_not_opened_as_pairs(folder):
    with pytest.raises(DatasetError, match=r"found 0 and 7; expected the two halves of a comparison"):
        datasets.open_pairs(folder, "chat", "train")[0]


def test_a_line_that_was_read_is_written_again_and_a_changed_conversation_is_not():
    (fresh,) = conversations(1, "tab\t, break\n, \u2028")
    kept = Conversation.from_line(fresh.to_json())
    assert (kept, kept.to_json()) == (fresh, fresh.to_json())
    renamed, expected = (dataclasses.replace(each, id="other") for each in (kept, fresh))
    assert renamed.to_json() == expected.to_json() != kept.to_json()
    sample = Sample("0", (kept, renamed), "train")
    assert Sample.from_line(sample.to_line()) == sample
    assert "\n" not in sample.to_line() and pickle.loads(pickle.dumps(sample)) == sample


def test_a_dataset_survives_pickling(folder):
    train = pickle.loads(pickle.dumps(open_source(folder, "chat", "train")))
    assert train[3] == open_source(folder, "chat", "train")[3]


def test_tfds_alone_can_read_it(folder):
    import tensorflow_datasets as tfds

    source = tfds.data_source("chat", split="train", data_dir=folder)
    assert Conversation.from_json(source[5]["conversation"]) == open_source(folder, "chat", "train")[5]


@given(text=st.one_of(st.text(), st.sampled_from([127, 128, 16_383, 16_384, 3_000_000]).map("é".__mul__)))
def test_an_example_is_what_tfds_makes(text):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict({datasets.FEATURE: tfds.features.Text()})
    record = datasets.serialised(text.encode())
    made = ExampleSerializer(features.get_serialized_info()).serialize_example
    assert record == made(features.encode_example({datasets.FEATURE: text}))
    assert datasets.text_of(record).decode() == text
    for damaged in (record[:-1], record + b"x", b"", b"\n", record[1:], record.replace(b"conv", b"vonc", 1)):
        with pytest.raises(ValueError, match="found"):
            datasets.text_of(damaged)


def test_manifest_counts_and_hashes(folder):
    manifest = read_manifest(folder)
    split = manifest["sources"]["chat"]["splits"]["train"]
    lines = [conversation.to_json() + "\n" for conversation in conversations(2500)]
    assert split["examples"] == 2500
    assert split["characters"] == sum(len(f"ask {i}") + len("tell é") for i in range(2500))
    assert split["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert manifest["hash"] == datasets.manifest_hash(manifest)


def test_one_record_changes_the_hash_and_repetition_does_not(tmp_path):
    def hash_of(name, rows):
        (tmp_path / name).mkdir()
        return prepared(tmp_path / name, {"train": rows, "heldout": iter(())})["hash"]

    rows = list(conversations(20))
    first = hash_of("first", rows)
    assert hash_of("again", rows) == first
    changed = [*rows[:-1], Conversation("chat", rows[-1].id, (Turn("text", "other", 1.0),))]
    assert hash_of("changed", changed) != first
    assert hash_of("swapped", [rows[1], rows[0], *rows[2:]]) != first
    weighted = json.loads((tmp_path / "first/manifest.json").read_text())
    weighted["sources"]["chat"]["weight"] = 3
    assert datasets.manifest_hash(weighted) != first
    weighted["sources"]["chat"]["weight"] = 0
    weighted["sources"]["chat"]["splits"]["train"]["shards"] = {}  # depend on the version of the compression
    assert datasets.manifest_hash(weighted) == first


def test_many_shards_are_one_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SHARD", 8)
    prepared(tmp_path, {"train": conversations(50), "heldout": conversations(3)})
    assert len(read_manifest(tmp_path)["sources"]["chat"]["splits"]["train"]["shards"]) == 7
    assert list(open_source(tmp_path, "chat", "train")) == list(conversations(50))
    assert list(open_source(tmp_path, "chat", "heldout")) == list(conversations(3))


def test_accounts_must_add_up(tmp_path):
    filtered = {"entered": 9, "left": 6, "dropped": {"short": 3}}
    right = {"rows": 9, "kept_rows": 7, "rejected": {"tie": 2}, "splits": {"train": {"examples": 6}}}
    right |= {"stages": {"filter": filtered, "split": {"entered": 6, "left": 6, "dropped": {}}}}
    datasets.check_accounts("chat", right)
    wrong = {
        "9 rows, 7 kept, 1 rejected": {**right, "rejected": {"tie": 1}},
        "filter: 9 entered, 6 left, 2 dropped": {
            **right,
            "stages": {**right["stages"], "filter": {**filtered, "dropped": {"short": 2}}},
        },
        "6 left split, 5 entered write": {**right, "splits": {"train": {"examples": 5}}},
        "6 left filter, 7 entered split": {
            **right,
            "stages": {**right["stages"], "split": {"entered": 7, "left": 7, "dropped": {}}},
        },
    }
    for message, entry in wrong.items():
        with pytest.raises(RuntimeError, match=f"chat: {message}|chat, {message}"):
            write_manifest(tmp_path, {"sources": {"chat": entry}})


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(DatasetError, match="nowhere: found no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"manifest\.json: found no file"):
        read_manifest(tmp_path)
    with pytest.raises(DatasetError, match=r"source: found 'chatt'; expected one of chat; did you mean 'chat'\?"):
        open_source(folder, "chatt", "train")
    with pytest.raises(DatasetError, match=r"split of chat: found 'held_out'.*did you mean 'heldout'"):
        open_source(folder, "chat", "held_out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-30], "damaged manifest"),
        (lambda text: "[]", "damaged manifest"),
        (lambda text: text.replace('"rows": 9', '"rows": 10'), "found the hash"),
        (lambda text: text.replace('"version": 2', '"version": 1'), "found version 1; expected 2"),
    ],
)
def test_damaged_manifest(tmp_path, change, message):
    prepared(tmp_path, {"train": conversations(3), "heldout": iter(())})
    path = tmp_path / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DatasetError, match=message):
        read_manifest(tmp_path)


def test_damaged_shards(tmp_path):
    prepared(tmp_path, {"train": conversations(300), "heldout": iter(())})
    (shard,) = (tmp_path / "chat").rglob("*array_record*")
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=rf"{shard.name}: found [\d,]+ bytes; expected {len(data):,} bytes"):
        open_source(tmp_path, "chat", "train")
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 255  # the size is right, the content is not
    shard.write_bytes(flipped)
    train = open_source(tmp_path, "chat", "train")
    with pytest.raises(DatasetError, match=r"example .* is damaged"):
        list(train)
    with pytest.raises(DatasetError, match=r"example \d+ is damaged"):
        train[:]
    shard.unlink()
    with pytest.raises(DatasetError, match="found no file"):
        open_source(tmp_path, "chat", "train")


def screen(renderable):
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_inspect_shows_text_as_it_is_and_learned_text_green():
    evil = "[red]x[/red] [/] \x1b]0;title\x07 \u202e [link=file:///]y[/link]"
    conversation = Conversation("chat", "[b]1[/b]", (Turn("user", evil, 0.0), Turn("assistant", "yes", 1.0)))
    shown = screen(inspect.rendered(conversation))
    assert "[red]x[/red] [/] ␛]0;title␇ \ufffd [link=file:///]y[/link]" in shown
    assert "[b]1[/b]" in shown
    assert "\x1b]" not in shown and "\u202e" not in shown
    assert "\x1b[32myes" in shown
    assert "\x1b[32m[red]" not in shown


def test_inspect_shows_examples_with_what_is_learned():
    tokenizer = tiny("objectives")
    template = load_template("text", tokenizer, max_length=65)
    bees = Conversation("docs", "1", (Turn("text", "bees like honey and the moon, too", 1.0),))
    shown = {}
    for name, options in {"none": {}, "spans": {"sentinels": "420:430"}, "masked": {}}.items():
        learned = text_objective(template, corruption=name, **options)
        (group,) = inspect.examples([bees], "docs", range(1), learned)
        shown[name] = screen(group)
    green = "\x1b[32m"
    assert f"{green}bees like honey and the moon, too<eos>" in shown["none"]
    assert re.search(rf"<420>.*<eos>.*{re.escape(green)}<420>.*<eos>", shown["spans"])
    assert re.search(rf"{re.escape(green)}\[<mask>→\w+\]", shown["masked"])


def test_inspect_table_has_every_source_and_reason(folder):
    manifest = read_manifest(folder)
    manifest["sources"]["[b]odd[/b]"] = manifest["sources"]["chat"]
    shown = screen(inspect.manifest_table(manifest))
    assert "chat" in shown and "2,500" in shown and "[b]odd[/b]" in shown
    assert "2 tie" in shown


@pytest.mark.parametrize("text, picked", [("0:2", [0, 1]), ("3", [3]), ("-1", [9]), ("-2:", [8, 9]), (":1", [0])])
def test_inspect_rows(text, picked):
    assert list(range(10))[inspect.rows(text)] == picked


@pytest.mark.parametrize("text", ["", "a", "1:2:3", "1.5"])
def test_inspect_rows_that_are_none(text):
    with pytest.raises(ValueError):
        inspect.rows(text)
