"""What was made is not made again, whatever happened in between; what changed is, and what follows it, and no more."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from ml_collections import ConfigDict

from data_pipelines import addresses, stages
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.datasets import open_source
from data_pipelines.errors import InputError
from data_pipelines.prepare import prepare
from data_pipelines.preparing import graph, graph_dedupe, store
from data_pipelines.stages import read
from data_pipelines.stages.base import Dropped, Stage, map_texts
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.split import Split, prompt

ROOT = Path(__file__).parents[3]


class Shout(Stage):
    OPTIONS: ClassVar = {"mark": "!"}

    def conversation(self, conversation, ledger):
        changed = map_texts(conversation, lambda turn: turn.text.upper() + self.options["mark"])
        if changed is not conversation:
            ledger.change("shouted")
        ledger.see("mark", self.options["mark"])
        return changed


class Short(Stage):
    OPTIONS: ClassVar = {"longest": 100}

    def conversation(self, conversation, ledger):
        for number, turn in enumerate(conversation.turns, start=1):
            if len(turn.text) > self.options["longest"]:
                raise Dropped("too_long", f"{len(turn.text)} characters", number)
        return conversation


@pytest.fixture
def toys(monkeypatch):
    """Stages that are easy to see through, in place of `normalise` and `filter`, and a log of which ones run."""
    classes = {"normalise": Shout, "filter": Short, "split": Split}
    code = dict.fromkeys(("read", *stages.CONFIGURED, "split"), 1)
    ran = []
    monkeypatch.setattr(stages, "make", lambda stage, options: classes[stage](options))
    monkeypatch.setattr(graph, "code_of", lambda module: code.get(module.rpartition(".")[2], 0))
    write = graph.write_chunk

    def written(path, samples, stage, ledger):
        ran.append(stage)
        return write(path, samples, stage, ledger)

    monkeypatch.setattr(graph, "write_chunk", written)
    monkeypatch.setattr(read, "CHUNK", 8)
    return classes, code, ran


def alpaca(first, count):
    return json.dumps(
        [{"instruction": f"ask {i}", "output": "tell" * (i % 5 + 1)} for i in range(first, first + count)]
    )


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    for name in ("alpaca", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.json").write_text(alpaca(0, 20))
    return folder


def config(**others):
    sources = {"alpaca": {}, "other": {"kind": "alpaca", "patterns": ("other/*.json",)}}
    return ConfigDict({"sources": sources, "stages": {"normalise": {}, "filter": {"longest": 20}}, **others})


def run(folder, tmp_path, ran, settings=None, **options):
    ran.clear()
    manifest = prepare(settings or config(), folder, tmp_path / "out", **{"force": True, **options})
    return manifest, {stage: ran.count(stage) for stage in dict.fromkeys(ran)}


def test_every_stage_gives_account(folder, tmp_path, toys):
    manifest, ran = run(folder, tmp_path, toys[2])
    assert ran == {"read": 6, "normalise": 6, "filter": 6, "split": 6}  # three chunks a source
    entry = manifest["sources"]["alpaca"]
    assert entry["stages"]["normalise"] == {
        "entered": 20, "left": 20, "dropped": {}, "changed": {"shouted": 20}, "seen": {"mark": {"!": 20}},
    }  # fmt: skip
    assert entry["stages"]["filter"]["dropped"] == {"too_long": 4}
    assert [c.turns[0].text for c in open_source(tmp_path / "out", "alpaca", "train")][:5] == [
        "ASK 0!", "ASK 1!", "ASK 2!", "ASK 3!", "ASK 5!",
    ]  # fmt: skip
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 8
    assert rejects[0] == {
        "source": "alpaca", "stage": "filter", "id": "alpaca/a:5", "turn": 2, "reason": "too_long",
        "found": "21 characters", "excerpt": "TELLTELLTELLTELLTELL!",
    }  # fmt: skip


def test_a_second_run_does_nothing(folder, tmp_path, toys, monkeypatch):
    manifest, _ = run(folder, tmp_path, toys[2])
    assert run(folder, tmp_path, toys[2]) == (manifest, {})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(graph, "read", None)
    assert run(folder, tmp_path, toys[2], force=False) == (manifest, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_changed_runs_again_and_what_follows_it(folder, tmp_path, toys):
    classes, code, ran = toys
    run(folder, tmp_path, ran)
    code["filter"] = 2  # makes what it made before
    assert run(folder, tmp_path, ran)[1] == {"filter": 6}
    code["normalise"] = 2
    classes["normalise"] = type("Normalise", (Shout,), {"OPTIONS": {"mark": "?"}})
    assert run(folder, tmp_path, ran)[1] == {"normalise": 6, "filter": 6, "split": 6}
    settings = config()
    settings.sources.other.stages = {"filter": {"longest": 50}}
    assert run(folder, tmp_path, ran, settings)[1] == {"filter": 3, "split": 3}
    settings.sources.other.stages = {"filter": False}
    manifest, count = run(folder, tmp_path, ran, settings)
    assert count == {} and set(manifest["sources"]["other"]["stages"]) == {"normalise", "split"}
    (folder / "other/b.json").write_text(alpaca(100, 7))
    assert run(folder, tmp_path, ran)[1] == {"read": 1, "normalise": 1, "filter": 1, "split": 1}
    (folder / "other/b.json").write_text(alpaca(200, 7))
    assert run(folder, tmp_path, ran)[1] == {"read": 1, "normalise": 1, "filter": 1, "split": 1}
    os.utime(folder / "other/b.json")
    assert run(folder, tmp_path, ran)[1] == {}


def test_both_halves_of_a_comparison_or_none():
    long, short = Turn("assistant", "long " * 9, 1.0), Turn("assistant", "short", 1.0)
    halves = [Conversation("x", f"1:{name}", (turn,)) for name, turn in (("chosen", long), ("rejected", short))]
    ledger = Ledger()
    assert Short({"longest": 20}).sample(Sample("1", tuple(halves)), ledger) is None
    assert ledger.dropped == {"too_long": 1, "other_half_of_pair": 1}
    assert (ledger.entered, ledger.left) == (2, 0)
    answers = tuple(dataclasses.replace(half, id=half.id.replace("chosen", "1")) for half in halves)
    left = Short({"longest": 20}).sample(Sample("1", answers), ledger := Ledger())  # several answers to one question
    assert [c.id for c in left.conversations] == ["1:rejected"] and ledger.dropped == {"too_long": 1}


def test_prompts_decide_the_split():
    def said(*turns):
        return Sample("x", (Conversation("s", "x", tuple(Turn(role, text, 1.0) for role, text in turns)),))

    asked = [said(("system", "be kind"), ("user", f"  Question\n{i} "), ("assistant", "a")) for i in range(2000)]
    again = [said(("user", f"question {i}"), ("assistant", "b")) for i in range(2000)]
    split, ledger = Split({"heldout": 0.1}), Ledger()
    first, second = ([s.split for s in split(samples, ledger)] for samples in (asked, again))
    assert first == second and 150 < first.count("heldout") < 250
    assert prompt(said(("text", "Ｆｕｌｌ")).conversations[0]) == "full"
    kept = dataclasses.replace(asked[0], split="heldout")
    assert next(Split({"heldout": 0.0})([kept], ledger)).split == "heldout"


def test_two_processes_make_what_one_makes(folder, tmp_path):
    settings = ConfigDict({**config().to_dict(), "stages": {}})
    one = prepare(settings, folder, tmp_path / "one")
    assert prepare(settings, folder, tmp_path / "two", workers=2)["hash"] == one["hash"]
    (folder / "other/a.json").write_text("[{}]")
    with pytest.raises(
        InputError, match=r"other/a.json, row 1: found an empty object"
    ):  # an error comes back from a process
        prepare(ConfigDict({**settings, "policy": "error"}), folder, tmp_path / "bad", workers=2)


def test_files_behind_a_url(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*.json"):
        memory.pipe(f"/bucket/{path.relative_to(folder).as_posix()}", path.read_bytes())
    settings = ConfigDict({**config().to_dict(), "stages": {}})
    there, here = (prepare(settings, place, tmp_path / name) for place, name in ((
        "memory://bucket", "there"), (folder, "here")))  # fmt: skip
    assert there["hash"] == here["hash"]
    memory.pipe("/bucket/alpaca/a.json", alpaca(0, 21).encode())
    with pytest.raises(InputError, match=r"other files \(alpaca/a.json\)"):
        prepare(settings, "memory://bucket", tmp_path / "there")
    with pytest.raises(InputError, match="nowhere://bucket: found a folder that cannot be opened"):
        prepare(settings, "nowhere://bucket", tmp_path / "nowhere")


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, kills):
    (tmp_path / "in/alpaca").mkdir(parents=True)
    for number in range(4):
        (tmp_path / f"in/alpaca/{number}.json").write_text(alpaca(number * 3000, 3000))
    settings = tmp_path / "config.py"
    settings.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=''):\n"
        "    return ConfigDict({'sources': {'alpaca': {}}, 'heldout': 0.1})\n"
    )
    command = [sys.executable, "-m", "data_pipelines.prepare", f"--config={settings}", f"--input={tmp_path / 'in'}"]

    def start(output):
        return subprocess.Popen(
            [*command, f"--output={output}", "--workers=2"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.monotonic() - begun
    pick = random.Random(kills)
    for _ in range(kills):
        process = start(tmp_path / "killed")
        time.sleep(pick.uniform(0.3, 0.9) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "killed")]
    assert manifests[0]["hash"] == manifests[1]["hash"]
    splits = [manifest["sources"]["alpaca"]["splits"]["train"]["sha256"] for manifest in manifests]
    assert splits[0] == splits[1]


def test_what_a_killed_run_left_is_removed(folder, tmp_path, toys):
    cache = tmp_path / "out.cache"
    (cache / "dataset/0.tmp/alpaca").mkdir(parents=True)
    (cache / "dataset/0.tmp/alpaca/half.tmp").touch()
    (cache / "read").mkdir()
    (cache / "read/1.jsonl.gz.77.tmp").touch()
    prepare(config(), folder, tmp_path / "out")
    assert not [*cache.rglob("*.tmp")] and [*cache.glob("read/*.gz")]


def test_code_counts_by_what_it_does(tmp_path, monkeypatch):
    (tmp_path / "pipes").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(addresses, "PACKAGE", "pipes")

    def code(first="def f():\n    return inner.g()\n", second="def g():\n    return 1\n"):
        (tmp_path / "pipes/__init__.py").touch()
        (tmp_path / "pipes/outer.py").write_text(f"from pipes import inner\n{first}")
        (tmp_path / "pipes/inner.py").write_text(second)
        addresses.code_of.cache_clear()
        return addresses.code_of("pipes.outer")

    was = code()
    assert code(first='def f():\n    """Says why."""\n    return inner.g()  # and how\n') == was
    assert code(first="def f():\n    return -inner.g()\n") != was
    assert code(second="def g():\n    return 2\n") != was
    assert code(first="def f():\n    import jinja2\n    return inner.g()\n") != was
    assert code() == was
    addresses.code_of.cache_clear()


@pytest.mark.parametrize(
    ("package", "line", "changed"),
    [
        ("mine_a", "from mine_a import helpers", "helpers"),
        ("mine_b", "from . import helpers", "helpers"),
        ("mine_c", "from .helpers import A", "helpers"),
        ("mine_d", "import json", "__init__"),
        ("mine_e", "import json", None),
    ],
)
def test_code_of_a_source_from_elsewhere_counts_like_ours(tmp_path, monkeypatch, package, line, changed):
    folder = tmp_path / package
    folder.mkdir()
    for name, text in {"__init__": "", "helpers": "A = 1\n", "apart": "B = 1\n", "source": f"{line}\n"}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def code():
        addresses.code_of.cache_clear()
        return addresses.code_of(f"{package}.source")

    was = code()
    (folder / f"{changed or 'apart'}.py").write_text("A = 2\n")
    assert (code() != was) == (changed is not None)
    addresses.code_of.cache_clear()


def test_duplicates_across_sources_and_what_they_name(folder, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(read, "CHUNK", 8)
    for module in (graph, graph_dedupe):
        write = store.write_chunk
        monkeypatch.setattr(module, "write_chunk", lambda path, samples, stage, ledger, write=write: (
            ran.append(stage), write(path, samples, stage, ledger))[1])  # fmt: skip
    (folder / "other/a.json").write_text(alpaca(12, 20))
    settings = ConfigDict({**config().to_dict(), "stages": {"dedupe": {}}})
    manifest, count = run(folder, tmp_path, ran, settings)
    accounts = {name: entry["stages"]["dedupe"] for name, entry in manifest["sources"].items()}
    assert accounts["alpaca"]["dropped"] == {} and accounts["other"]["dropped"] == {"exact_duplicate": 8}
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert {(r["id"], r["found"]) for r in rejects} == {
        (f"other/a:{row}", f"of alpaca/alpaca/a:{row + 12}") for row in range(1, 9)
    }
    assert count == {"read": 6, "dedupe": 6, "split": 6}
    (folder / "other/b.json").write_text(alpaca(500, 5))
    assert run(folder, tmp_path, ran, settings)[1] == {"read": 1, "dedupe": 1, "split": 1}
    settings.keep = ("other",)
    manifest, count = run(folder, tmp_path, ran, settings)
    accounts = {name: entry["stages"]["dedupe"] for name, entry in manifest["sources"].items()}
    assert accounts["other"]["dropped"] == {} and accounts["alpaca"]["dropped"] == {"exact_duplicate": 8}
    settings.sources.other.stages = {"dedupe": False}
    manifest, _ = run(folder, tmp_path, ran, settings)
    assert manifest["sources"]["alpaca"]["stages"]["dedupe"]["dropped"] == {}


def test_workers_end_with_what_started_them(tmp_path):
    script = (
        "import os, time\n"
        "from data_pipelines.workers import Workers\n"
        "def work(number):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as pool:\n"
        "        pool.run('work', work, [(0,), (1,)])\n"
    )
    (tmp_path / "waits.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "waits.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def runs(process):
    """Whether there is such a process, other than one that nobody has waited for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
