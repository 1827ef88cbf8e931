"""Apache Beam beside one machine: `prepare` of a made-up corpus by both, which must give the same records.

    ~/beam/bin/python benchmarks/beam_corpus.py --documents=100000 --runner=FnApiRunner

Runs in the environment with Apache Beam (benchmarks/README.md). The corpus: conversations of about a kilobyte in twenty
files and two sources, of which one in twenty is a copy of an earlier one, half of these with a few letters changed; all
stages that need no evaluation files. Compared are the manifests' hashes, which cover every record in order, and the
lists of drops, line by line.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines.prepare import prepare

FILES = 20


def conversation(pick: random.Random, words: list[str], earlier: list[tuple[str, str]]) -> tuple[str, str]:
    """A question and its answer; sometimes one that was there, as it was or with a few letters changed."""
    if earlier and pick.random() < 0.05:
        question, answer = pick.choice(earlier)
        if pick.random() < 0.5:
            letters = list(answer)
            for _ in range(5):
                letters[pick.randrange(len(letters))] = pick.choice("abcdefgh")
            answer = "".join(letters)
        return question, answer
    made = " ".join(pick.choices(words, k=15)), " ".join(pick.choices(words, k=150)) + "."
    if len(earlier) < 20_000:
        earlier.append(made)
    return made


def write(folder: Path, documents: int) -> None:
    pick = random.Random(0)
    words = ["".join(pick.choices("etaoinshrdlucmfwyp", k=pick.randint(2, 9))) for _ in range(5000)]
    earlier: list[tuple[str, str]] = []
    for number in range(FILES):
        path = folder / ("first" if number % 2 else "second") / f"{number:02d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            for _ in range(documents // FILES):
                question, answer = conversation(pick, words, earlier)
                contact = (
                    f" Write to {pick.choice(words)}@mail.{pick.choice(words)}.net." if pick.random() < 0.1 else ""
                )
                file.write(json.dumps({"instruction": question, "output": answer + contact}) + "\n")


def settings() -> ConfigDict:
    sources = {name: {"kind": "alpaca", "patterns": (f"{name}/*.jsonl",)} for name in ("first", "second")}
    stages = {"normalise": {}, "filter": {"min_chars": 20, "repeated_digits": True}, "dedupe": {}, "redact": {}}
    return ConfigDict({"sources": sources, "stages": stages, "heldout": 0.01, "keep": ("second",)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--runner", default="FnApiRunner")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder / "in", arguments.documents)
        made = {}
        for name, where in (("local", {"workers": arguments.workers}), ("beam", {"runner": arguments.runner})):
            begun = time.perf_counter()
            manifest = prepare(settings(), folder / "in", folder / name, **where)
            made[name] = manifest["hash"], (folder / name / "rejects.jsonl").read_bytes()
            dropped = {source: entry["stages"]["dedupe"]["dropped"] for source, entry in manifest["sources"].items()}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"{name}: {time.perf_counter() - begun:.0f} s, peak {peak:.1f} GB, duplicates {dropped}", flush=True)
        same = [a == b for a, b in zip(made["local"], made["beam"])]
        print(
            f"{arguments.documents:,} documents: the same records in the same order {same[0]}, the same drops {same[1]}"
        )


if __name__ == "__main__":
    main()
