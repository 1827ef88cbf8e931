"""The same graph on Apache Beam, for corpora beyond one machine: `prepare --runner=DataflowRunner`, or any other.

The functions that read, those of the stages and those that find duplicates are the same as in `graph`; Beam decides
where they run. Elements are chunks, as the bytes that `store` would write, each under its place: source, file and
number within the file, packed into an integer with room for a position, so that place plus position is the rank of a
sample, and ranks have the order in which one machine reads. To find duplicates, samples are grouped by the keys of
their signatures. The last chunks are written to a folder that all machines must reach, and the datasets are made of
them as on one machine: the same records in the same order.

A file is read by one worker, so many files of a few gigabytes are better than one large file. Beam does all of it anew
each time, and goes on by its own means where a worker is lost.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import fsspec
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines import stages
from data_pipelines.conversation import DataError
from data_pipelines.errors import InputError
from data_pipelines.preparing.graph import Chunks, read_options
from data_pipelines.preparing.graph_dedupe import deduper
from data_pipelines.preparing.settings import by_rank
from data_pipelines.preparing.store import packed, read_made, unpacked
from data_pipelines.stages import dedupe
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.edges import Edges, bucket_edges, resolve
from data_pipelines.stages.minhash import NO_KEY, SCHEME
from data_pipelines.stages.read import Reader
from data_pipelines.stages.source import Source

FILE_BITS, CHUNK_BITS, POSITION_BITS = 20, 20, 12  # of a rank, below those of the source
RANK_BYTES = 8

LOCAL = ("DirectRunner", "FnApiRunner", "PrismRunner", "InMemoryRunner", "InteractiveRunner")  # on this machine
Piece = tuple[int, bytes]  # place, packed chunk
Edge = tuple[int, bool, float, str]  # rank of the earlier sample, exact or not, similarity, its "source/id"


def run(
    planned: Sequence[Source], settings: Mapping[str, Any], shared: str, local: Path, arguments: Sequence[str]
) -> dict[str, Chunks]:
    """stage -> the chunks after it, of all sources, as `graph` gives them.

    `shared`: a new folder, by path or URL, that all machines reach; `local`: one of this machine that gets a copy of
    it, or the same. `arguments` are Beam's own flags.
    """
    options = read_options(settings)
    planned = [with_index_in(source, shared) for source in planned] if "://" in shared else planned
    by_name = {source.name: source for source in by_rank(planned, settings)}
    before, after = cut_at("dedupe")
    with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
        pieces = (
            pipeline
            | "sources" >> beam.Create(tasks(by_name.values()))
            | "one by one" >> beam.Reshuffle()
            | "read" >> beam.FlatMap(read_pieces, by_name, options)
            | "stages before" >> beam.Map(go_through, by_name, before)
        )
        if any("dedupe" in source.stages for source in planned):
            found = (
                pieces
                | "signatures" >> beam.FlatMap(members, by_name)
                | "buckets" >> beam.GroupByKey()
                | "compare" >> beam.FlatMap(edges_of)
                | "first" >> beam.CombinePerKey(first_edge)
                | "all edges" >> beam.combiners.ToList()
                | "keepers" >> beam.FlatMap(keepers)
            )
            pieces = (
                {"piece": pieces, "found": found}
                | "by place" >> beam.CoGroupByKey()
                | "drop" >> beam.Map(drop, by_name)
            )
        _ = (
            pieces
            | "stages after" >> beam.Map(go_through, by_name, after)
            | "write" >> beam.Map(write, by_name, shared)
        )
    return gathered(planned, shared, local)


def with_index_in(source: Source, shared: str) -> Source:
    """The source with a copy of its index of benchmarks where all machines reach it."""
    if "decontaminate" not in source.stages:
        return source
    options = dict(source.stages["decontaminate"])
    target = f"{shared}/benchmarks/{Path(options['index']).name}"
    with open(options["index"], "rb") as file, fsspec.open(target, "wb", auto_mkdir=True) as copy:
        shutil.copyfileobj(file, copy)
    return dataclasses.replace(source, stages={**source.stages, "decontaminate": {**options, "index": target}})


def cut_at(stage: str) -> tuple[list[str], list[str]]:
    """The stages before it and after it."""
    at = stages.CONFIGURED.index(stage)
    return list(stages.CONFIGURED[:at]), [*stages.CONFIGURED[at + 1 :], "split"]


############################################### Reading ##############################################


def tasks(sources: Iterable[Source]) -> list[tuple[str, int, tuple[str, ...]]]:
    """(source, first place, files): what one worker reads."""
    return [
        (source.name, place_of(place, number, 0), files)
        for place, source in enumerate(sources)
        for number, files in enumerate(source.parts())
    ]


def place_of(source: int, file: int, chunk: int) -> int:
    """Raises InputError where a source has more files, or a file more chunks, than a rank can tell apart."""
    if file >> FILE_BITS or chunk >> CHUNK_BITS:
        raise InputError(f"found file {file}, chunk {chunk} of a source; expected fewer than {1 << FILE_BITS} of each")
    return ((source << FILE_BITS | file) << CHUNK_BITS | chunk) << POSITION_BITS


def read_pieces(
    task: tuple[str, int, tuple[str, ...]], sources: Mapping[str, Source], options: Mapping[str, Any]
) -> Iterator[Piece]:
    name, first, files = task
    try:
        for number, (samples, ledger) in enumerate(Reader(sources[name], **options).chunks(files)):
            yield first + place_of(0, 0, number), packed(samples, {"read": ledger})[0]
    except DataError as error:  # Beam makes errors again to add to their messages, and knows only messages
        raise InputError(f"{error}") from error


############################################### Stages ###############################################


def go_through(piece: Piece, sources: Mapping[str, Source], wanted: Sequence[str]) -> Piece:
    """A chunk after those of the stages that its source goes through."""
    place, content = piece
    samples, ledgers = unpacked(content)
    source = source_at(place, sources)
    for stage in wanted:
        if stage in source.stages:
            ledgers[stage] = Ledger()
            samples = list(stages.make(stage, source.stages[stage])(samples, ledgers[stage]))
    return place, packed(samples, ledgers)[0]


def write(piece: Piece, sources: Mapping[str, Source], shared: str) -> None:
    place, content = piece
    name = source_at(place, sources).name
    with fsspec.open(f"{shared}/{name}/{place:020d}.jsonl.gz", "wb", auto_mkdir=True) as file:
        file.write(content)


def gathered(planned: Sequence[Source], shared: str, local: Path) -> dict[str, Chunks]:
    """What `write` wrote, in order, under each stage."""
    files, root = fsspec.core.url_to_fs(shared)
    if files.protocol[0] != "file":
        files.get(root, str(local), recursive=True)
    made: dict[str, Chunks] = {stage: {} for stage in ("read", *stages.CONFIGURED, "split")}
    for source in planned:
        paths = sorted((local / source.name).glob("*.jsonl.gz"))
        if not paths:
            raise InputError(f"{shared}/{source.name}: found no chunks; expected those that the workers of Beam wrote")
        for stage in ("read", *source.stages):
            made[stage][source.name] = [read_made(path, stage) for path in paths]
    return made


############################################# Duplicates #############################################


def members(piece: Piece, sources: Mapping[str, Source]) -> Iterator[tuple[bytes, bytes]]:
    """(key, member) of every key of every sample. A member: rank, how many bytes must agree, sketch, "source/id"."""
    place, content = piece
    source = source_at(place, sources)
    if "dedupe" not in source.stages:
        return
    samples, _ = unpacked(content)
    signatures = deduper(source.stages["dedupe"]).signatures(samples)
    for position, sample in enumerate(samples):
        head = (place + position).to_bytes(RANK_BYTES, "big") + signatures.needed[position].tobytes()
        member = head + signatures.sketches[position].tobytes() + f"{source.name}/{sample.id}".encode()
        if signatures.exact[position] != NO_KEY:
            yield b"=" + signatures.exact[position].tobytes(), member
        for key in signatures.bands[position]:
            if key != NO_KEY:
                yield b"~" + key.tobytes(), member


def edges_of(group: tuple[bytes, Iterable[bytes]]) -> Iterator[tuple[int, Edge]]:
    """The edges within a bucket, each under the rank of its later sample."""
    key, found = group
    bucket = sorted(set(found))  # two bands of a sample may have the same key
    if len(bucket) < 2:
        return
    names_from = RANK_BYTES + 1 + SCHEME.permutations
    heads = np.frombuffer(b"".join(member[:names_from] for member in bucket), np.uint8).reshape(len(bucket), -1)
    ranks = heads[:, :RANK_BYTES].copy().view(">i8")[:, 0].astype(np.int64)
    exact = key[:1] == b"="
    edges = bucket_edges(ranks) if exact else bucket_edges(ranks, heads[:, RANK_BYTES + 1 :], heads[:, RANK_BYTES])
    names = {int(rank): member[names_from:].decode() for rank, member in zip(ranks, bucket)}
    for rank, keeper, similarity in zip(edges.ranks.tolist(), edges.keepers.tolist(), edges.similarities.tolist()):
        yield rank, (keeper, exact, similarity, names[keeper])


def first_edge(edges: Iterable[Edge]) -> Edge:
    """The one to the earliest sample; an exact one before a similar one."""
    return min(edges, key=lambda edge: (edge[0], not edge[1]))


def keepers(edges: Sequence[tuple[int, Edge]]) -> Iterator[tuple[int, dict[int, dedupe.Duplicate]]]:
    """For each place the positions that are dropped, and what they are duplicates of. One worker has all edges."""
    edges = sorted(edges)
    ranks = np.array([rank for rank, _ in edges], np.int64)
    earlier, exact, similarities, via = zip(*(edge for _, edge in edges)) if edges else ((), (), (), ())
    ends = resolve(Edges(ranks, np.array(earlier, np.int64), np.array(exact, bool), np.array(similarities)))
    names = dict(zip(earlier, via))
    duplicates = [
        dedupe.Duplicate.of(*each) for each in zip(exact, similarities, via, (names[end] for end in ends.tolist()))
    ]
    for place, group in itertools.groupby(range(len(edges)), lambda i: edges[i][0] >> POSITION_BITS):
        start = place << POSITION_BITS
        yield start, {edges[i][0] - start: duplicates[i] for i in group}


def drop(both: tuple[int, Mapping[str, Any]], sources: Mapping[str, Source]) -> Piece:
    """A chunk without the duplicates in it."""
    place, joined = both
    (content,) = joined["piece"]
    source = source_at(place, sources)
    if "dedupe" not in source.stages:
        return place, content
    samples, ledgers = unpacked(content)
    ledgers["dedupe"] = Ledger()
    found: Mapping[int, dedupe.Duplicate] = next(iter(joined["found"]), {})
    kept = list(deduper(source.stages["dedupe"]).drop(samples, found, ledgers["dedupe"]))
    return place, packed(kept, ledgers)[0]


def source_at(place: int, sources: Mapping[str, Source]) -> Source:
    """`sources` are in the order of their ranks."""
    return list(sources.values())[place >> (FILE_BITS + CHUNK_BITS + POSITION_BITS)]
