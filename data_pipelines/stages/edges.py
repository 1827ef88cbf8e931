"""Which sample is a duplicate of which: edges from later to earlier ones, and the keepers at the ends of these.

Samples have ranks, and of duplicates the one with the smallest rank is kept. Within a bucket (the samples that share a
key) each one is compared with those before it, of the first FIRST of the bucket, and gets an edge to the earliest that
it resembles; of its edges from all buckets the one to the smallest rank counts. A sample with an edge is dropped, and
its keeper is the end of the chain of edges that starts with its own. The two ends of an edge resemble each other; those
of a chain need not. A pair is missed where all its buckets have FIRST others before the earlier one, which takes
millions of texts that are much alike. What comes out depends on ranks and signatures, not on how samples lie in chunks.

There are two ways to the same edges: `bucket_edges` for one bucket, wherever it was gathered (Beam groups by key, and
takes of each rank's edges the one to the smallest rank, an exact one before a similar one); and `find_edges` for all
samples on one machine, a band at a time, their signatures in files.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipelines.stages.minhash import NO_KEY, SCHEME, Scheme, Signatures, Uint8, Uint64, estimate

Int64 = npt.NDArray[np.int64]

FIRST = 64
_PAIRS = 1 << 14  # compared at once


@dataclasses.dataclass
class Edges:
    """m edges from `ranks` to `keepers`, both int64[m]; `exact` bool[m], whether keys were equal or sketches similar;
    `similarities` float64[m], as estimated, 1 for exact ones."""

    ranks: Int64
    keepers: Int64
    exact: npt.NDArray[np.bool_]
    similarities: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, at: Int64) -> "Edges":
        return Edges(*(getattr(self, field.name)[at] for field in dataclasses.fields(self)))


def bucket_edges(ranks: Int64, sketches: Uint8 | None = None, needed: Uint8 | None = None) -> Edges:
    """The edges within one bucket: ranks int64[m], all different, in any order, with sketches uint8[m, P] and `needed`
    uint8[m] (see Signatures); without these if the key is an exact one."""
    order = np.argsort(ranks)
    ranks, rows, firsts = ranks[order], np.arange(len(ranks)), np.zeros(len(ranks), np.int64)
    nearest = _Nearest(len(ranks))
    if sketches is None or needed is None:
        nearest.take_equal(rows, firsts)
        found = nearest.edges(permutations=1)
    else:
        nearest.compare(rows, firsts, sketches[order], needed[order])
        found = nearest.edges(sketches.shape[1])
    return dataclasses.replace(found, ranks=ranks[found.ranks], keepers=ranks[found.keepers])


def find_edges(signatures: Signatures) -> Edges:
    """The edges among all samples, by ascending rank, which is the row in `signatures`.

    Its arrays may be mapped from files (see `gather`); besides, this takes some 32 bytes of memory a sample."""
    nearest = _Nearest(len(signatures))
    nearest.take_equal(*_buckets(signatures.exact))
    for band in range(signatures.bands.shape[1]):
        nearest.compare(*_buckets(signatures.bands[:, band]), signatures.sketches, signatures.needed)
    return nearest.edges(signatures.sketches.shape[1])


def resolve(edges: Edges) -> Int64:
    """int64[m]: the rank that is kept in the end for each edge, given one edge a rank by ascending rank."""
    ends = edges.keepers.copy()
    while len(ends):
        at = np.minimum(np.searchsorted(edges.ranks, ends), len(ends) - 1)
        dropped = edges.ranks[at] == ends
        if not dropped.any():
            break
        ends[dropped] = ends[at[dropped]]
    return ends


def gather(chunks: Iterable[Signatures], count: int, folder: Path, scheme: Scheme = SCHEME) -> Signatures:
    """The signatures of `count` samples, chunk after chunk, in files in `folder`, from which they are mapped; the keys
    of a band lie together there."""
    create = functools.partial(np.lib.format.open_memmap, mode="w+")
    mapped = Signatures(
        create(folder / "exact.npy", dtype=np.uint64, shape=(count,)),
        create(folder / "bands.npy", dtype=np.uint64, shape=(count, scheme.bands), fortran_order=True),
        create(folder / "sketches.npy", dtype=np.uint8, shape=(count, scheme.permutations)),
        create(folder / "needed.npy", dtype=np.uint8, shape=(count,)),
    )
    start = 0
    for chunk in chunks:
        rows = slice(start, start + len(chunk))
        for field in dataclasses.fields(Signatures):
            getattr(mapped, field.name)[rows] = getattr(chunk, field.name)
        start += len(chunk)
    if start != count:
        raise ValueError(f"found the signatures of {start} samples; expected {count}")
    return mapped


class _Nearest:
    """For each of n rows the earliest one found so far that it duplicates: `keepers` int64[n], n where there is none,
    and `matches` int16[n], bytes in which the sketches agree, 0 where keys are equal."""

    def __init__(self, count: int):
        self.keepers = np.full(count, count, np.int64)
        self.matches = np.zeros(count, np.int16)

    def take_equal(self, members: Int64, firsts: Int64) -> None:
        """See `_buckets`; to be called before `compare`."""
        later = np.arange(len(members)) > firsts
        self.keepers[members[later]] = members[firsts[later]]

    def compare(self, members: Int64, firsts: Int64, sketches: Uint8, needed: Uint8) -> None:
        """See `_buckets`. A member whose edge leads to an earlier row than those left to compare with is done."""
        at = np.arange(len(members))
        for place in range(FIRST):
            at = at[at - firsts[at] > place]
            at = at[members[firsts[at] + place] < self.keepers[members[at]]]
            if not len(at):
                return
            for some in np.split(at, range(_PAIRS, len(at), _PAIRS)):
                rows, earlier = members[some], members[firsts[some] + place]
                agree = np.count_nonzero(sketches[rows] == sketches[earlier], axis=1)
                similar = agree >= needed[rows]
                self.keepers[rows[similar]] = earlier[similar]
                self.matches[rows[similar]] = agree[similar]

    def edges(self, permutations: int) -> Edges:
        rows = np.flatnonzero(self.keepers < len(self.keepers))
        exact = self.matches[rows] == 0
        return Edges(rows, self.keepers[rows], exact, np.where(exact, 1, estimate(self.matches[rows], permutations)))


def _buckets(keys: Uint64) -> tuple[Int64, Int64]:
    """(members, firsts), int64[m] each: the rows that share their key with another, bucket after bucket and ascending
    in each, and for each of them where in `members` its bucket starts."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.append(True, ordered[1:] != ordered[:-1])[: len(keys)]
    alone = starts & np.append(starts[1:], True)[: len(keys)]
    shared = ~alone & (ordered != NO_KEY)
    places = np.arange(np.count_nonzero(shared))
    return order[shared], np.maximum.accumulate(np.where(starts[shared], places, 0))
