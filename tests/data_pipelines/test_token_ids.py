"""Examples that are token ids go through everything as they are: into batches bit for bit, past what reads words."""

import dataclasses
import gzip
import io
import json
import random

import fsspec
import numpy as np
import pytest
from ml_collections import ConfigDict
from parquet_files import parquet_file
from rich.console import Console
from tf_examples import array_record, example
from tiny_tokenizers import BACK_ENDS, tiny

from data_pipelines import inspect as looking
from data_pipelines.batches.loader import Loader
from data_pipelines.batches.tokens import TokenStore, store_path, write_tokens
from data_pipelines.contamination.index import build_index
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.datasets import open_source, read_manifest
from data_pipelines.errors import InputError
from data_pipelines.files.folder import Folder
from data_pipelines.prepare import prepare
from data_pipelines.report import report
from data_pipelines.reporting.recipe import Recipe
from data_pipelines.reporting.scan import Scan
from data_pipelines.stages.base import Dropped
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.decontaminate import Decontaminate
from data_pipelines.stages.dedupe import Dedupe
from data_pipelines.stages.edges import find_edges
from data_pipelines.stages.filter import Filter
from data_pipelines.stages.normalise import Normalise
from data_pipelines.stages.read import Reader
from data_pipelines.stages.redact import Redact
from data_pipelines.stages.source import Source
from data_pipelines.stages.split import prompt
from data_pipelines.stages.tools import Tools
from data_pipelines.templates.jinja_chat import ChatTemplateError
from data_pipelines.templates.template import load_template
from data_pipelines.templates.text_objective import text_objective
from data_pipelines.token_ids import ids_turns

BYTES = tiny("bytes")
TEMPLATES = ("koala", "chat", "text")


def of_ids(ids, weights=None, name="7"):
    return Conversation("test", name, ids_turns(ids, weights or [1.0] * len(ids)))


def document(text, name="7"):
    return Conversation("test", name, (Turn("text", text, 1.0),))


########################################### Templates ############################################


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_any_template_lays_out_exactly_these_ids(back_end):
    tokenizer = tiny(back_end)
    special = sorted(tokenizer.special_tokens.values())
    ids = [tokenizer.vocab_size - 1, *special, 0, 5, 5]
    weights = [1.0, *[0.5] * len(special), 0.0, 1.0, 1.0]
    for name in TEMPLATES if back_end != "llama2c" else ("koala", "text"):
        example = load_template(name, tokenizer).encode(of_ids(ids, weights))
        assert example.ids.tolist() == ids and example.weights.tolist() == weights
        assert (example.ids.dtype, example.weights.dtype) == (np.int32, np.float32)
        assert (example.cut, example.targets) == (0, None)
    text = load_template("text", tokenizer).encode(document(" ".join(map(str, ids))))
    assert text.ids.tolist() != ids  # a control: the same numbers as text


def test_yuan_and_a_template_of_the_tokenizer():
    """Also where a chat would be refused: a template without {% generation %} blocks."""
    for name, tokenizer in (("yuan", tiny("yuan")), ("{{ messages }}", BYTES)):
        assert load_template(name, tokenizer).encode(of_ids([3, 4, 5])).ids.tolist() == [3, 4, 5]


def test_what_is_too_long_keeps_its_beginning():
    template = load_template("koala", BYTES, max_length=4)
    example = template.encode(of_ids([9, 8, 7, 6, 5, 4], [0, 0, 1, 1, 0.5, 0.5]))
    assert (example.ids.tolist(), example.weights.tolist(), example.cut) == ([9, 8, 7, 6], [0, 0, 1, 1], 2)
    assert template.encode(of_ids([9, 8, 7, 6, 5], [0, 0, 0, 0, 1])) is None


def test_the_first_id_is_not_predicted():
    template = load_template("text", BYTES)
    assert template.encode(of_ids([9, 8], [1, 0])) is None and template.encode(of_ids([9])) is None
    assert template.encode(of_ids([9, 8], [0, 1])).positions == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_another_tokenizer(name):
    template, size = load_template(name, BYTES), BYTES.vocab_size
    assert template.encode(of_ids([1, size - 1])).ids.tolist() == [1, size - 1]
    with pytest.raises(ChatTemplateError) as caught:
        template.encode_many([of_ids([1, 2]), of_ids([1, size, 2], [0, 0, 1])])
    told = (
        f"test/7: found the token id {size}; expected 0 to {size - 1}, the ids of {BYTES.path}: another tokenizer made"
    )
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("role", ["user", "assistant", "text", "special", "tool"])
def test_ids_beside_other_turns(role):
    mixed = dataclasses.replace(of_ids([1, 2]), turns=(*of_ids([1, 2]).turns, Turn(role, "<|eos|>", 1.0)))
    for name in TEMPLATES:
        with pytest.raises(
            ChatTemplateError, match=f"test/7: found turns of {role} beside token ids; expected token ids"
        ):
            load_template(name, BYTES).encode(mixed)


def test_ids_that_a_stage_broke():
    with pytest.raises(ChatTemplateError, match="test/7: found the text '1, 2' as token ids; expected whole numbers"):
        load_template("text", BYTES).encode(Conversation("test", "7", (Turn("ids", "1, 2", 1.0),)))


def test_prompts_and_many_at_once():
    template = load_template("chat", BYTES)
    chat = Conversation("test", "8", (Turn("user", "1 2", 0.0), Turn("assistant", "3", 1.0)))
    mixed = [of_ids([1, 2, 3], [0, 1, 1]), chat, document("1 2 3"), of_ids([4, 5])]
    for one, many in zip(map(template.encode, mixed), template.encode_many(mixed)):
        assert one.ids.tolist() == many.ids.tolist() and one.weights.tolist() == many.weights.tolist()
    assert template.render_prompt(of_ids([1, 2, 3], [0, 1, 1])) == [1, 2, 3]


def test_objectives_of_texts():
    """Like chats: they are not cut for filling in the middle, and a corruption takes documents only."""
    template = load_template("text", tiny("objectives"))
    middle = text_objective(template, fim_rate=1.0)
    left, cut = middle.encode_drawn([of_ids([9, 8, 7]), document("a b")], [np.random.default_rng(0) for _ in range(2)])
    assert left.ids.tolist() == [9, 8, 7] and cut.ids.tolist() != template.encode(document("a b")).ids.tolist()
    for corruption in ("spans", "masked"):
        with pytest.raises(InputError, match=r"test/7: found roles \['ids'\]; data.corruption takes documents"):
            text_objective(template, corruption=corruption).encode_drawn([of_ids([9, 8])], [np.random.default_rng(0)])


############################################# Stages #############################################

# (options, digits that the stage does something about where they are text)
CARD, MOBILE = [5425, 2334, 3010, 9903], [138, 1234, 5678]
LOOKED_AT = [
    (Redact({}), CARD),
    (Redact({"kinds": ("cn_mobile",)}), MOBILE),
    (Normalise({"page_leftovers": True, "detokenise": True, "nfc": False}), None),
    (Filter({"min_chars": 200}), [1, 2]),
    (Filter({"max_turn_chars": 5}), [1, 2, 3, 4]),
    (Filter({"min_turns": 2}), [1, 2]),
    (Filter({"phrases": ("404",)}), [1, 404]),
    (Filter({"origins": ("5 6",)}), [4, 5, 6]),
    (Filter({"repeated_digits": True}), [1111111111, 2]),
    (Filter({"repetition": True}), [5, 5, 5] * 200),
    (Filter({"chinese": {}}), [1, 2]),
]


def outcome(stage, conversation):
    """(conversations that are left, counts)"""
    ledger = Ledger()
    return list(stage([Sample("7", (conversation,))], ledger)), (ledger.dropped, ledger.changed, ledger.seen)


@pytest.mark.parametrize("stage, ids", LOOKED_AT, ids=lambda each: type(each).__name__)
def test_stages_that_read_words_leave_ids_alone(stage, ids):
    given = of_ids(ids or [1, 2, 3], [0, *[1] * (len(ids or [1, 2, 3]) - 1)])
    left, counts = outcome(stage, given)
    assert [sample.conversations for sample in left] == [(given,)] and counts == ({}, {}, {})
    if ids:  # a control: the same numbers as text
        text = document(" ".join(map(str, ids)))
        left, counts = outcome(stage, text)
        assert [sample.conversations for sample in left] != [(text,)] and any(counts)


def test_nothing_is_taken_out_of_many_ids():
    draw = random.Random(0)
    every = [CARD, MOBILE, [draw.randrange(10**4) for _ in range(3000)]]
    every += [[draw.randrange(10 ** draw.randrange(1, 10)) for _ in range(2 + i % 6)] for i in range(2000)]
    everything = Redact({"kinds": ("secret", "email", "ipv4", "ipv6", "card", "phone", "cn_id", "cn_mobile")})
    for stage in (everything, Normalise({}), Tools({}), Filter({"languages": ("en",)})):
        assert all(outcome(stage, of_ids(ids))[0][0].conversations == (of_ids(ids),) for ids in every)
    texts = [document(" ".join(map(str, ids))) for ids in every]
    assert sum(outcome(everything, text)[0][0].conversations != (text,) for text in texts) > 2  # a control


def duplicates(conversations, **options):
    """(rank, rank of the one before it, whether exact)"""
    samples = [Sample(str(i), (each,)) for i, each in enumerate(conversations)]
    edges = find_edges(Dedupe(options).signatures(samples))
    return list(zip(edges.ranks.tolist(), edges.keepers.tolist(), edges.exact.tolist()))


@pytest.mark.parametrize("part", ["query", "exchange", "whole"])
def test_ids_are_duplicates_of_equal_ids_alone(part):
    long = list(range(1000, 1300))
    near = [*long[:-1], 7]
    found = [of_ids(long), of_ids(near), of_ids(long, [0, *[1] * 299]), document(" ".join(map(str, long)))]
    assert duplicates(found, exact=part, near=part) == [(2, 0, True)]
    texts = [document(" ".join(map(str, each))) for each in (long, near)]
    assert duplicates(texts, exact=part, near=part) == [(1, 0, False)]  # a control
    assert duplicates(found, exact="", near=part) == []
    assert duplicates([of_ids(near), of_ids(long)], exact=part, near="", shortest=0) == []


def test_ids_hold_no_benchmark(tmp_path):
    numbers = " ".join(map(str, range(3000, 3060)))
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": numbers}))
    path = tmp_path / "index.npz"
    benchmarks = {"made": {"files": "items.jsonl", "layout": "gsm8k"}}
    stage = Decontaminate({"index": str(path), "sha256": build_index(benchmarks, tmp_path, None).save(path)})
    assert stage.conversation(of_ids(range(3000, 3060)), Ledger()) == of_ids(range(3000, 3060))
    with pytest.raises(Dropped, match="contaminated/made"):  # a control
        stage.conversation(document(numbers), Ledger())


def test_splits_go_by_all_ids():
    """A first id that is not learned, as bos often is, must not make all prompts the same."""
    one, other = of_ids([1, 5, 6], [0, 1, 1]), of_ids([1, 5, 7], [0, 1, 1])
    assert one.turns[0] == other.turns[0]
    assert prompt(one) == "1 5 6" != prompt(other)
    assert prompt(of_ids([1, 5, 6], [0, 0, 1])) == prompt(one)


########################################### All the way ##########################################


def rows(count, seed):
    """Rows in several shapes, and the (ids, weights) that they stand for. All ids there are appear, in rows of all
    lengths up to one more than fit."""
    draw, made = random.Random(seed), []
    for i in range(count):
        size = 2 + i % 65
        ids = [draw.randrange(BYTES.vocab_size) for _ in range(size)]
        weights = [draw.choice([0.0, 1.0, 0.5, float(np.float32(0.1))]) for _ in range(size - 1)] + [1.0]
        mask = [float(weight > 0) for weight in weights]
        labels = [i if weight else -100 for i, weight in zip(ids, mask)]
        made += [
            ({"tokens": ids, "loss_weights": weights}, ids, weights),
            ({"input_ids": ids, "labels": labels}, ids, mask),
            ({"inputs": ids, "targets": ids}, ids, [1.0] * size),
        ]
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with rows of ids from ArrayRecord and from JSON, and of text; and source/id -> (ids, weights)."""
    folder, expected = tmp_path_factory.mktemp("ids"), {}
    (folder / "in/tokens").mkdir(parents=True)
    (folder / "in/text").mkdir()
    for number in range(2):
        made = rows(70, number)
        name = f"c4.array_record-0000{number}-of-00002"
        records = [example(row) for row, _, _ in made]
        (folder / "in/tokens" / name).write_bytes(array_record(*records[:100], b"{}", *records[100:]))
        for row, (_, *each) in enumerate(made, start=1):
            expected[f"c4/tokens/c4-0000{number}-of-00002:{row + (row > 100)}"] = each
    made = rows(30, 2)
    (folder / "in/tokens/own.jsonl").write_text("\n".join(json.dumps(row) for row, _, _ in made))
    expected |= {f"own/tokens/own:{row}": each for row, (_, *each) in enumerate(made, start=1)}
    (folder / "in/text/t.txt").write_text("\n\n".join(f"bees {i} like honey" for i in range(20)))
    sources = {
        "c4": {"kind": "tokens", "patterns": ("tokens/*.array_record-*",)},
        "own": {"kind": "tokens", "patterns": ("tokens/*.jsonl",)},
        "text": {},
    }
    stages = {"normalise": {}, "filter": {"min_chars": 10, "languages": ("any",)}, "dedupe": {}, "redact": {}}
    config = ConfigDict({"sources": sources, "stages": stages, "heldout": 0.2})
    prepare(config, folder / "in", folder / "out")
    return folder / "out", expected


@pytest.mark.parametrize("suffix", ["array_record", "parquet", "jsonl", "jsonl.gz"])
def test_progress_is_told_of_every_byte(tmp_path, suffix):
    made = [row for row, *_ in rows(50, 0)]
    data = "\n".join(map(json.dumps, made)).encode()
    data = {
        "array_record": array_record(*map(example, made)),
        "parquet": parquet_file(made),
        "jsonl": data,
        "jsonl.gz": gzip.compress(data),
    }[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(data)
    told = []
    source = Source("s", "tokens", {}, {}, Folder(str(tmp_path)), (f"a.{suffix}",))
    samples = [s for chunk, _ in Reader(source, 100, strict=True, progress=told.append).chunks() for s in chunk]
    assert sum(told) == len(data) and len(samples) == len(made)


@pytest.mark.parametrize("suffix", ["array_record", "parquet"])
def test_records_behind_a_url(tmp_path, suffix):
    """They are the same as from a folder."""
    made = [row for row, *_ in rows(20, 0)]
    (tmp_path / "tokens").mkdir()
    data = parquet_file(made) if suffix == "parquet" else array_record(*map(example, made))
    (tmp_path / f"tokens/a.{suffix}").write_bytes(data)
    with fsspec.open(f"memory://{suffix}/tokens/a.{suffix}", "wb") as file:
        file.write(data)
    config = ConfigDict({"sources": {"a": {"kind": "tokens"}}})
    here, there = (prepare(config, url, tmp_path / url[-3:]) for url in (str(tmp_path), f"memory://{suffix}"))
    assert here["sources"]["a"]["splits"] == there["sources"]["a"]["splits"]
    assert there["sources"]["a"]["kept_rows"] == 60


def test_equal_names_of_columns_and_lines_clash(tmp_path):
    (tmp_path / "tokens").mkdir()
    for name in ("a.parquet", "a.jsonl"):
        (tmp_path / "tokens" / name).write_bytes(parquet_file([{"tokens": [5, 6]}]))
    with pytest.raises(
        InputError, match=r"found tokens/a.jsonl and tokens/a.parquet, whose rows would get the same ids"
    ):
        prepare(ConfigDict({"sources": {"a": {"kind": "tokens"}}}), tmp_path, tmp_path / "out")


def opened(folder):
    return {name: open_source(folder, name, "train") for name in ("c4", "own", "text")}


def test_every_row_is_accounted_for_and_kept(prepared):
    folder, expected = prepared
    accounts = read_manifest(folder)["sources"]
    assert (accounts["c4"]["rows"], accounts["c4"]["rejected"]) == (422, {"not_an_example": 2})
    assert (accounts["own"]["rows"], accounts["own"]["rejected"]) == (90, {})
    for name in ("c4", "own"):
        assert all(stage["changed"] == {} for stage in accounts[name]["stages"].values())
        assert accounts[name]["stages"]["filter"]["dropped"] == {}
    found = {
        f"{name}/{conversation.id}": conversation
        for name in ("c4", "own")
        for split in ("train", "heldout")
        for conversation in open_source(folder, name, split)
    }
    dropped = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    copies = {f"{drop['source']}/{drop['id']}" for drop in dropped if drop["reason"] == "exact_duplicate"}
    assert found.keys() | copies == expected.keys() and not found.keys() & copies
    assert len(copies) == 2 * len(expected) / 3  # three shapes of each row
    assert 0 < accounts["c4"]["splits"]["heldout"]["examples"] < accounts["c4"]["splits"]["train"]["examples"]


def segments(batches):
    """(source/id, inputs, targets, weights) of each segment of the batches."""
    for batch in batches:
        for row, names in enumerate(batch.examples):
            arrays = {name: array[row] for name, array in batch.arrays.items()}
            for segment, (source, name) in enumerate(names, start=1):
                at = arrays["segment_ids"] == segment
                yield f"{source}/{name}", *(arrays[key][at] for key in ("inputs", "targets", "loss_weights"))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("name", ["koala", "text"])
def test_batches_hold_exactly_these_ids_and_weights(prepared, name, packing):
    folder, expected = prepared
    template, sources = load_template(name, BYTES, max_length=65), opened(prepared[0])
    draws = sum(map(len, sources.values()))
    loader = lambda read: Loader(
        read, None, template, batch_size=4, length=64, pool=30, packing=packing, seed=3, draws=draws
    )
    batches, seen = list(loader(sources)), set()
    for place, inputs, targets, weights in segments(batches):
        if place.startswith("text/"):
            continue
        ids, weighed = (list(each)[:65] for each in expected[place])
        assert inputs.tobytes() == np.array(ids[:-1], np.int32).tobytes(), place
        assert targets.tobytes() == np.array(ids[1:], np.int32).tobytes(), place
        assert weights.tobytes() == np.array(weighed[1:], np.float32).tobytes(), place
        seen.add(place)
    nothing = {
        f"{source}/{c.id}" for source in ("c4", "own") for c in sources[source] if template.encode(c) is None
    }  # rows whose only learned id is cut off
    assert seen == {f"{source}/{c.id}" for source in ("c4", "own") for c in sources[source]} - nothing
    assert len(seen) > 100 and len(nothing) < 3
    stored = {}
    for source, conversations in sources.items():
        digest = read_manifest(folder)["sources"][source]["splits"]["train"]["sha256"]
        path = store_path(folder, source, "train", digest, template)
        write_tokens(conversations, template, path, digest)
        stored[source] = TokenStore(path)
    again = list(loader(stored))
    assert [batch.examples for batch in again] == [batch.examples for batch in batches]
    for one, other in zip(again, batches):
        assert all(one.arrays[key].tobytes() == array.tobytes() for key, array in other.arrays.items())


def test_inspect_shows_numbers_and_with_a_template_text(prepared):
    dataset = opened(prepared[0])["own"]
    show = lambda group: Console(file=(out := io.StringIO()), width=10**6).print(group) or out.getvalue()
    assert f"ids (weight {dataset[0].turns[0].weight:g})\n{dataset[0].turns[0].text}" in show(
        looking.rendered(dataset[0])
    )
    ids = BYTES.encode("bees like honey")
    (group,) = looking.examples(
        [of_ids([BYTES.bos_id, *ids], [0.0] + [1.0] * len(ids))], "own", range(1), (load_template("koala", BYTES))
    )
    assert "<bos>bees like honey" in show(group)


def test_report_shows_them(prepared, tmp_path):
    folder, _ = prepared
    page = report(folder, examples=1)
    assert '<span class="role">ids, learned</span>' in page
    tokenizer = BYTES.path.parent
    recipe = Recipe.of({"template": "koala", "tokenizer": str(tokenizer), "length": 64, "packing": "best_fit"})
    assert "The template refuses it" not in report(folder, recipe=recipe, examples=2)
    small = Recipe.of({"template": "koala", "tokenizer": str(tiny("one_byte").path.parent), "length": 64})
    assert "another tokenizer made these" in report(folder, recipe=small, examples=5)
    scan = Scan()
    scan.add(of_ids([1, 2, 3]))
    assert (scan.words, scan.roles, scan.characters) == (0, {"ids": 1}, 5)


def test_a_tokenizer_is_not_trained_on_numbers(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"tokens": [777, 777], "text": "777 777"}))
    train = lambda kind: prepare(
        ConfigDict({"sources": {"a": {"kind": kind, "patterns": ("*.jsonl",)}}, "tokenizer": TRAINED}),
        tmp_path / "in",
        tmp_path / kind,
    )
    assert train("jsonl")["tokenizer"]["bytes"] > 1000  # a control
    with pytest.raises(InputError, match="found none, or only empty ones; expected text to train a tokenizer on"):
        train("tokens")


TRAINED = {"train": True, "vocab_size": 400}
