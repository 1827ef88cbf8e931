"""The steps of preparation on one machine: each finds in the store what it need not do again, and shares the rest out
among the workers. `prepare` puts them in their order; `beam_graph` has the same order for Apache Beam.

What happens to a chunk is the same function everywhere (`read_chunks`, `stage_chunk`); here is what its key is made of.
"""

import dataclasses
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines import datasets, stages
from data_pipelines.addresses import code_of, key_of, sha256_of
from data_pipelines.contamination.index import prepared_index
from data_pipelines.conversation import Conversation
from data_pipelines.disk import write_whole
from data_pipelines.preparing.settings import made_of
from data_pipelines.preparing.store import Made, Store, made_before, read_lines, read_samples, write_chunk
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.read import Reader
from data_pipelines.stages.source import PrepareError, Source
from data_pipelines.token_ids import ROLE
from data_pipelines.tokenizers import training as tokenizer_training
from data_pipelines.workers import Workers, advance

Chunks = dict[str, list[Made]]  # source -> its chunks, in order
Files = dict[str, dict[str, dict[str, Any]]]  # source -> file -> bytes, sha256
Tasks = list[tuple[Any, ...]]

############################################### Files ################################################


def hashed(store: Store, planned: Sequence[Source], pool: Workers) -> Files:
    """Size and sha256 of every file. One that is as large and as old as it was when last hashed is not read again."""
    memory = store.folder / "files.json"
    known: dict[str, Any] = json.loads(memory.read_text()) if memory.exists() else {}
    stamps = {
        (source.name, file): {"url": f"{source.folder.url}/{file}", **source.folder.stamp(file)}
        for source in planned
        for file in source.files
    }
    places = {place: json.dumps(stamp, sort_keys=True) for place, stamp in stamps.items()}
    folders = {source.name: source.folder for source in planned}
    new = [place for place, stamp in places.items() if stamp not in known or stamps[place]["changed"] is None]
    digests = pool.run("hash", hash_file, [(folders[name], file) for name, file in new]) if new else []
    known |= {places[place]: digest for place, digest in zip(new, digests)}
    if new:
        write_whole(memory, json.dumps({stamp: known[stamp] for stamp in places.values()}).encode())
    found: Files = {source.name: {} for source in planned}
    for (name, file), stamp in places.items():
        found[name][file] = {"bytes": stamps[name, file]["bytes"], "sha256": known[stamp]}
    return found


def hash_file(folder: Any, file: str) -> str:
    digest: str = folder.sha256(file)
    return digest


############################################# Benchmarks #############################################


def with_indexes(planned: Sequence[Source], work: Path) -> list[Source]:
    """The sources with an index of the benchmarks in `work` for each that is decontaminated, in place of what says
    which benchmarks these are."""
    known: dict[str, dict[str, Any]] = {}  # most sources are compared with the same benchmarks
    found = []
    for source in planned:
        if "decontaminate" in source.stages:
            options = source.stages["decontaminate"]
            key = json.dumps(options, sort_keys=True)
            known[key] = known.get(key) or indexed(source.name, options, work)
            source = dataclasses.replace(source, stages={**source.stages, "decontaminate": known[key]})
        found.append(source)
    return found


def indexed(name: str, options: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """The options of the stage itself."""
    own = dict(options)
    benchmarks, folder = own.pop("benchmarks", None), own.pop("folder", ".")
    if not benchmarks:
        raise PrepareError(f"sources.{name}, stage decontaminate: found no benchmarks; expected name -> files")
    index, digest = prepared_index(benchmarks, folder, work, own.pop("items", None))
    own |= {"index": str(index), "sha256": digest}
    made_of(name, "decontaminate", own)
    return own


############################################### Stages ###############################################


def read(store: Store, planned: Sequence[Source], files: Files, settings: Mapping[str, Any], pool: Workers) -> Chunks:
    """Reads all sources, a task a file; those with a limit, or without files, are one task."""
    options = read_options(settings)
    code = code_of(stages.module_of("read"))
    tasks: Tasks = []
    for source in planned:
        for part in source.parts():
            digests = [(file, files[source.name][file]["sha256"]) for file in part]
            own = {key: value for key, value in source.options.items() if key not in ("weight", "stages")}
            own["python"] = platform.python_version() if source.generated else ""  # whose library it may read
            key = key_of(code, code_of(source.module.__name__), source.name, source.kind, own, options, digests)
            tasks.append((store, source, part, options, key))
    total = sum(file["bytes"] for each in files.values() for file in each.values())
    made: Chunks = {source.name: [] for source in planned}
    for task, chunks in zip(tasks, pool.run("read", read_chunks, tasks, total or None)):
        made[task[1].name] += chunks
    return made


def read_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a Reader is told, besides the source."""
    return {"max_turn_chars": settings["max_turn_chars"], "strict": settings["policy"] == "error"}


def read_chunks(
    store: Store, source: Source, files: tuple[str, ...], options: Mapping[str, Any], key: str
) -> list[Made]:
    """The chunks of some files. Their list is written last, so a killed run reads a file again from its start."""
    index = store.path("read", key, ".json")
    if index.exists():
        before = [made_before(store.path("read", name), "read") for name in json.loads(index.read_text())]
        if None not in before:
            return [made for made in before if made is not None]
    made: list[Made] = []
    names: list[str] = []
    for number, (samples, ledger) in enumerate(Reader(source, **options, progress=advance).chunks(files)):
        names.append(f"{key}-{number:05d}")
        made.append(write_chunk(store.path("read", names[-1]), samples, "read", ledger))
    write_whole(index, json.dumps(names).encode())
    return made


def made_by(planned: Sequence[Source]) -> dict[str, str]:
    """Hashes of the code of all stages and sources, and of the benchmarks that each source is compared with."""
    found = {stage: code_of(stages.module_of(stage)) for stage in ("read", *stages_in_use(planned))}
    for source in planned:
        found[f"sources.{source.name}"] = code_of(source.module.__name__)
        if "decontaminate" in source.stages:
            found[f"benchmarks of {source.name}"] = source.stages["decontaminate"]["sha256"]
    return found


def stages_in_use(planned: Sequence[Source]) -> list[str]:
    """The stages after reading, in their order."""
    return [stage for stage in (*stages.CONFIGURED, "split") if any(stage in source.stages for source in planned)]


def apply(
    store: Store, wanted: Sequence[str], planned: Sequence[Source], before: Chunks, pool: Workers
) -> dict[str, Chunks]:
    """What some stages, one after the other, make of the chunks of all sources: stage -> chunks; a source without a
    stage keeps those that it has."""
    code = {stage: code_of(stages.module_of(stage)) for stage in wanted}
    steps = {
        source.name: [(stage, source.stages[stage], code[stage]) for stage in wanted if stage in source.stages]
        for source in planned
    }
    tasks = [(store, steps[source.name], made) for source in planned for made in before[source.name]]
    results = iter(pool.run(", ".join(wanted), stage_chunk, tasks))
    after: dict[str, Chunks] = {stage: {source.name: [] for source in planned} for stage in wanted}
    for source in planned:
        for made in before[source.name]:
            found = next(results)
            for stage in wanted:
                made = found.get(stage, made)
                after[stage][source.name].append(made)
    return after


def stage_chunk(store: Store, steps: Sequence[tuple[str, Mapping[str, Any], str]], before: Made) -> dict[str, Made]:
    """stage -> what it made of a chunk, for steps of (stage, options, hash of its code). The samples stay in memory
    from one stage to the next; each stage's are written all the same, so that it need not run again."""
    found: dict[str, Made] = {}
    samples: list[Sample] | None = None
    for stage, options, code in steps:
        counting = {key: value for key, value in options.items() if key != "index"}  # its path; it has its sha256
        target = store.path(stage, key_of(code, counting, before.digest))
        made = made_before(target, stage)
        if made is None:
            ledger = Ledger()
            given = read_samples(before.path) if samples is None else samples
            samples = list(stages.make(stage, options)(given, ledger))
            made = write_chunk(target, samples, stage, ledger)
        else:
            samples = None
        found[stage] = before = made
    return found


############################################### Output ###############################################


def write_datasets(
    store: Store, planned: Sequence[Source], chunks: Chunks, pool: Workers
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """source -> the folder of its dataset, and what the manifest says of its splits."""
    code = code_of(datasets.__name__)
    tasks = [(store, name, made, key_of(code, name, [m.digest for m in made])) for name, made in chunks.items()]
    return dict(zip(chunks, pool.run("write", write_dataset, tasks)))


def write_dataset(store: Store, name: str, chunks: Sequence[Made], key: str) -> tuple[Path, dict[str, Any]]:
    folder, summary = store.folder / "dataset" / key, store.path("dataset", key, ".json")
    if not (summary.exists() and datasets.whole(folder, json.loads(summary.read_text()))):
        scratch = folder.with_name(f"{key}.tmp")
        for left in (scratch, folder):
            shutil.rmtree(left, ignore_errors=True)
        described = datasets.write_source(scratch, name, records(chunks))
        (scratch / name).rename(folder)
        scratch.rmdir()
        write_whole(summary, json.dumps(described).encode())
    return folder, json.loads(summary.read_text())


def records(chunks: Sequence[Made]) -> Iterator[datasets.Record]:
    """As the last stage wrote them: nothing has to be parsed."""
    for made in chunks:
        for line in read_lines(made.path):
            head, *written = line.split("\t")
            _, split, characters = json.loads(head)
            yield datasets.Record(split, written, characters)


def conversations(chunks: Sequence[Made], split: str) -> Iterator[Conversation]:
    for made in chunks:
        for sample in read_samples(made.path):
            if sample.split == split:
                yield from sample.conversations


def train_tokenizer(store: Store, options: Mapping[str, Any], chunks: Chunks) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the tokenizer, and what the manifest says of it; None if none is wanted."""
    if not options.get("train"):
        return None
    digests = [made.digest for each in chunks.values() for made in each]
    folder = store.folder / "tokenizer" / key_of(code_of(tokenizer_training.__name__), dict(options), digests)
    if not folder.exists():
        scratch = folder.with_name(f"{folder.name}.tmp")
        special_tokens = tuple(options.get("special_tokens") or ())
        try:
            tokenizer_training.train(texts(chunks), options["vocab_size"], special_tokens, scratch)
        except ValueError as error:
            raise PrepareError(f"config.tokenizer: {error}") from error
        scratch.rename(folder)
    path = folder / tokenizer_training.FILE
    return folder, {"path": f"tokenizer/{path.name}", "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def texts(chunks: Chunks) -> Iterator[str]:
    """All that is said in the train splits; token ids are of another tokenizer, and no text."""
    for each in chunks.values():
        for conversation in conversations(each, "train"):
            yield from (turn.text for turn in conversation.turns if turn.role != ROLE)
