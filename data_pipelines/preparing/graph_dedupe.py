"""The one stage that looks at all samples at once, on one machine: signatures of each chunk, edges among all of them,
and each chunk without its duplicates.

What is compared with what, and what follows from it, is in `stages.dedupe` and `stages.edges`; here are the steps, what
their keys are made of, and the names of the samples that are kept.
"""

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import stages
from data_pipelines.addresses import code_of, key_of
from data_pipelines.disk import write_whole
from data_pipelines.preparing.settings import by_rank
from data_pipelines.preparing.store import Made, Store, made_before, read_samples, write_chunk
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.dedupe import Dedupe, Duplicate
from data_pipelines.stages.edges import Edges, find_edges, gather, resolve
from data_pipelines.stages.minhash import Signatures
from data_pipelines.stages.source import Source
from data_pipelines.workers import Workers

Duplicates = list[tuple[int, Duplicate]]  # of a chunk: position, what it is a duplicate of


def dedupe(
    store: Store,
    planned: Sequence[Source],
    settings: Mapping[str, Any],
    before: Mapping[str, list[Made]],
    pool: Workers,
) -> dict[str, list[Made]]:
    """The chunks of all sources without duplicates; a source without the stage keeps those that it has, and is not
    compared with others."""
    compared = [source for source in by_rank(planned, settings) if "dedupe" in source.stages]
    chunks = [(source, made) for source in compared for made in before[source.name]]
    code = code_of(stages.module_of("dedupe"))
    signed = pool.run(
        "signatures",
        sign_chunk,
        [
            (source.stages["dedupe"], made.path, store.path("signatures", key, ".npz"))
            for source, made in chunks
            for key in [key_of(code, source.stages["dedupe"], made.digest)]
        ],
    )
    found = named(chunks, edges_among(store, chunks, signed, code), pool)
    tasks = []
    for (source, made), duplicates in zip(chunks, found):
        key = key_of(code, made.digest, [(position, asdict(duplicate)) for position, duplicate in duplicates])
        tasks.append((source.stages["dedupe"], made.path, dict(duplicates), store.path("dedupe", key)))
    dropped = iter(pool.run("dedupe", drop_chunk, tasks))
    new = {source.name: [next(dropped) for _ in before[source.name]] for source in compared}
    return {source.name: new.get(source.name, before[source.name]) for source in planned}


def sign_chunk(options: Mapping[str, Any], chunk: str, target: Path) -> Path:
    if not target.exists():
        content = io.BytesIO()
        deduper(options).signatures(list(read_samples(chunk))).save(content)
        write_whole(target, content.getvalue())
    return target


def edges_among(store: Store, chunks: Sequence[tuple[Source, Made]], signed: Sequence[Path], code: str) -> Edges:
    """The edges among the samples of all chunks, whose ranks are their positions among all of them; each leads to the
    sample that its own was compared with."""
    target = store.path("edges", key_of(code, [path.name for path in signed]), ".npz")
    if not target.exists():
        count = sum(made.samples for _, made in chunks)
        with tempfile.TemporaryDirectory(dir=store.folder, suffix=".tmp") as folder:
            edges = find_edges(gather(map(Signatures.load, signed), count, Path(folder)))
        content = io.BytesIO()
        np.savez(content, **vars(edges))
        write_whole(target, content.getvalue())
    with np.load(target, allow_pickle=False) as arrays:
        return Edges(**arrays)


def named(chunks: Sequence[tuple[Source, Made]], edges: Edges, pool: Workers) -> list[Duplicates]:
    """The duplicates of each chunk, in order, with the names of what they are duplicates of."""
    starts = np.cumsum([0, *(made.samples for _, made in chunks)])
    ends = resolve(edges)
    wanted = np.unique(np.concatenate([edges.keepers, ends]))
    groups = np.split(wanted, np.searchsorted(wanted, starts[1:-1]))
    holding = [(made.path, (rows - start).tolist()) for (_, made), rows, start in zip(chunks, groups, starts)]
    ids = iter(pool.run("keepers", ids_at, [task for task in holding if task[1]]))
    names: dict[int, str] = {}
    for (source, _), rows in zip(chunks, groups):
        if len(rows):
            names |= {row: f"{source.name}/{sample_id}" for row, sample_id in zip(rows.tolist(), next(ids))}
    found: list[Duplicates] = [[] for _ in chunks]
    places = np.searchsorted(starts, edges.ranks, side="right") - 1
    for at, (place, rank) in enumerate(zip(places.tolist(), edges.ranks.tolist())):
        duplicate = Duplicate.of(
            bool(edges.exact[at]), float(edges.similarities[at]), names[int(edges.keepers[at])], names[int(ends[at])]
        )
        found[place].append((rank - int(starts[place]), duplicate))
    return found


def ids_at(chunk: str, positions: Sequence[int]) -> list[str]:
    wanted = set(positions)
    return [sample.id for position, sample in enumerate(read_samples(chunk)) if position in wanted]


def drop_chunk(options: Mapping[str, Any], chunk: str, found: Mapping[int, Duplicate], target: Path) -> Made:
    before = made_before(target, "dedupe")
    if before is not None:
        return before
    ledger = Ledger()
    samples = list(deduper(options).drop(read_samples(chunk), found, ledger))
    return write_chunk(target, samples, "dedupe", ledger)


def deduper(options: Mapping[str, Any]) -> Dedupe:
    made = stages.make("dedupe", options)
    assert isinstance(made, Dedupe)
    return made
