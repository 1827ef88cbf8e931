"""Apache Beam's local runners give what one process gives: the same records in the same order, the same accounts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=""):
    other = {"kind": "alpaca", "patterns": ("other/*.json",)}
    return ConfigDict({
        "sources": {"alpaca": {}, "other": other, "few": {**other, "limit": 40, "stages": {"dedupe": False}}},
        "stages": {"dedupe": {"exact": "query"}}, "keep": ("other",), "heldout": 0.1,
    })
"""


def rows(first, count, answer="an answer to it"):
    """Every fifth question is asked twice; every seventh answer is a text that others only change in a letter."""
    long = "the quick brown fox jumps over the lazy dog and goes on its way " * 5
    for i in range(first, first + count):
        question = f"question {i - 1 if i % 5 == 0 else i}"
        yield {"instruction": question, "output": f"{long}{i}" if i % 7 == 0 else f"{answer} {i}"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    for name, first, count in (
        ("alpaca/a", 0, 2500),
        ("alpaca/b", 2500, 60),
        ("other/c", 100, 300),
        ("other/d", 900, 9),
    ):
        path = tmp_path / "in" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*rows(first, count), {"instruction": "no answer"}]))
    return tmp_path


def run(python, folder, output, *flags):
    command = [python, "-m", "data_pipelines.prepare", f"--config={folder / 'config.py'}", f"--input={folder / 'in'}"]
    return subprocess.run(
        [*command, f"--output={folder / output}", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )


def prepare(python, folder, output, *flags):
    done = run(python, folder, output, *flags)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / output / "manifest.json").read_text())
    return manifest, (folder / output / "rejects.jsonl").read_text()


@pytest.mark.beam
@pytest.mark.parametrize("flags", [(), ("--direct_num_workers=2", "--direct_running_mode=multi_threading")])
def test_beam_makes_what_one_process_makes(folder, beam_python, flags):
    here, rejects = prepare(sys.executable, folder, "here", "--workers=1")
    dropped = {name: entry["stages"].get("dedupe", {}).get("dropped") for name, entry in here["sources"].items()}
    assert dropped["few"] is None and all(dropped["alpaca"].values()) and len(dropped["alpaca"]) == 2
    there, also = prepare(
        beam_python, folder, "there", "--runner=FnApiRunner", *(f"--runner_flag={flag}" for flag in flags)
    )
    assert there["sources"] == here["sources"]  # counts, hashes of the records in their order, shards
    assert there["hash"] == here["hash"] and also == rejects


@pytest.mark.beam
def test_a_row_that_does_not_fit_stops_it_with_its_place(folder, beam_python):
    done = run(beam_python, folder, "there", "--runner=FnApiRunner", "--policy=error")
    assert done.returncode == 1  # what Beam logs of it comes before
    assert re.match(r"(alpaca|other)/[a-d]\.json, row \d+: found an object", done.stderr.splitlines()[-1])


def test_without_beam_it_says_what_to_install(folder):
    pytest.importorskip("array_record")
    done = subprocess.run(
        [sys.executable, "-c", "import apache_beam"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        pytest.skip("apache_beam is installed here")
    with pytest.raises(AssertionError, match=r"found no apache_beam; expected it installed: pip install"):
        prepare(sys.executable, folder, "out", "--runner=DirectRunner")
