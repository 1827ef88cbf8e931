"""Prepare data: `python -m data_pipelines.prepare --config=configs/data/koala.py --input DIR --output DIR`.

Samples go through a graph of stages, from the files of every source to one TFDS dataset a source:

    read → tools → normalise → filter → dedupe → decontaminate → redact → split → write

    OUTPUT/manifest.json        counts, hashes and the configuration (see `datasets`)
    OUTPUT/<source>/1.0.0/      the conversations, splits "train" and "heldout"
    OUTPUT/rejects.jsonl        all that was left out: source, stage, place, reason, what was found
    OUTPUT/tokenizer/           tokenizer.json, if the configuration trains one
    OUTPUT.cache/               what every stage made of every chunk (see `store`); may be deleted

The configuration (`settings` says what it may hold) names the stages and their options, and may change them for a
source. What a stage made is kept: a stage that changed runs again, and so does what follows it, and nothing else; so
does a run that was killed go on. A row that does not fit stops the run with `--policy error`, or is counted and left
out with `--policy skip`. The same input and configuration give the same manifest hash on every machine, with any number
of processes. A complete OUTPUT is left alone if it is of this configuration and these files; if it is of others, that
is an error, unless `--force` has it replaced.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from data_pipelines import datasets
from data_pipelines.datasets import Manifest
from data_pipelines.disk import locked
from data_pipelines.errors import InputError
from data_pipelines.files.folder import Folder
from data_pipelines.inert import inert
from data_pipelines.preparing import graph
from data_pipelines.preparing.graph_dedupe import dedupe
from data_pipelines.preparing.settings import KEYS, plan_all, read_settings
from data_pipelines.preparing.store import Made, Store, read_drops
from data_pipelines.reporting.manifest_table import manifest_table
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.redact import Redact
from data_pipelines.stages.source import PrepareError, Source
from data_pipelines.workers import Workers, cores


def prepare(
    config: ConfigDict,
    input_dir: Path | str | None,
    output_dir: Path | str,
    *,
    force: bool = False,
    workers: int = 1,
    runner: str = "local",
    runner_flags: Sequence[str] = (),
    shared: str = "",
) -> Manifest:
    """Prepares what `config` says, and returns the manifest; that of a complete `output_dir` if there is one.

    `input_dir` is a path or a URL; it may be None if no source reads files. `runner`: "local" for `workers` processes
    here, or one of Apache Beam's, which gets `runner_flags` and works in `shared`, a folder or URL that all of its
    machines reach (not needed where they are this one). Raises PrepareError for a configuration or folder that does not
    fit, DataError for a row with the policy "error", DatasetError for a damaged `output_dir`, OSError from the
    disk.
    """
    output = Path(output_dir)
    store = Store(output.with_name(output.name + ".cache"))
    settings = read_settings(config)
    existing = None if nothing_of_ours(output) or force else complete(output, settings)
    if existing is not None and (input_dir is None or not Folder(str(input_dir)).exists()):
        if input_dir is not None:
            warn(f"{input_dir}: found no such folder; {output} is complete, but was not compared with its files")
        return existing

    planned, missing = plan_all(settings, None if input_dir is None else str(input_dir))

    with locked(store.folder, "preparation"), Workers(workers) as pool:
        store.tidy()
        ################################### What there is to read ####################################
        planned = graph.with_indexes(planned, store.folder / "benchmarks")
        files = graph.hashed(store, planned, pool)
        made_by = graph.made_by(planned)
        if existing is not None:
            check_same(output, existing, files, made_by)
            return existing

        ########################################## Stages ############################################
        if runner == "local":
            made = stage_by_stage(store, planned, files, settings, pool)
        else:
            made = on_beam(store, planned, settings, shared, runner, runner_flags)
            check_rows(planned, made["read"])
        check_left(planned, made)

        ##################################### Datasets, tokenizer ####################################
        written = graph.write_datasets(store, planned, made["split"], pool)
        tokenizer = graph.train_tokenizer(store, settings.get("tokenizer") or {}, made["split"])

        ########################################## Output ############################################
        scratch = store.folder / "output"
        shutil.rmtree(scratch, ignore_errors=True)  # what a run that was killed left behind
        scratch.mkdir(parents=True)
        parts = {name: folder for name, (folder, _) in written.items()}
        parts |= {"tokenizer": tokenizer[0]} if tokenizer else {}
        for name, folder in parts.items():
            shutil.copytree(folder, scratch / name, copy_function=link)
        write_rejects(scratch / "rejects.jsonl", planned, made)
        entries = {source.name: entry(source, files, made, written[source.name][1]) for source in planned}
        about = {"missing": missing, "tokenizer": tokenizer[1] if tokenizer else None}
        manifest = {"sources": entries, **about, "config": settings, "made_by": made_by}
        finished = datasets.write_manifest(scratch, manifest)
        publish(scratch, output, store.folder / "replaced")
        return finished


def stage_by_stage(
    store: Store, planned: Sequence[Source], files: graph.Files, settings: Mapping[str, Any], pool: Workers
) -> dict[str, graph.Chunks]:
    """stage -> the chunks after it, made by the processes of this machine."""
    made = {"read": graph.read(store, planned, files, settings, pool)}
    check_rows(planned, made["read"])
    wanted = graph.stages_in_use(planned)
    at = wanted.index("dedupe") if "dedupe" in wanted else len(wanted)  # which needs all chunks at once
    before, after = wanted[:at], wanted[at + 1 :]
    made |= graph.apply(store, before, planned, made["read"], pool)
    if at < len(wanted):
        made["dedupe"] = dedupe(store, planned, settings, made[list(made)[-1]], pool)
        made |= graph.apply(store, after, planned, made["dedupe"], pool)
    return made


def on_beam(
    store: Store,
    planned: Sequence[Source],
    settings: Mapping[str, Any],
    shared: str,
    runner: str,
    flags: Sequence[str],
) -> dict[str, graph.Chunks]:
    """The same from Apache Beam."""
    try:
        from data_pipelines.preparing import beam_graph
    except ModuleNotFoundError as error:
        raise PrepareError(
            f"--runner: found no {error.name}; expected it installed: pip install easylm_plus[beam]"
        ) from error
    folder = store.folder / "beam"
    shutil.rmtree(folder, ignore_errors=True)
    if not shared and runner not in beam_graph.LOCAL:
        raise PrepareError(f"--shared: found none; expected a folder or URL that the machines of {runner} reach")
    return beam_graph.run(planned, settings, shared or str(folder), folder, [f"--runner={runner}", *flags])


def complete(output: Path, settings: Mapping[str, Any]) -> Manifest:
    """The manifest of what was prepared before. Raises PrepareError if it is of another configuration."""
    manifest = datasets.read_manifest(output)
    differing = [key for key in KEYS if manifest["config"].get(key) != settings.get(key)]
    if differing:
        raise other(output, f"another configuration (differs in {', '.join(differing)})")
    return manifest


def nothing_of_ours(output: Path) -> bool:
    """Whether there is no output yet. Raises PrepareError for a folder that must not be touched."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return True
    if not (output / datasets.MANIFEST).exists():
        raise PrepareError(f"{output}: found other files there; expected prepared data, or no such folder")
    return False


def other(output: Path, what: str) -> PrepareError:
    return PrepareError(f"{output}: found data prepared with {what}; expected the same, another --output, or --force")


def check_same(output: Path, existing: Manifest, files: graph.Files, made_by: Mapping[str, Any]) -> None:
    """Raises PrepareError if the data was prepared from other files, by other code or against other benchmarks."""
    was = {(name, f["path"]): f["sha256"] for name, entry in existing["sources"].items() for f in entry["files"]}
    now = {(name, path): f["sha256"] for name, each in files.items() for path, f in each.items()}
    differing = [place for place in {**was, **now} if was.get(place) != now.get(place)]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise other(output, f"other files ({', '.join(path for _, path in differing[:3])}{more})")
    before = existing["made_by"]
    changed = [key for key in {**before, **made_by} if before.get(key) != made_by.get(key)]
    if changed:
        raise other(output, f"other code, libraries or benchmarks ({', '.join(changed)})")


def check_rows(planned: Sequence[Source], read: graph.Chunks) -> None:
    """Raises PrepareError for a source of which no row fits."""
    for source in planned:
        ledger = total(read[source.name])
        if not ledger.left:
            drops = (drop for made in read[source.name] for drop in read_drops(made.path, "read"))
            d = next(drops, {"file": source.name, "row": 0, "found": "nothing", "expected": "a row or more"})
            first = f"{d['file']}, row {d['row']}: found {d['found']}; expected {d['expected']}"
            raise PrepareError(f"sources.{source.name}: none of {ledger.entered} rows fits; the first: {first}")


def check_left(planned: Sequence[Source], made: Mapping[str, graph.Chunks]) -> None:
    """Raises PrepareError if the stages left nothing; says so of a source, which may be a copy of another."""
    empty = [source for source in planned if not total(made["split"][source.name]).left]
    for source in empty:
        dropped = {stage: dict(total(made[stage][source.name]).dropped) for stage in source.stages}
        told = f"sources.{source.name}: the stages left nothing of it; dropped: {dropped}"
        if len(empty) == len(planned):
            raise PrepareError(told)
        warn(told)


def warn(text: str) -> None:
    Console(stderr=True).print(inert(text), markup=False, highlight=False, soft_wrap=True)


def total(chunks: list[Made]) -> Ledger:
    """The accounts of a stage over all chunks of a source."""
    sum_ = Ledger()
    for made in chunks:
        sum_.add(made.ledger)
    return sum_


def entry(
    source: Source, files: graph.Files, made: Mapping[str, graph.Chunks], splits: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says about a source."""
    read = total(made["read"][source.name])
    return {
        "kind": source.kind,
        "licence": getattr(source.module, "LICENCE", "not stated"),
        "weight": source.options.get("weight") or 0,
        "files": [{"path": path, **described} for path, described in files[source.name].items()],
        "rows": read.entered,
        "kept_rows": read.left,
        "rejected": ordered(read.dropped),
        "repaired": ordered(read.changed),
        "stages": {stage: stage_entry(total(made[stage][source.name])) for stage in source.stages},
        "splits": splits,
    }


def stage_entry(ledger: Ledger) -> dict[str, Any]:
    return {
        "entered": ledger.entered,
        "left": ledger.left,
        "dropped": ordered(ledger.dropped),
        "changed": ordered(ledger.changed),
        "seen": {table: ordered(counts) for table, counts in sorted(ledger.seen.items())},
    }


def ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def write_rejects(path: Path, planned: Sequence[Source], made: Mapping[str, graph.Chunks]) -> None:
    """All drops, source by source and stage by stage, in the order of the samples. Where a source is redacted, so is
    what is quoted of its drops."""
    with open(path, "w", encoding="utf-8") as file:
        for source in planned:
            options = source.stages.get("redact")
            quoted = (lambda text: text) if options is None else Redact(options).text
            for stage in ("read", *source.stages):
                for chunk in made[stage][source.name]:
                    for drop in read_drops(chunk.path, stage) if chunk.ledger.dropped else ():
                        shown = {key: quoted(drop[key]) for key in ("found", "excerpt") if key in drop}
                        file.write(json.dumps({"source": source.name, "stage": stage, **drop, **shown}) + "\n")


def link(source: str, target: str) -> None:
    """A second name for a file of the cache; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def publish(scratch: Path, output: Path, replaced: Path) -> None:
    """Puts `scratch` in the place of `output`. Stored tokens stay: they are found by what they were made of."""
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
        if (replaced / "tokens").exists():
            (replaced / "tokens").rename(scratch / "tokens")
    scratch.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"found the argument {argv[1]!r}; expected flags alone")
    if "://" in str(FLAGS.output) or not Path(FLAGS.output).name:
        sys.exit(f"--output: found {FLAGS.output!r}; expected a new folder on this machine, by its name")
    config, output = FLAGS.config, FLAGS.output
    if FLAGS.policy:
        with config.unlocked():
            config.policy = FLAGS.policy
    try:
        workers = FLAGS.workers or cores()
        where = {"workers": workers, "runner": FLAGS.runner, "runner_flags": FLAGS.runner_flag, "shared": FLAGS.shared}
        manifest = prepare(config, FLAGS.input, output, force=FLAGS.force, **where)
    except InputError as error:
        sys.exit(inert(f"{error}"))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit(
                f"{output}: found no space left on the disk; expected more for it and {output}.cache: free some, or "
                "choose another --output"
            )
        sys.exit(inert(f"{error}"))
    Console().print(manifest_table(manifest))
    Console().print(f"{output}: hash {manifest['hash']}", markup=False, highlight=False, soft_wrap=True)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to prepare, such as configs/data/koala.py")
    flags.DEFINE_string("input", None, "Folder with the files of the sources, a path or a URL")
    flags.DEFINE_string("output", None, "Folder to write")
    flags.DEFINE_enum("policy", None, ["error", "skip"], "What a row that does not fit does; over the configuration's")
    flags.DEFINE_bool("force", False, "Replace prepared data in the output folder")
    flags.DEFINE_integer("workers", 0, "Processes; 0: as many as there are cores", lower_bound=0)
    flags.DEFINE_string("runner", "local", "local, or a runner of Apache Beam such as DirectRunner or DataflowRunner")
    flags.DEFINE_string("shared", "", "A folder or URL that all machines of a runner reach")
    flags.DEFINE_multi_string(
        "runner_flag", [], "A flag for it, such as --runner_flag=--direct_num_workers=8; repeatable"
    )
    flags.mark_flags_as_required(["config", "output"])
    app.run(main)
