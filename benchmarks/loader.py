"""The loader alone, over tokens that are stored: tokens a second, memory, start, and the way to any step.

    python benchmarks/loader.py --tokenizer=TOKENIZER.model

Makes up 10^6 short examples of seven sources in Koala's proportions (8 to 56 ids, the first third read and the rest
learned), writes them as a store under the key that a run with template `koala` looks for, and measures what a run would
see. Seconds are CPU seconds of the process with all its threads, beside those of the wall; a start is that of a new
process, imports, manifest and tokenizer included. `input_pipeline.py` measures real conversations.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from data_pipelines import datasets
from data_pipelines.batches import tokens
from data_pipelines.batches.training_data import make_loader, open_data
from data_pipelines.conversation import Conversation
from data_pipelines.templates.template import Example, load_template
from data_pipelines.tokenizers import training
from data_pipelines.tokenizers.tokenizer import load_tokenizer

FOLDER = flags.DEFINE_string("folder", None, "where the store is made, or was; a temporary one by default")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer file; by default one is trained")
EXAMPLES = flags.DEFINE_integer("examples", 1_000_000, "of all sources")
BATCHES = flags.DEFINE_integer("batches", 100_000, "over which memory is watched")
LENGTH = flags.DEFINE_integer("length", 512, "tokens a row")
BATCH = flags.DEFINE_integer("batch", 4, "rows a batch")
STEP = flags.DEFINE_integer("step", 0, "a step to look for; by default the one after 10^6 draws")

# examples of Koala's announcement, in thousands
SHARES = {"sharegpt": 30, "hc3": 87, "oig": 30, "alpaca": 52, "hh_rlhf": 160, "webgpt": 20, "summarize": 93}
START = """
import json, sys, time
from data_pipelines.batches.training_data import make_loader, open_data
section = json.loads(sys.argv[1])
loader = make_loader(section, open_data(section), 0)
ready = time.process_time()
next(loader)
print(json.dumps([ready, time.process_time()]))
"""


class MadeUp:
    """Stands for conversations and for the template: what `write_part` asks of either."""

    def __init__(self, source: str, size: int, vocabulary: int):
        self.tokenizer = self
        self.vocab_size, self._source, self._size = vocabulary, source, size
        self._rng = np.random.default_rng(size)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Conversation:
        return Conversation(self._source, str(index), ())

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Example]:
        lengths = self._rng.integers(8, 57, len(conversations))
        ids = self._rng.integers(0, self.vocab_size, lengths.sum(), np.int32)
        cuts = np.split(ids, np.cumsum(lengths)[:-1])
        return [Example(each, (np.arange(len(each)) > len(each) // 3).astype(np.float32)) for each in cuts]


def make(folder: Path, section: dict) -> None:
    """A manifest, and the tokens of its sources; no conversations."""
    template = load_template("koala", load_tokenizer(section["tokenizer"]), max_length=section["length"] + 1)
    entries = {}
    for name, share in SHARES.items():
        size = max(1, EXAMPLES.value * share // sum(SHARES.values()))
        split = {"examples": size, "characters": 0, "sha256": f"{name}{size}", "shards": {}}
        entries[name] = {"kind": name, "weight": 0, "files": [], "rows": size, "kept_rows": size, "rejected": {},
                         "repaired": {}, "stages": {}, "splits": {"train": split}}  # fmt: skip
        path = tokens.store_path(folder, name, "train", split["sha256"], template)
        made = MadeUp(name, size, template.tokenizer.vocab_size)
        for part in tokens.parts(size):
            tokens.write_part(made, made, path, part)  # type: ignore[arg-type]
        tokens.finish(path, split["sha256"], template, size)
    datasets.write_manifest(folder, {"sources": entries, "missing": {}, "tokenizer": None, "config": {}})


def resident() -> float:
    """MB of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def started(section: dict) -> list[str]:
    """A new process to its first batch, three times: the median."""
    runs = []
    for _ in range(3):
        wall = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", START, json.dumps(section)], capture_output=True, text=True, check=True
        )
        runs.append((*json.loads(process.stdout), time.perf_counter() - wall))
    opened, first, wall = sorted(runs)[1]
    return [f"opened after {opened:.2f} CPU s, first batch after {first:.2f}", f"{wall:.2f} s"]


def read(section: dict) -> tuple[list[str], list[str]]:
    """Tokens a second and the growth of memory over the batches, from the 1,000th on."""
    loader = make_loader(section, open_data(section), 0)
    warm, total = min(1000, BATCHES.value // 2), 0
    for number in range(BATCHES.value):
        if number == warm:
            memory, wall, cpu = resident(), time.perf_counter(), time.process_time()
        batch = next(loader)
        if number >= warm:
            total += int(np.count_nonzero(batch.arrays["segment_ids"]))
    wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, resident()
    padding = loader.stats()["padding_share"]
    speed = f"{total / cpu:,.0f} tokens a CPU second ({total:,} tokens, padding {padding:.2%})"
    return [speed, f"{total / wall:,.0f} a second"], [f"{memory:.0f} MB, {after - memory:+.1f} MB at the end", ""]


def sought(section: dict) -> list[str]:
    """The way to a step by the lengths alone."""
    loader = make_loader(section, open_data(section), 0)
    rows_a_draw = 32 / section["length"]
    step = STEP.value or int(1e6 * rows_a_draw / section["batch_size"])
    wall, cpu = time.perf_counter(), time.process_time()
    loader.seek(step)
    next(loader)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    draws = step * section["batch_size"] / rows_a_draw
    return [f"step {step + 1:,} (about {draws:,.0f} draws): {cpu:.2f} CPU s", f"{wall:.2f} s"]


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(FOLDER.value or temporary)
        tokenizer = TOKENIZER.value or str(folder / "tokenizer")
        section = {"path": str(folder), "sources": (), "tokenizer": tokenizer, "template": "koala", "shards": 0,
                   "length": LENGTH.value, "batch_size": BATCH.value, "packing": "best_fit", "pool": 1024}  # fmt: skip
        if not (folder / datasets.MANIFEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            if not TOKENIZER.value:
                training.train(["made up " * 100], 512, (), tokenizer)
            make(folder, section)
        table = Table(f"{EXAMPLES.value:,} stored examples, {BATCH.value} rows x {LENGTH.value}", "CPU", "wall")
        table.add_row("start", *started(section))
        speed, memory = read(section)
        table.add_row("batches", *speed)
        table.add_row(f"memory over {BATCHES.value:,} batches", *memory)
        table.add_row("to a step", *sought(section))
        Console(width=150).print(table)


if __name__ == "__main__":
    app.run(main)
