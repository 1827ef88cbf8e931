"""Which sample is a duplicate of which: edges from a later to an earlier one, and the keepers at their ends.

Samples have ranks, and the one with the smaller rank is kept. Within a bucket (the samples that share a band's key)
each one is compared with the earlier ones, of the first FIRST of the bucket, and gets an edge to the earliest that it
resembles; of all its edges the one to the smallest rank counts. A sample with an edge is dropped, and its keeper is
the end of the chain that starts with its edge. Both ends of an edge are compared, those of a chain are not: a copy of a
copy of a copy goes, too. What comes out depends on ranks and signatures only, not on how samples were put into chunks.

Two ways to the same edges: `bucket_edges` for one bucket, wherever it was gathered (Beam groups by key), with `merge`
over the buckets; and `find_edges` over all samples of one machine, a band at a time, with signatures in files.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.stages.minhash import NO_KEY, SCHEME, Scheme, Signatures, Uint8, Uint64, estimate

FIRST = 64
THRESHOLD = 0.7
_PAIRS = 1 << 16  # compared at once

Int64 = npt.NDArray[np.int64]


@dataclasses.dataclass
class Edges:
    """m edges: from `ranks` to the smaller `keepers`, both int64[m]; `exact` bool[m], whether keys were equal or
    texts similar; `similarities` float32[m], as estimated, 1 for exact ones."""

    ranks: Int64
    keepers: Int64
    exact: npt.NDArray[np.bool_]
    similarities: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ranks)


def bucket_edges(ranks: Int64, sketches: Uint8 | None, threshold: float = THRESHOLD) -> Edges:
    """The edges within one bucket: ranks int64[m], in any order, and their sketches uint8[m, P]; None if the samples
    of the bucket share an exact key."""
    order = np.argsort(ranks)
    ranks, rows, firsts = ranks[order], np.arange(len(ranks)), np.zeros(len(ranks), np.int64)
    found = _Nearest(len(ranks), threshold)
    if sketches is None:
        found.take_equal(rows, firsts)
    else:
        found.compare(rows, firsts, sketches[order])
    edges = found.edges(0 if sketches is None else sketches.shape[1])
    return dataclasses.replace(edges, ranks=ranks[edges.ranks], keepers=ranks[edges.keepers])


def find_edges(signatures: Signatures, threshold: float = THRESHOLD) -> Edges:
    """The edges among all samples, whose rank is their row in `signatures`, by ascending rank.

    The arrays may be mapped from files (see `gather`). In memory it takes about 40 bytes a sample.
    """
    found = _Nearest(len(signatures), threshold)
    found.take_equal(*_buckets(signatures.exact))
    for band in range(signatures.bands.shape[1]):
        found.compare(*_buckets(signatures.bands[:, band]), signatures.sketches)
    return found.edges(signatures.sketches.shape[1])


def merge(parts: Iterable[Edges]) -> Edges:
    """Of all edges of a rank the one to the smallest rank, an exact one before a similar one; by ascending rank."""
    every = list(parts)
    fields = (np.concatenate([getattr(part, f.name) for part in every]) for f in dataclasses.fields(Edges))
    edges = Edges(*fields)
    order = np.lexsort((~edges.exact, edges.keepers, edges.ranks))
    _, first = np.unique(edges.ranks[order], return_index=True)
    return _take(edges, order[first])


def resolve(edges: Edges) -> Int64:
    """int64[m]: the rank that is kept in the end for each of the edges, which are by ascending rank, one a rank."""
    ends = edges.keepers.copy()
    while len(ends):
        at = np.minimum(np.searchsorted(edges.ranks, ends), len(ends) - 1)
        dropped = edges.ranks[at] == ends
        if not dropped.any():
            break
        ends[dropped] = ends[at[dropped]]
    return ends


def gather(chunks: Iterable[Signatures], count: int, folder: Path, scheme: Scheme = SCHEME) -> Signatures:
    """The signatures of `count` samples, chunk after chunk, in files in `folder` from which they are mapped."""
    if not count:
        return Signatures(np.empty(0, np.uint64), np.empty((0, scheme.bands), np.uint64), np.empty((0, 0), np.uint8))
    create = functools.partial(np.lib.format.open_memmap, mode="w+")
    mapped = Signatures(
        create(folder / "exact.npy", dtype=np.uint64, shape=(count,)),
        create(folder / "bands.npy", dtype=np.uint64, shape=(count, scheme.bands), fortran_order=True),
        create(folder / "sketches.npy", dtype=np.uint8, shape=(count, scheme.permutations)),
    )
    start = 0
    for chunk in chunks:
        rows = slice(start, start + len(chunk))
        mapped.exact[rows], mapped.bands[rows], mapped.sketches[rows] = chunk.exact, chunk.bands, chunk.sketches
        start += len(chunk)
    if start != count:
        raise ValueError(f"found signatures of {start} samples; expected {count}")
    return mapped


class _Nearest:
    """For each row the earliest one found so far that it duplicates: `keepers` int64[n], n for none."""

    def __init__(self, count: int, threshold: float):
        self.count, self.threshold = count, threshold
        self.keepers = np.full(count, count, np.int64)
        self.matches = np.zeros(count, np.int16)  # of sketches; 0 for equal keys

    def take_equal(self, members: Int64, firsts: Int64) -> None:
        later = np.arange(len(members)) > firsts
        self.keepers[members[later]] = members[firsts[later]]

    def compare(self, members: Int64, firsts: Int64, sketches: Uint8) -> None:
        """Members of buckets, one bucket after the other and ascending in each; `firsts`: where a member's bucket
        starts. A member that has an edge to an earlier row than those still to come is not compared with them."""
        need, at = _needed(self.threshold, sketches.shape[1]), np.arange(len(members))
        for place in range(FIRST):
            at = at[at - firsts[at] > place]
            at = at[members[firsts[at] + place] < self.keepers[members[at]]]
            for start in range(0, len(at), _PAIRS):
                some = at[start : start + _PAIRS]
                rows, earlier = members[some], members[firsts[some] + place]
                agree = np.count_nonzero(sketches[rows] == sketches[earlier], axis=1)
                similar = agree >= need
                self.keepers[rows[similar]] = earlier[similar]
                self.matches[rows[similar]] = agree[similar]

    def edges(self, permutations: int) -> Edges:
        rows = np.flatnonzero(self.keepers < self.count)
        exact = self.matches[rows] == 0
        similarities = np.where(exact, np.float32(1), estimate(self.matches[rows], max(1, permutations)))
        return Edges(rows, self.keepers[rows], exact, similarities)


def _buckets(keys: Uint64) -> tuple[Int64, Int64]:
    """(members, firsts) for `_Nearest`: the rows that share their key with another, by key and row."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(keys)]
    alone = new & np.concatenate((new[1:], [True]))[: len(keys)]
    shared = ~alone & (ordered != NO_KEY)
    new = new[shared]
    return order[shared], np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def _needed(threshold: float, permutations: int) -> int:
    """How many bytes of two sketches have to agree; at least one."""
    similar = estimate(np.arange(permutations + 1), permutations) >= np.float32(threshold)
    return max(1, int(np.argmax(similar)))


def _take(edges: Edges, at: Int64) -> Edges:
    return Edges(edges.ranks[at], edges.keepers[at], edges.exact[at], edges.similarities[at])
