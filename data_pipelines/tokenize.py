"""Tokenise prepared data once, for all runs: `python -m data_pipelines.tokenize DIR --template=koala --length=2048`.

Writes the tokens of every source and split beside the conversations (tokens.py says where and how), for runs whose
`data` section has the same template, tokenizer, date, length and packing; all others go on tokenising as they read. A
run that was killed goes on where it was, and what is there already is left alone. Examples are cut at length + 1 ids;
with --packing=concat_split those of training are kept whole.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipelines import tokens
from data_pipelines.conversation import Conversation
from data_pipelines.datasets import open_source, read_manifest
from data_pipelines.errors import InputError
from data_pipelines.packing import PACKINGS, Packing
from data_pipelines.template import Template, load_template
from data_pipelines.tokenization import load_tokenizer
from data_pipelines.training_data import chosen_sources, longest, template_date

Counted = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to tokenise, and how: everything that another process needs."""

    directory: str
    template: str
    tokenizer: str
    length: int
    packing: Packing = "best_fit"
    date: str = ""
    sources: tuple[str, ...] = ()

    def splits(self) -> list["Split"]:
        manifest = read_manifest(self.directory)
        names = chosen_sources(self.sources, manifest)[0]
        entries = [
            (name, split, entry) for name in names for split, entry in manifest["sources"][name]["splits"].items()
        ]
        return [Split(name, split, entry["sha256"], entry["examples"]) for name, split, entry in entries]


class Split(NamedTuple):
    """A split of a source; `hash` is the sha256 of its records."""

    source: str
    name: str
    hash: str
    examples: int


def template_of(job: Job, split: str) -> Template:
    """What makes the examples of a split."""
    return _template(job, longest(job.packing if split == "train" else "best_fit", job.length))


@functools.cache
def _template(job: Job, max_length: int | None) -> Template:
    tokenizer = load_tokenizer(job.tokenizer or Path(job.directory) / "tokenizer")
    return load_template(job.template, tokenizer, max_length=max_length, now=template_date(job.date))


@functools.cache
def _conversations(job: Job, source: str, split: str) -> Sequence[Conversation]:
    return open_source(job.directory, source, split)


def run(job: Job, processes: int, progress: Counted = lambda more: None) -> list[Path]:
    """Writes all stores that are not there yet, and returns the paths of all. progress: told how many conversations
    more are done."""
    paths = {split: path_of(job, split) for split in job.splits()}
    todo = []
    for split, path in paths.items():
        if path.is_dir():
            progress(split.examples)
        else:
            todo += [(split, part) for part in tokens.parts(split.examples)]
    todo.sort(key=lambda each: -each[0].examples)  # the longest first: the others do not wait for it at the end
    if processes > 1 and len(todo) > 1:
        _in_processes(job, todo, min(processes, len(todo)), progress)
    else:
        for split, part in todo:
            _write(job, split, part, progress)
    for split, path in paths.items():
        if not path.is_dir():
            tokens.finish(path, split.hash, template_of(job, split.name), split.examples)
    return list(paths.values())


def path_of(job: Job, split: Split) -> Path:
    return tokens.store_path(job.directory, split.source, split.name, split.hash, template_of(job, split.name))


def _write(job: Job, split: Split, part: int, progress: Counted) -> None:
    conversations = _conversations(job, split.source, split.name)
    tokens.write_part(conversations, template_of(job, split.name), path_of(job, split), part, progress)


def _in_processes(job: Job, todo: Sequence[tuple[Split, int]], count: int, progress: Counted) -> None:
    context = multiprocessing.get_context("spawn")
    done, told = context.Value("q", 0), 0
    with concurrent.futures.ProcessPoolExecutor(count, context, _share, (done,)) as pool:
        running = {pool.submit(_write_shared, job, *each) for each in todo}
        while running:
            finished, running = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
            progress(done.value - told)
            told = done.value
            for future in finished:
                if future.exception():
                    pool.shutdown(wait=False, cancel_futures=True)
                future.result()


_DONE: list[Any] = []  # of a worker: the counter that it shares with the others


def _share(done: Any) -> None:
    _DONE.append(done)


def _write_shared(job: Job, split: Split, part: int) -> None:
    def count(more: int) -> None:
        with _DONE[0].get_lock():
            _DONE[0].value += more

    _write(job, split, part, count)


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("expected one folder: python -m data_pipelines.tokenize DIR --template=koala")
    sources, processes = tuple(FLAGS.sources), FLAGS.processes or os.cpu_count() or 1
    job = Job(argv[1], FLAGS.template, FLAGS.tokenizer, FLAGS.length, FLAGS.packing, FLAGS.date, sources)
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Progress(TextColumn("tokenising"), *columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=sum(split.examples for split in job.splits()))
            paths = run(job, processes, lambda more: bar.advance(task, more))
        for path in paths:
            store = tokens.TokenStore(path)
            print(f"{path}: {len(store):,} examples, {store.ids:,} ids")
    except (InputError, FileNotFoundError) as error:
        sys.exit(f"{error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"{error}: the disk is full; free some space, and run the same command again")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("template", None, "koala, yuan, chat, text, tokenizer or a .jinja file", required=True)
    flags.DEFINE_string("tokenizer", "", "Its file or folder; that of the prepared data by default")
    flags.DEFINE_integer("length", 2048, "Tokens a row")
    flags.DEFINE_enum("packing", "best_fit", PACKINGS, "How the runs will pack: concat_split keeps examples whole")
    flags.DEFINE_string("date", "", "YYYY-MM-DD that a chat template's strftime_now writes")
    flags.DEFINE_list("sources", [], "Which sources; all by default")
    flags.DEFINE_integer("processes", 0, "How many at a time; one a core by default")
    app.run(main)
