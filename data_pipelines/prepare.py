"""Prepare data: `python -m data_pipelines.prepare --config=configs/data/koala.py --input DIR --output DIR`.

Reads the files of every source in the configuration, checks every row, splits, and writes one TFDS dataset a source:

    OUTPUT/manifest.json        counts, hashes and the configuration (see `datasets`)
    OUTPUT/<source>/1.0.0/      the conversations, splits "train" and "heldout"
    OUTPUT/rejects.jsonl        every row that was left out, with file, row, turn, reason, found and expected
    OUTPUT/tokenizer/           tokenizer.json, if the configuration trains one

A row that does not fit stops the run with `--policy error`, or is counted and left out with `--policy skip`. The same
input and configuration give the same manifest hash on every machine. Everything is written to OUTPUT.tmp, which
becomes OUTPUT at the end; a complete OUTPUT is left alone, unless `--force` has it replaced after success.

The configuration (see configs/data/koala.py for one):

    sources.<name>   kind (the module in data_pipelines/sources, by default the name), weight (a whole number for the
                     mixture; 0: in proportion to the examples), limit (rows kept), drop_phrases (left out if one occurs
                     in a turn, whatever the case), max_turn_chars; for files patterns, repair, separator; for sources
                     that make their text up the arguments of their `generate`
    heldout          share of the rows that is held out
    policy           "skip" or "error"
    missing          "error", or "skip" to go on without the sources that have no file
    max_turn_chars   characters of a turn, at most
    tokenizer        train, vocab_size, special_tokens: trained on the train splits of all sources
"""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from data_pipelines import datasets, sources
from data_pipelines.conversation import Conversation, DataError
from data_pipelines.datasets import DatasetError, Manifest
from data_pipelines.inspect import manifest_table
from data_pipelines.intake import KEYS, Accounts, Intake, PrepareError, Source, plan, read_settings


def prepare(
    config: ConfigDict, input_dir: Path | str | None, output_dir: Path | str, *, force: bool = False
) -> Manifest:
    """Prepares what `config` says, and returns the manifest; that of a complete `output_dir` if there is one.

    `input_dir` may be None if no source reads files. Raises PrepareError for a configuration or folder that does not
    fit, DataError for a row with the policy "error", DatasetError for a damaged `output_dir`, OSError from the disk.
    """
    output = Path(output_dir)
    settings = read_settings(config)
    existing = finished(output, settings, force)
    if existing is not None:
        return existing
    planned, missing = plan_all(settings, input_dir)
    scratch = output.with_name(output.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # what a run that was killed left behind
    (scratch / "spool").mkdir(parents=True)
    try:
        entries = read_all(planned, settings, scratch)
        tokenizer = train_tokenizer(settings.get("tokenizer") or {}, list(entries), scratch)
        shutil.rmtree(scratch / "spool")
        manifest = {"sources": entries, "missing": missing, "tokenizer": tokenizer, "config": settings}
        complete = datasets.write_manifest(scratch, manifest)
        publish(scratch, output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return complete


def finished(output: Path, settings: dict[str, Any], force: bool) -> Manifest | None:
    """The manifest of a complete `output` to keep. Raises PrepareError for a folder that must not be touched."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / datasets.MANIFEST).exists():
        raise PrepareError(f"{output}: found other files there; expected prepared data, or no such folder")
    if force:
        return None
    manifest = datasets.read_manifest(output)
    differing = [key for key in KEYS if manifest["config"].get(key) != settings.get(key)]
    if differing:
        was = f"prepared with another configuration (differs in {', '.join(differing)})"
        raise PrepareError(f"{output}: found data {was}; expected the same, another --output, or --force")
    return manifest


def plan_all(settings: dict[str, Any], input_dir: Path | str | None) -> tuple[list[Source], dict[str, Any]]:
    """The sources that there are, and of the others (name -> patterns, origin)."""
    folder = Path("." if input_dir is None else input_dir)
    planned = [plan(name, options, folder) for name, options in settings["sources"].items()]
    absent = [source for source in planned if not source.generated and (input_dir is None or not source.files)]
    missing = {source.name: {"patterns": list(source.patterns), "origin": source.module.ORIGIN} for source in absent}
    present = [source for source in planned if source.name not in missing]
    if missing and (settings["missing"] == "error" or not present):
        lines = [f"{name}: {', '.join(m['patterns'])}; from {m['origin']}" for name, m in missing.items()]
        found = f"found no files for {len(missing)} of {len(planned)} sources; expected"
        raise PrepareError(f"{'no input folder' if input_dir is None else folder}: {found}\n  " + "\n  ".join(lines))
    return present, missing


def read_all(planned: list[Source], settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Reads and writes one source after the other; returns their entries of the manifest."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    entries = {}
    with open(scratch / "rejects.jsonl", "w", encoding="utf-8") as rejects, bar:
        for source in planned:
            entries[source.name] = read_source(source, settings, scratch, rejects, bar)
    return entries


def read_source(
    source: Source, settings: dict[str, Any], scratch: Path, rejects: TextIO, bar: Progress
) -> dict[str, Any]:
    paths = [source.folder / file for file in source.files]
    total = sum(path.stat().st_size for path in paths)
    task = bar.add_task(source.name, total=total or None)

    def open_raw(path: Path) -> BinaryIO:
        return bar.open(path, "rb", buffering=0, total=total, task_id=task)

    def on_reject(error: DataError) -> None:
        if settings["policy"] == "error" and not isinstance(error, sources.Filtered):
            raise error
        rejects.write(json.dumps({"source": source.name, **error.to_dict()}) + "\n")

    intake = Intake(source, settings["heldout"], settings["max_turn_chars"], on_reject)
    spools = {split: spool_path(scratch, source.name, split) for split in datasets.SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(path, "w", encoding="utf-8")) for split, path in spools.items()}
        try:
            for split, conversation in intake(open_raw):
                files[split].write(conversation.to_json() + "\n")
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, DataError) or not source.generated:
                raise
            raise PrepareError(f"sources.{source.name}: {error}") from error
    accounts = intake.accounts
    if not accounts.kept_rows:
        raise PrepareError(f"sources.{source.name}: none of {accounts.rows} rows fits; the first: {accounts.first}")
    splits = datasets.write_source(scratch, source.name, {split: read_spool(path) for split, path in spools.items()})
    bar.update(task, total=total or 1, completed=total or 1)
    return entry(source, accounts, splits)


def entry(source: Source, accounts: Accounts, splits: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says about a source."""
    return {
        "kind": source.module.__name__.removeprefix(f"{sources.__name__}."),
        "weight": source.options.get("weight") or 0,
        "files": [{"path": file.as_posix(), **described(source.folder / file)} for file in source.files],
        "rows": accounts.rows,
        "kept_rows": accounts.kept_rows,
        "rejected": dict(sorted(accounts.rejected.items())),
        "repaired": dict(sorted(accounts.repaired.items())),
        "splits": splits,
    }


def described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def spool_path(scratch: Path, source: str, split: str) -> Path:
    return scratch / "spool" / f"{source}.{split}.jsonl"


def read_spool(path: Path) -> Iterator[Conversation]:
    with open(path, "rb") as lines:  # bytes, because text has line breaks other than \n within a line
        yield from map(Conversation.from_json, lines)


def train_tokenizer(options: dict[str, Any], names: list[str], scratch: Path) -> dict[str, Any] | None:
    if not options.get("train"):
        return None
    from data_pipelines import train_tokenizer

    def texts() -> Iterator[str]:
        for name in names:
            for conversation in read_spool(spool_path(scratch, name, "train")):
                yield from (turn.text for turn in conversation.turns)

    try:
        special_tokens = tuple(options.get("special_tokens") or ())
        train_tokenizer.train(texts(), options["vocab_size"], special_tokens, scratch / "tokenizer")
    except ValueError as error:
        raise PrepareError(f"config.tokenizer: {error}") from error
    path = "tokenizer/tokenizer.json"
    return {"path": path, **described(scratch / path)}


def publish(scratch: Path, output: Path) -> None:
    """Puts `scratch` in the place of `output`, whose old content goes last."""
    old = output.with_name(output.name + ".old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    scratch.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"found the argument {argv[1]!r}; expected flags alone")
    config, output = FLAGS.config, FLAGS.output
    if FLAGS.policy:
        with config.unlocked():
            config.policy = FLAGS.policy
    try:
        manifest = prepare(config, FLAGS.input, output, force=FLAGS.force)
    except (PrepareError, DatasetError, DataError) as error:
        sys.exit(f"{error}")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit(
                f"{output}.tmp: found no space left on the disk; expected more: free some, or choose another --output"
            )
        sys.exit(f"{error}")
    Console().print(manifest_table(manifest))
    Console().print(f"{output}: hash {manifest['hash']}", markup=False, highlight=False, soft_wrap=True)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to prepare, such as configs/data/koala.py")
    flags.DEFINE_string("input", None, "Folder with the files of the sources")
    flags.DEFINE_string("output", None, "Folder to write")
    flags.DEFINE_enum("policy", None, ["error", "skip"], "What a row that does not fit does; over the configuration's")
    flags.DEFINE_bool("force", False, "Replace prepared data in the output folder")
    flags.mark_flags_as_required(["config", "output"])
    app.run(main)
