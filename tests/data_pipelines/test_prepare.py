"""From files to a dataset: every row is accounted for, and nothing is half written."""

import errno
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from ml_collections import ConfigDict

from data_pipelines import datasets
from data_pipelines import prepare as door
from data_pipelines.conversation import Conversation, DataError, Turn
from data_pipelines.datasets import open_source, read_manifest
from data_pipelines.disk import locked
from data_pipelines.errors import InputError
from data_pipelines.prepare import prepare
from data_pipelines.preparing import graph
from data_pipelines.stages.source import PrepareError

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/data/koala"


def config(sources, **others):
    return ConfigDict({"sources": sources, "heldout": 0.2, **others})


def alpaca(count, bad=()):
    rows = [{"instruction": f"ask {i}", "input": "", "output": "" if i in bad else f"tell {i}"} for i in range(count)]
    return json.dumps(rows)


@pytest.fixture
def folder(tmp_path):
    """An input folder with three sources and some rows that do not fit."""
    folder = tmp_path / "in"
    for name in ("alpaca", "sharegpt", "text"):
        (folder / name).mkdir(parents=True)
    (folder / "alpaca/a.json").write_text(alpaca(50, bad=(4, 9)))
    turns = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]
    named = [turns[0], {"from": "gpt", "value": "I am ChatGPT."}]
    chats = [turns, turns[1:] + turns, turns + turns[:1], turns[1:] + turns + turns[:1], named, turns[1:]]
    lines = [json.dumps({"conversations": chat}) for chat in chats]
    (folder / "sharegpt/s.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, "{oops"]).encode()))
    (folder / "text/t.txt").write_text("one\n\ntwo\n")
    return folder


THREE = {
    "alpaca": {},
    "sharegpt": {"stages": {"filter": {"phrases": ("chatgpt",)}}},
    "mine": {"kind": "text", "patterns": ("text/*",)},
}


def everything(output, source):
    return [c for split in datasets.SPLITS for c in open_source(output, source, split)]


def test_every_row_is_accounted_for(folder, tmp_path):
    manifest = prepare(config(THREE), folder, tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    sources = manifest["sources"]
    counts = {name: (s["rows"], s["kept_rows"], s["rejected"], s["repaired"]) for name, s in sources.items()}
    assert counts == {
        "alpaca": (50, 48, {"empty_text": 2}, {}),
        "mine": (2, 2, {}, {}),
        "sharegpt": (
            7,
            5,
            {"invalid_json": 1, "no_exchange": 1},
            {"ends_with_user": 2, "starts_with_assistant": 2},
        ),
    }
    assert sources["sharegpt"]["stages"]["filter"]["dropped"] == {"phrase": 1}
    for name, source in sources.items():
        kept = everything(tmp_path / "out", name)
        assert len(kept) == sum(split["examples"] for split in source["splits"].values())
        assert {conversation.source for conversation in kept} == {name}
        assert len({conversation.id for conversation in kept}) == len(kept)
    assert sources["alpaca"]["files"][0]["path"] == "alpaca/a.json"
    assert sources["alpaca"]["files"][0]["bytes"] == (folder / "alpaca/a.json").stat().st_size
    assert sources["mine"]["kind"] == "text"
    assert not (tmp_path / "out.tmp").exists()


def test_rejects_name_the_place(folder, tmp_path):
    prepare(config(THREE), folder, tmp_path / "out")
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert {"source": "alpaca", "file": "alpaca/a.json", "row": 5, "turn": None, "reason": "empty_text"}.items() <= (
        rejects[0].items()
    )
    places = [(reject["source"], reject["row"], reject["turn"], reject["reason"]) for reject in rejects[2:-1]]
    assert places == [
        ("sharegpt", 6, None, "no_exchange"),
        ("sharegpt", 7, None, "invalid_json"),
    ]
    assert all(reject["found"] and reject["expected"] for reject in rejects[:-1])
    assert {"source": "sharegpt", "stage": "filter", "id": "sharegpt/s:5", "turn": 2, "reason": "phrase"}.items() <= (
        rejects[-1].items()
    )


def test_the_split_is_stable_and_keeps_rows_together(folder, tmp_path):
    (folder / "hc3").mkdir()
    rows = [{"question": f"q{i}", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]} for i in range(400)]
    (folder / "hc3/x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(config({"hc3": {}}), folder, tmp_path / "out")
    parts = {
        split: Counter(c.turns[0].text for c in open_source(tmp_path / "out", "hc3", split))
        for split in datasets.SPLITS
    }
    assert not parts["train"].keys() & parts["heldout"].keys()
    assert set(parts["train"].values()) == set(parts["heldout"].values()) == {3}
    assert 50 < len(parts["heldout"]) < 110  # 80 expected, deviation 8
    (folder / "hc3/x.jsonl").write_text("\n".join(map(json.dumps, rows + rows)))  # more rows move none
    prepare(config({"hc3": {}}), folder, tmp_path / "more")
    more = {c.id for c in open_source(tmp_path / "more", "hc3", "heldout")}
    assert {c.id for c in open_source(tmp_path / "out", "hc3", "heldout")} < more


def test_the_same_input_gives_the_same_hash(folder, tmp_path):
    first = prepare(config(THREE), folder, tmp_path / "first")
    assert prepare(config(THREE), str(folder), tmp_path / "second")["hash"] == first["hash"]
    (folder / "text/t.txt").write_text("one\n\ntwO\n")
    assert prepare(config(THREE), folder, tmp_path / "third")["hash"] != first["hash"]


def test_policy_error_stops_at_the_first_bad_row(folder, tmp_path):
    with pytest.raises(DataError, match=r'alpaca/a\.json, row 5: found "output" is empty; expected "output" with text'):
        prepare(config(THREE, policy="error"), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "webgpt").mkdir()
    question = {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0}
    rows = [{**question, "score_1": score} for score in (0, 1, None)]
    (folder / "webgpt/w.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="row 3"):  # the tie in row 1 is left out on purpose, and no error
        prepare(config({"webgpt": {}}, policy="error"), folder, tmp_path / "out")


def test_missing_sources_are_all_named(folder, tmp_path):
    sources = {**THREE, "hc3": {}, "webgpt": {"patterns": ("elsewhere/*.json",)}}
    with pytest.raises(PrepareError) as caught:
        prepare(config(sources), folder, tmp_path / "out")
    message = str(caught.value)
    assert "no files for 2 of 5 sources" in message
    assert "hc3: hc3/*.jsonl" in message and "huggingface.co/datasets/Hello-SimpleAI/HC3" in message
    assert "webgpt: elsewhere/*.json" in message
    manifest = prepare(config(sources, missing="skip"), folder, tmp_path / "out")
    assert set(manifest["missing"]) == {"hc3", "webgpt"}
    assert set(manifest["sources"]) == set(THREE)
    with pytest.raises(PrepareError, match="no input folder"):
        prepare(config(sources, missing="skip"), None, tmp_path / "none")


def test_complete_output_is_kept_unless_forced(folder, tmp_path, capsys):
    out = tmp_path / "out"
    first = prepare(config({"alpaca": {}}), folder, out)
    assert prepare(config({"alpaca": {}}), folder, out) == first
    with pytest.raises(PrepareError, match=r"another configuration \(differs in heldout\)"):
        prepare(config({"alpaca": {}}, heldout=0.1), folder, out)
    (folder / "alpaca/a.json").write_text(alpaca(60))
    with pytest.raises(PrepareError, match=r"prepared with other files \(alpaca/a.json\)"):
        prepare(config({"alpaca": {}}), folder, out)
    assert prepare(config({"alpaca": {}}), tmp_path / "unplugged", out) == first
    assert "unplugged: found no such folder;" in capsys.readouterr().err
    (folder / "alpaca/a.json").write_text("[")
    with pytest.raises(PrepareError, match=r"none of 1 rows fits; the first: alpaca/a.json, row 1"):
        prepare(config({"alpaca": {}}), folder, out, force=True)
    assert read_manifest(out) == first  # a forced run that fails changes nothing
    (folder / "alpaca/a.json").write_text(alpaca(60))
    assert prepare(config({"alpaca": {}}), folder, out, force=True)["sources"]["alpaca"]["rows"] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.cache"]


def test_foreign_folders_are_not_touched(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(PrepareError, match="found other files there"):
            prepare(config({"alpaca": {}}), folder, out, force=force)
    (out / "thesis.txt").unlink()
    prepare(config({"alpaca": {}}), folder, out)  # an empty folder is filled


def test_limit_and_max_turn_chars(folder, tmp_path):
    manifest = prepare(config({"alpaca": {"limit": 7}}), folder, tmp_path / "out")["sources"]["alpaca"]
    assert (manifest["rows"], manifest["kept_rows"], manifest["rejected"]) == (8, 7, {"empty_text": 1})
    manifest = prepare(config({"alpaca": {}}, max_turn_chars=6), folder, tmp_path / "short")["sources"]["alpaca"]
    assert manifest["rejected"] == {"empty_text": 2, "turn_too_long": 40}


def test_repairs_can_be_switched_off(folder, tmp_path):
    source = prepare(config({"sharegpt": {"repair": False}}), folder, tmp_path / "out")["sources"]["sharegpt"]
    assert source["repaired"] == {}
    assert source["rejected"]["starts_with_assistant"] == 2


@pytest.mark.parametrize(
    "sources, others, message",
    [
        ({"alpacca": {}}, {}, r"sources\.alpacca\.kind: found 'alpacca'.*did you mean 'alpaca'"),
        ({"alpaca": {"patern": "*"}}, {}, r"sources\.alpaca: found the key 'patern'.*did you mean 'patterns'"),
        ({"alpaca": {"weight": -1}}, {}, r"weight: found -1; expected a whole number"),
        ({"alpaca": {"patterns": ("/etc/*",)}}, {}, "expected relative globs"),
        ({"alpaca": {}}, {"held_out": 0.1}, "found the key 'held_out'.*did you mean 'heldout'"),
        ({"alpaca": {}}, {"policy": "ignore"}, "policy: found 'ignore'"),
        ({"alpaca": {}}, {"heldout": 1.0}, "heldout: found 1.0"),
        ({}, {}, "sources: found none"),
        ({"a": {"kind": "alpaca", "patterns": ("alpaca/a.*",)}}, {}, "a.json and alpaca/a.jsonl.*the same ids"),
    ],
)
def test_wrong_configurations(folder, tmp_path, sources, others, message):
    (folder / "alpaca/a.jsonl").write_text("{}")
    with pytest.raises(InputError, match=message):
        prepare(config(sources, **others), folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def made_up(monkeypatch):
    """A module that makes its text up, as `pydoc` and `exact` do."""
    module = ModuleType("made.up")

    def generate(*, count=3, source="up"):
        if count < 0:
            raise ValueError("count: found a negative one")
        for i in range(count):
            conversation = Conversation(source, f"n:{i}", (Turn("text", "" if i == 3 else f"text {i}", 1.0),))
            yield conversation if i % 2 else ("heldout", conversation)

    module.generate = generate
    monkeypatch.setitem(sys.modules, "made", ModuleType("made"))
    monkeypatch.setitem(sys.modules, "made.up", module)
    return {"kind": "made.up"}


def test_generated_sources(made_up, tmp_path):
    manifest = prepare(config({"up": {**made_up, "count": 5}}, heldout=0.0), None, tmp_path / "out")
    source = manifest["sources"]["up"]
    assert (source["rows"], source["kept_rows"], source["rejected"]) == (5, 4, {"empty_text": 1})
    assert [c.id for c in open_source(tmp_path / "out", "up", "heldout")] == ["n:0", "n:2", "n:4"]
    assert [c.id for c in open_source(tmp_path / "out", "up", "train")] == ["n:1"]
    with pytest.raises(InputError, match=r"found the key 'cuont'.*did you mean 'count'"):
        prepare(config({"up": {**made_up, "cuont": 5}}), None, tmp_path / "wrong")
    with pytest.raises(PrepareError, match=r"sources\.up: count: found a negative one"):
        prepare(config({"up": {**made_up, "count": -1}}), None, tmp_path / "wrong")


def test_a_bug_in_a_converter_names_the_row(folder, tmp_path, monkeypatch):
    module = ModuleType("buggy")
    module.PATTERNS, module.ORIGIN, module.convert = ("alpaca/*",), "", lambda row, where: row["no such key"]
    monkeypatch.setitem(sys.modules, "bug", ModuleType("bug"))
    monkeypatch.setitem(sys.modules, "bug.gy", module)
    with pytest.raises(KeyError) as caught:
        prepare(config({"x": {"kind": "bug.gy"}}), folder, tmp_path / "out")
    assert caught.value.__notes__ == ["while buggy converted alpaca/a.json, row 1"]


def test_tokenizer_is_trained_on_the_train_split(folder, tmp_path, monkeypatch):
    from data_pipelines.tokenizers import training

    seen = []

    def train(texts, vocab_size, special_tokens, path):
        seen.append((list(texts), vocab_size, special_tokens))
        path.mkdir(parents=True)
        (path / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(training, "train", train)
    wanted = {"train": True, "vocab_size": 300, "special_tokens": ("<a>",)}
    manifest = prepare(config({"alpaca": {}}, tokenizer=wanted), folder, tmp_path / "out")
    ((texts, vocab_size, special_tokens),) = seen
    train_split = open_source(tmp_path / "out", "alpaca", "train")
    assert texts == [turn.text for conversation in train_split for turn in conversation.turns]
    assert (vocab_size, special_tokens) == (300, ("<a>",))
    assert (tmp_path / "out" / manifest["tokenizer"]["path"]).read_text() == "{}"


def test_a_full_disk_leaves_no_output_and_says_so(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = SimpleNamespace(
        config=config({"alpaca": {}}),
        input=folder,
        output=out,
        policy=None,
        force=False,
        workers=1,
        runner="local",
        runner_flag=[],
        shared="",
    )
    monkeypatch.setattr(door, "FLAGS", flags)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "write_source", full)
    with pytest.raises(SystemExit) as caught:
        door.main(["prepare"])
    assert "no space left on the disk" in str(caught.value) and str(out) in str(caught.value)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.cache"]


def run(*arguments):
    command = [sys.executable, "-m", "data_pipelines.prepare", "--config", "configs/data/koala.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line(folder, tmp_path):
    arguments = ["--config.missing=skip", "--input", str(folder), "--output", str(tmp_path / "out")]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "empty_text" in done.stdout and "names_its_origin" in done.stdout
    assert read_manifest(tmp_path / "out")["hash"] in done.stdout
    failed = run(*arguments, "--force", "--policy", "error")
    assert failed.returncode == 1
    assert failed.stderr.strip() == 'alpaca/a.json, row 5: found "output" is empty; expected "output" with text in it'


def koala(arg=""):
    spec = importlib.util.spec_from_file_location("koala", ROOT / "configs/data/koala.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def test_koala_config():
    assert set(koala().sources) == {"sharegpt", "hc3", "oig", "alpaca", "hh_rlhf", "webgpt", "summarize"}
    assert set(koala("distill").sources) == {"sharegpt", "hc3"}
    with pytest.raises(ValueError, match="found 'both'"):
        koala("both")


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_the_real_files(tmp_path):
    settings = koala()
    for source in settings.sources.values():
        source.limit = 300
    manifest = prepare(settings, REAL, tmp_path / "out")
    assert set(manifest["sources"]) == set(settings.sources)
    reasons = {name: set(source["rejected"]) for name, source in manifest["sources"].items()}
    oddities = {"empty_text", "ends_with_user", "identical_pair", "marker_in_turn", "not_alternating"}
    assert reasons.pop("sharegpt") <= set()
    assert reasons.pop("hh_rlhf") <= oddities
    assert set().union(*reasons.values()) <= {"empty_text"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"stages": {"normalise": True}},
            "config.stages.normalise: found True; expected options as a mapping, or False",
        ),
        ({"sources": {"tokenizer": {"kind": "alpaca"}}}, "config.sources: found the name 'tokenizer'"),
        ({"sources": {"a/b": {"kind": "alpaca"}}}, "config.sources: found the name 'a/b'"),
        ({"sources": {"alpaca": {"limit": "3"}}}, "sources.alpaca.limit: found '3'; expected a whole number"),
        ({"sources": {"alpaca": {"patterns": "*.json"}}}, "patterns: found '.*json'; expected a list of them"),
        ({"tokenizer": {"train": True}}, "config.tokenizer.vocab_size: found None; expected a whole number"),
        ({"tokenizer": {"vocabsize": 3}}, "found the key 'vocabsize'.*did you mean 'vocab_size'"),
        ({"tokenizer": {"special_tokens": "<a>"}}, "special_tokens: found '<a>'; expected a list"),
    ],
)
def test_values_that_do_not_fit(folder, tmp_path, changes, message):
    settings = ConfigDict({"sources": {"alpaca": {}}, **changes})
    with pytest.raises(InputError, match=message):
        prepare(settings, folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_stage_can_be_switched_off_for_all_or_for_one(folder, tmp_path):
    used = lambda **others: {
        name: set(entry["stages"]) - {"split"}
        for name, entry in prepare(config(THREE, **others), folder, tmp_path / "out", force=True)["sources"].items()
    }
    assert used(stages={"normalise": False}) == {"alpaca": set(), "mine": set(), "sharegpt": {"filter"}}
    sources = {**THREE, "alpaca": {"stages": {"normalise": {}}}}
    assert set(prepare(config(sources), folder, tmp_path / "one")["sources"]["alpaca"]["stages"]) == {
        "normalise",
        "split",
    }


def test_folders_of_others_stay(folder, tmp_path):
    for name in ("out.tmp", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    prepare(config(THREE), folder, tmp_path / "out")
    prepare(config(THREE), folder, tmp_path / "out", force=True)
    assert all((tmp_path / name / "precious.txt").read_text() == "mine" for name in ("out.tmp", "out.old"))


def test_a_damaged_shard_or_chunk_is_made_again(folder, tmp_path):
    first = prepare(config(THREE), folder, tmp_path / "out")
    (tmp_path / "out/tokens").mkdir()  # what was tokenised beside the data stays where that is prepared again
    for shard in (tmp_path / "out/alpaca").rglob("*.array_record*"):
        os.truncate(shard, 10)  # the cache has the same file under another name
    for chunk in (tmp_path / "out.cache/split").iterdir():
        os.truncate(chunk, 5)
    with pytest.raises(datasets.DatasetError, match="prepare the data again with --force"):
        open_source(tmp_path / "out", "alpaca", "train")
    assert prepare(config(THREE), folder, tmp_path / "out", force=True)["hash"] == first["hash"]
    assert len(open_source(tmp_path / "out", "alpaca", "train")[:]) > 30 and (tmp_path / "out/tokens").is_dir()


def test_one_preparation_at_a_time(folder, tmp_path):
    with locked(tmp_path / "out.cache", "preparation"), pytest.raises(InputError, match="another preparation at work"):
        prepare(config(THREE), folder, tmp_path / "out")
    prepare(config(THREE), folder, tmp_path / "out")


def test_a_copy_of_another_source_may_end_up_empty(folder, tmp_path, capfd):
    sources = {"alpaca": {}, "copy": {"kind": "alpaca", "patterns": ("alpaca/*",)}}
    manifest = prepare(config(sources, stages={"dedupe": {}}), folder, tmp_path / "out")
    assert manifest["sources"]["copy"]["splits"]["train"]["examples"] == 0
    assert "sources.copy: the stages left nothing of it" in capfd.readouterr().err


def test_other_code_or_benchmarks_are_noticed(folder, tmp_path, monkeypatch):
    (tmp_path / "eval").mkdir()
    benchmark = tmp_path / "eval/b.jsonl"
    benchmark.write_text(
        json.dumps({"text": "a question of a benchmark that has some words more than thirteen of them in it"})
    )
    stages = {"decontaminate": {"folder": str(tmp_path / "eval"), "benchmarks": {"b": "b.jsonl"}}}
    settings = config({"alpaca": {}}, stages=stages)
    prepare(settings, folder, tmp_path / "out")
    prepare(settings, folder, tmp_path / "out")
    benchmark.write_text(benchmark.read_text().replace("some", "many"))
    with pytest.raises(PrepareError, match=r"other code, libraries or benchmarks \(benchmarks of alpaca\)"):
        prepare(settings, folder, tmp_path / "out")
    prepare(settings, folder, tmp_path / "out", force=True)
    monkeypatch.setattr(graph, "code_of", lambda module: f"other {module}")
    with pytest.raises(PrepareError, match=r"other code, libraries or benchmarks \(read, decontaminate, split"):
        prepare(settings, folder, tmp_path / "out")


def test_what_is_quoted_of_drops_is_redacted_too(folder, tmp_path):
    (folder / "text/t.txt").write_text("write to jane.doe@corp-mail.com, chatgpt\n\nfine\n")
    quotes = []
    for name, stages in (("plain", {}), ("redacted", {"redact": {}})):
        settings = config({"text": {}}, stages={"filter": {"phrases": ("chatgpt",)}, **stages})
        prepare(settings, folder, tmp_path / name)
        quotes.append(json.loads((tmp_path / name / "rejects.jsonl").read_text())["excerpt"])
    assert "jane.doe@corp-mail.com" in quotes[0] and "jane.doe" not in quotes[1] and "write to" in quotes[1]
