"""Packing keeps everything once, never mixes segments, and gives the targets that unpacked rows give."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.packing import empty_arrays, fill_row, pack_pool
from data_pipelines.template import Example

LENGTHS = st.lists(st.integers(2, 33), min_size=1, max_size=40)


def examples_of(lengths):
    """Ids that tell which example and which place they are; weights that differ."""
    return [
        Example(np.arange(n, dtype=np.int32) + 1000 * i, (np.arange(n) % 3).astype(np.float32))
        for i, n in enumerate(lengths, start=1)
    ]


def packed_arrays(examples, length, method):
    rows = pack_pool(examples, length, method)
    arrays = empty_arrays(len(rows), length)
    for number, row in enumerate(rows):
        fill_row(arrays, number, [(examples[i], i % 4) for i in row])
    return arrays


def triples(arrays):
    real = arrays["segment_ids"] > 0
    return Counter(
        zip(*(arrays[k][real].tolist() for k in ("inputs", "targets", "loss_weights", "positions", "source_ids")))
    )


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_packed_and_unpacked_rows_hold_the_same_predictions(lengths):
    examples = examples_of(lengths)
    packed, unpacked = (packed_arrays(examples, 32, method) for method in ("best_fit", "none"))
    assert triples(packed) == triples(unpacked)
    assert sum(triples(packed).values()) == sum(n - 1 for n in lengths)
    assert len(unpacked["inputs"]) == len(lengths) >= len(packed["inputs"])


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_segments_are_whole_numbered_and_never_mixed(lengths):
    arrays = packed_arrays(examples_of(lengths), 32, "best_fit")
    shapes = {(name, a.dtype.name) for name, a in arrays.items()}
    assert shapes == {(n, "int32") for n in ("inputs", "targets", "positions", "segment_ids", "source_ids")} | {
        ("loss_weights", "float32")
    }
    for row in range(len(arrays["inputs"])):
        segments = arrays["segment_ids"][row]
        last = segments.max()
        assert sorted(set(segments.tolist()) - {0}) == list(range(1, last + 1))
        assert (np.diff(segments[segments > 0]) >= 0).all() and not segments[np.count_nonzero(segments) :].any()
        for segment in range(1, last + 1):
            here = segments == segment
            inputs, targets = arrays["inputs"][row, here], arrays["targets"][row, here]
            assert len({*(inputs // 1000).tolist(), *(targets // 1000).tolist()}) == 1
            assert (targets == inputs + 1).all()
            assert (arrays["loss_weights"][row, here] == targets % 1000 % 3).all()
            assert arrays["positions"][row, here].tolist() == list(range(here.sum()))
        assert not any(arrays[name][row, segments == 0].any() for name in arrays)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_best_fit_decreasing_is_near_the_best_and_always_the_same(lengths):
    examples = examples_of(lengths)
    rows = pack_pool(examples, 32, "best_fit")
    assert rows == pack_pool(examples, 32, "best_fit") and all(row == sorted(row) for row in rows)
    fewest = max(-(-sum(n - 1 for n in lengths) // 32), sum(n - 1 > 16 for n in lengths))
    assert fewest <= len(rows) <= 11 / 9 * fewest + 4  # Johnson's bound


def test_the_fullest_row_that_fits_is_taken():
    assert pack_pool(examples_of([7, 5, 4, 3, 2]), 8, "best_fit") == [[0, 3], [1, 2, 4]]  # 6+2, 4+3+1


def test_padding_share():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.9, 0.8, 256).astype(int) + 3, 2049)
    arrays = packed_arrays(examples_of(lengths), 2048, "best_fit")
    assert (arrays["segment_ids"] == 0).mean() < 0.05
    unpacked = packed_arrays(examples_of(lengths), 2048, "none")
    assert (unpacked["segment_ids"] == 0).mean() > 0.85


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"found examples of \[32\] positions; expected 1 to 31, max_length 32"):
        pack_pool(examples_of([5, 33]), 31, "best_fit")
    with pytest.raises(ValueError, match=r"\[0\]"):
        pack_pool(examples_of([1]), 31, "none")
    with pytest.raises(ValueError, match="found 'wrapped'; expected best_fit or none"):
        pack_pool(examples_of([5]), 31, "wrapped")
    assert pack_pool([], 31, "best_fit") == []
