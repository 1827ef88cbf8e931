"""Tokenise prepared data once, for all runs: `python -m data_pipelines.tokenize DIR --template=koala --length=2048`.

Writes the tokens of every source and split beside the conversations (tokens.py says where and how), for runs whose
`data` section has the same template, tokenizer, date, length and packing; all others go on tokenising as they read. A
run that was killed goes on where it was, and what is there already is left alone. Examples are cut at length + 1 ids;
with --packing=concat_split those of training are kept whole.
"""

import dataclasses
import errno
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from data_pipelines.batches import tokens
from data_pipelines.batches.packing import PACKINGS, Packing
from data_pipelines.batches.training_data import chosen_sources, longest, template_date
from data_pipelines.conversation import Conversation
from data_pipelines.datasets import open_source, read_manifest
from data_pipelines.disk import locked
from data_pipelines.errors import InputError
from data_pipelines.inert import inert
from data_pipelines.templates.template import Template, load_template
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from data_pipelines.workers import Workers, advance, cores


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


def tokenise(job: Job, pool: Workers) -> list[Path]:
    """Writes all stores that are not there yet, and returns the paths of all."""
    splits = job.splits()
    if not all(tokens.stored(job.directory, split.source, split.name) for split in splits):
        pool.begin()  # while this process opens the tokenizer
    paths = {split: path_of(job, split) for split in splits}
    todo = [split for split, path in paths.items() if not path.is_dir()]
    todo.sort(key=lambda split: -split.examples)  # the longest first: the others do not wait for it at the end
    tasks = [(job, split, part) for split in todo for part in tokens.parts(split.examples)]
    if not todo:
        return list(paths.values())
    with locked(Path(job.directory) / "tokens", "tokenisation"):
        pool.run("tokenise", write, tasks, sum(split.examples for split in todo))
        for split in todo:
            tokens.finish(paths[split], split.hash, template_of(job, split.name), split.examples)
    return list(paths.values())


def write(job: Job, split: Split, part: int) -> None:
    """One file of a store."""
    conversations = _conversations(job, split.source, split.name)
    tokens.write_part(conversations, template_of(job, split.name), path_of(job, split), part, advance)


def path_of(job: Job, split: Split) -> Path:
    return tokens.store_path(job.directory, split.source, split.name, split.hash, template_of(job, split.name))


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


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("expected one folder: python -m data_pipelines.tokenize DIR --template=koala")
    sources, workers = tuple(FLAGS.sources), FLAGS.workers or cores()
    job = Job(argv[1], FLAGS.template, FLAGS.tokenizer, FLAGS.length, FLAGS.packing, FLAGS.date, sources)
    try:
        with Workers(workers) as pool:
            paths = tokenise(job, pool)
        for path in paths:
            store = tokens.TokenStore(path)
            print(f"{path}: {len(store):,} examples, {store.ids:,} ids")
    except (InputError, FileNotFoundError) as error:
        sys.exit(inert(f"{error}"))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
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
    flags.DEFINE_integer("workers", 0, "Processes; 0: as many as there are cores", lower_bound=0)
    app.run(main)
