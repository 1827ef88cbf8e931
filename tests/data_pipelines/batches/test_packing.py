"""Packing keeps everything once, never mixes segments, and gives the targets that unpacked rows give."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batches.packing import PACKINGS, Piece, count_rows, empty_arrays, fill_row, pack, part
from data_pipelines.templates.template import Example

LENGTHS = st.lists(st.integers(2, 33), min_size=1, max_size=40)  # ids of examples for rows of 32 positions
LONG = st.lists(st.integers(2, 200), min_size=1, max_size=20)


def examples_of(lengths):
    """Ids that tell which example and which place they are; weights that differ."""
    return [
        Example(np.arange(n, dtype=np.int32) + 1000 * i, (np.arange(n) % 3).astype(np.float32))
        for i, n in enumerate(lengths, start=1)
    ]


def sizes_of(lengths):
    return [n - 1 for n in lengths]


def packed_arrays(examples, length, method):
    rows = pack([example.positions for example in examples], length, method)
    arrays = empty_arrays(len(rows), length)
    for number, row in enumerate(rows):
        fill_row(arrays, number, [(part(examples[i], start, stop), i % 4) for i, start, stop in row])
    return arrays


def values(arrays, *names):
    real = arrays["segment_ids"] > 0
    return Counter(zip(*(arrays[name][real].tolist() for name in names)))


@pytest.mark.parametrize("method", ("best_fit", "first_fit"))
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_packed_and_unpacked_rows_hold_the_same_predictions(method, lengths):
    examples = examples_of(lengths)
    packed, unpacked = (packed_arrays(examples, 32, each) for each in (method, "none"))
    triples = lambda arrays: values(arrays, "inputs", "targets", "loss_weights", "positions", "source_ids")
    assert triples(packed) == triples(unpacked)
    assert sum(triples(packed).values()) == sum(n - 1 for n in lengths)
    assert len(unpacked["inputs"]) == len(lengths) >= len(packed["inputs"])


@pytest.mark.parametrize("method", PACKINGS)
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_segments_are_numbered_and_never_mixed(method, lengths):
    arrays = packed_arrays(examples_of(lengths), 32, method)
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
            assert (targets == inputs + 1).all() and (np.diff(inputs) == 1).all()
            assert (arrays["loss_weights"][row, here] == targets % 1000 % 3).all()
            assert arrays["positions"][row, here].tolist() == list(range(here.sum()))
        assert not any(arrays[name][row, segments == 0].any() for name in arrays)


@settings(max_examples=80, deadline=None)
@given(lengths=LONG)
def test_concat_split_crops_nothing_and_learns_every_target_once(lengths):
    examples = examples_of(lengths)
    rows = pack(sizes_of(lengths), 32, "concat_split")
    arrays = packed_arrays(examples, 32, "concat_split")
    whole = Counter()
    for example in examples:
        whole.update(zip(*(array.tolist() for array in example.row())))
    assert values(arrays, "inputs", "targets", "loss_weights") == whole  # those at the joints included
    assert not (arrays["segment_ids"][:-1] == 0).any() and len(rows) == -(-sum(sizes_of(lengths)) // 32)
    for index, size in enumerate(sizes_of(lengths)):
        pieces = [piece for row in rows for piece in row if piece.example == index]
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == size


def test_the_target_of_a_joint():
    example = Example(np.arange(1000, 1008, dtype=np.int32), np.ones(8, np.float32))
    assert pack([3, 7], 5, "concat_split") == [[(0, 0, 3), (1, 0, 2)], [(1, 2, 7)]]
    first, second = part(example, 0, 2), part(example, 2, 7)
    assert first.ids.tolist() == [1000, 1001, 1002] and second.ids.tolist() == [1002, 1003, 1004, 1005, 1006, 1007]
    lost = Example(example.ids[3:], example.weights[3:])  # control: without the id that both pieces have
    assert sum(p.row()[2].sum() for p in (first, second)) == example.row()[2].sum()
    assert sum(p.row()[2].sum() for p in (first, lost)) < example.row()[2].sum()
    cut = Example(example.ids, example.weights, cut=4)
    assert [part(cut, 0, 2).cut, part(cut, 2, 7).cut] == [4, 0]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_how_many_rows(lengths):
    """Never more than the bounds of D. S. Johnson for best-fit decreasing and for first fit."""
    sizes = sizes_of(lengths)
    rows = {method: pack(sizes, 32, method) for method in PACKINGS}
    for method in PACKINGS:
        assert rows[method] == pack(sizes, 32, method) and all(row == sorted(row) for row in rows[method])
        assert len(rows[method]) == count_rows(sizes, 32, method)
    fewest = max(-(-sum(sizes) // 32), sum(size > 16 for size in sizes))
    assert len(rows["concat_split"]) == -(-sum(sizes) // 32)
    assert fewest <= len(rows["best_fit"]) <= 11 / 9 * fewest + 4
    assert fewest <= len(rows["first_fit"]) <= 1.7 * fewest + 2


def test_which_row_is_taken():
    whole = lambda rows: [[index for index, *_ in row] for row in rows]
    assert whole(pack([6, 4, 3, 2, 1], 8, "best_fit")) == [[0, 3], [1, 2, 4]]  # 6+2, 4+3+1: the fullest
    assert whole(pack([6, 4, 3, 2, 1], 8, "first_fit")) == [[0, 3], [1, 2, 4]]
    assert whole(pack([4, 6, 2, 3], 8, "first_fit")) == [[0, 2], [1], [3]]  # in order: 4+2, 6, 3
    assert whole(pack([4, 6, 2, 3], 8, "best_fit")) == [[1, 2], [0, 3]]  # 6+2, 4+3


def test_padding_share():
    lengths = np.minimum(np.random.default_rng(0).lognormal(4.9, 0.8, 1024).astype(int) + 3, 2049)
    padding = {method: (packed_arrays(examples_of(lengths), 2048, method)["segment_ids"] == 0).mean()
               for method in PACKINGS}  # fmt: skip
    assert padding["concat_split"] <= padding["best_fit"] < 0.01 < padding["first_fit"] < 0.05
    assert padding["none"] > 0.85


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"found examples of \[32\] positions; expected 1 to 31, max_length 32"):
        pack([4, 32], 31, "best_fit")
    with pytest.raises(ValueError, match=r"\[0\]"):
        pack([0], 31, "none")
    with pytest.raises(ValueError, match=r"\[0\] positions; expected 1 or more"):
        pack([0, 40], 31, "concat_split")
    with pytest.raises(ValueError, match="found 'wrapped'; expected best_fit, first_fit, concat_split or none"):
        count_rows([4], 31, "wrapped")
    assert all(pack([], 31, method) == [] and count_rows([], 31, method) == 0 for method in PACKINGS)
    assert pack([40], 31, "concat_split") == [[Piece(0, 0, 31)], [Piece(0, 31, 40)]]
