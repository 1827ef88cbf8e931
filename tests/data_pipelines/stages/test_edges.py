"""Edges: the same bucket by bucket and all at once, and those that a slow and plain program finds."""

import dataclasses
import itertools
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.stages import edges
from data_pipelines.stages.edges import Edges, bucket_edges, find_edges, gather, resolve
from data_pipelines.stages.minhash import NO_KEY, Scheme, Signatures, estimate

TINY = Scheme(5, 3, 2)


def merge(parts):
    """Of all edges of a rank the one to the smallest rank, an exact one before a similar one; by ascending rank."""
    every = [edges._Nearest(0).edges(permutations=1), *parts]
    found = Edges(*(np.concatenate([getattr(e, field.name) for e in every]) for field in dataclasses.fields(Edges)))
    order = np.lexsort((~found.exact, found.keepers, found.ranks))
    return found[order[np.unique(found.ranks[order], return_index=True)[1]]]


@st.composite
def signed(draw, most=24):
    """Few keys and few bytes, so that there are many buckets of several and many that are nearly similar."""
    count = draw(st.integers(0, most))
    numbers = lambda low, high, *shape: np.array(
        draw(
            st.lists(st.integers(low, high), min_size=count * int(np.prod(shape)), max_size=count * int(np.prod(shape)))
        )
    ).reshape(count, *shape)
    return Signatures(
        numbers(NO_KEY, 6).astype(np.uint64),
        numbers(NO_KEY, 3, TINY.bands).astype(np.uint64),
        numbers(0, 2, TINY.permutations).astype(np.uint8),
        numbers(1, 6).astype(np.uint8),
    )


def buckets(s):
    """(exact or not, ranks) of all buckets."""
    found = defaultdict(list)
    for rank in range(len(s)):
        for band, key in enumerate([s.exact[rank], *s.bands[rank]]):
            if key != NO_KEY:
                found[band, key].append(rank)
    return [(band == 0, ranks) for (band, _), ranks in found.items()]


def plainly(s, first):
    """rank -> (keeper, near or not, similarity), by the words of the module's docstring."""
    best = {}
    for exact, ranks in buckets(s):
        for place, rank in enumerate(ranks):
            for earlier in ranks[: min(place, first)]:
                matches = sum(a == b for a, b in zip(s.sketches[rank], s.sketches[earlier]))
                if exact or matches >= s.needed[rank]:
                    edge = (earlier, not exact, 1.0 if exact else float(estimate(matches, TINY.permutations)))
                    best[rank] = min(best.get(rank, edge), edge)
                    break
    return best


def as_dict(found):
    assert (np.diff(found.ranks) > 0).all() and (found.keepers < found.ranks).all()
    return {r: (k, not e, s) for r, k, e, s in zip(found.ranks, found.keepers, found.exact, found.similarities)}


@settings(max_examples=200, deadline=None)
@given(s=signed(), first=st.integers(1, 5), pairs=st.integers(1, 5), seed=st.integers(0, 99))
def test_bucket_by_bucket_and_all_at_once_and_plainly(s, first, pairs, seed):
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edges, "FIRST", first)
        patch.setattr(edges, "_PAIRS", pairs)
        at_once = find_edges(s)
        parts = []
        for exact, ranks in buckets(s):
            ranks = np.array(rng.sample(ranks, len(ranks)))  # Beam gives them in any order
            parts.append(bucket_edges(ranks) if exact else bucket_edges(ranks, s.sketches[ranks], s.needed[ranks]))
    assert as_dict(at_once) == as_dict(merge(rng.sample(parts, len(parts)))) == plainly(s, first)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_keepers_are_the_ends_of_chains_and_kept(draws):
    """Rank i + 1 has an edge to draw % (i + 1), or none."""
    chosen = {rank: draw % rank for rank, draw in enumerate(draws, start=1) if draw % 3}
    ranks = np.array(sorted(chosen), np.int64)
    found = Edges(ranks, np.array([chosen[r] for r in ranks], np.int64), ranks > 0, np.ones(len(ranks)))
    ends = resolve(found)
    assert not set(ends) & set(chosen)
    for rank, end in zip(ranks, ends):
        while rank in chosen:
            rank = chosen[rank]
        assert rank == end


def test_a_long_chain_is_followed_to_its_end():
    ranks = np.arange(1, 100_001)
    assert (resolve(Edges(ranks, ranks - 1, ranks > 0, np.ones(len(ranks)))) == 0).all()


def one_bucket(sketches, needed):
    count = len(sketches)
    exact, bands = np.zeros(count, np.uint64), np.full((count, 1), 9, np.uint64)
    return find_edges(Signatures(exact, bands, np.array(sketches, np.uint8), np.full(count, needed, np.uint8)))


@pytest.mark.parametrize(("place", "found"), ((0, True), (edges.FIRST - 1, True), (edges.FIRST, False)))
def test_only_the_first_of_a_bucket_are_compared_with(place, found):
    sketches = np.repeat(np.arange(100)[:, None], 4, axis=1)
    sketches[99] = sketches[place]
    assert as_dict(one_bucket(sketches, 4)) == ({99: (place, True, 1.0)} if found else {})


def test_a_large_bucket_of_equal_ones_is_compared_once_each(monkeypatch):
    compared = []
    count = np.count_nonzero
    monkeypatch.setattr(np, "count_nonzero", lambda a, axis=None: compared.append(a.shape) or count(a, axis))
    assert (one_bucket(np.zeros((5000, 4)), 4).keepers == 0).all()
    assert sum(shape[0] for shape in compared if len(shape) == 2) == 4999


def test_an_exact_edge_goes_before_a_similar_one_to_the_same_rank():
    exact, near = (
        bucket_edges(np.array([5, 3])),
        bucket_edges(np.array([3, 5]), np.ones((2, 4), np.uint8), np.full(2, 4)),
    )
    earlier = bucket_edges(np.array([5, 1]), np.ones((2, 4), np.uint8), np.full(2, 4))
    assert as_dict(merge([near, exact])) == as_dict(merge([exact, near])) == {5: (3, False, 1.0)}
    assert as_dict(merge([exact, earlier])) == {5: (1, True, 1.0)}


@settings(max_examples=30, deadline=None)
@given(s=signed(), cuts=st.sets(st.integers(0, 24)))
def test_chunks_of_any_size_give_the_same_edges(s, cuts, tmp_path_factory):
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(s)), len(s)]
    chunks = [Signatures(*(column[a:b] for column in vars(s).values())) for a, b in itertools.pairwise(bounds)]
    mapped = gather(chunks, len(s), tmp_path_factory.mktemp("mapped"), TINY)
    assert len(s) == 0 or isinstance(mapped.sketches, np.memmap)
    assert as_dict(find_edges(mapped)) == as_dict(find_edges(s))


def test_a_wrong_count_is_noticed(tmp_path):
    chunk = Signatures(
        np.zeros(2, np.uint64), np.zeros((2, 3), np.uint64), np.zeros((2, 6), np.uint8), np.ones(2, np.uint8)
    )
    for count in (1, 3):
        with pytest.raises(ValueError):
            gather([chunk], count, tmp_path, TINY)
