"""Packs examples into rows of a fixed length, and rows into the arrays of a batch.

An example of n ids takes n - 1 positions: inputs ids[:-1], targets ids[1:] with the weights of the targets, so that no
target ever crosses into another segment; one with targets of its own takes n (`Example.row`). Segments are numbered
from 1 in each row and their positions restart at 0; segment 0 is padding.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import InputError
from data_pipelines.template import Example

Packing = Literal["best_fit", "none"]
Arrays = dict[str, npt.NDArray[np.int32] | npt.NDArray[np.float32]]


def pack_pool(examples: Sequence[Example], length: int, method: Packing) -> list[list[int]]:
    """Rows as lists of positions in `examples`, ascending; every example is in exactly one row.

    best_fit: best-fit decreasing (D. S. Johnson, "Near-optimal bin packing algorithms", 1973): longest first, each
    into the fullest row that still has room. none: one example a row. The same examples always give the same rows.
    (grain's BestFitPackIterDataset, fed the sorted pool, makes as many rows, but takes 42 ms for 256 examples where
    this takes 0.4, about as long as tokenising them, and importing grain imports JAX.)
    Raises InputError for an example that no row can hold, and for an unknown method.
    """
    sizes = [example.positions for example in examples]
    if too_long := [size for size in sizes if not 0 < size <= length]:
        raise InputError(f"found examples of {too_long[:3]} positions; expected 1 to {length}, max_length {length + 1}")
    if method == "none":
        return [[i] for i in range(len(sizes))]
    if method != "best_fit":
        raise InputError(f"packing: found {method!r}; expected best_fit or none")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, row), ascending
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(room, (sizes[i], 0))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if free > sizes[i]:
            bisect.insort(room, (free - sizes[i], row))
    return [sorted(row) for row in rows]


def empty_arrays(rows: int, length: int) -> Arrays:
    """A batch of padding: inputs, targets, positions, segment_ids, source_ids int32[rows, length]; loss_weights
    float32[rows, length]; all zero."""
    names = ("inputs", "targets", "positions", "segment_ids", "source_ids")
    arrays: Arrays = {name: np.zeros((rows, length), np.int32) for name in names}
    return arrays | {"loss_weights": np.zeros((rows, length), np.float32)}


def fill_row(arrays: Arrays, row: int, examples: Iterable[tuple[Example, int]]) -> None:
    """Writes (example, source id) pairs into an empty row, one segment each."""
    at = 0
    for segment, (example, source) in enumerate(examples, start=1):
        end = at + example.positions
        arrays["inputs"][row, at:end], arrays["targets"][row, at:end], weights = example.row()
        arrays["loss_weights"][row, at:end] = weights
        arrays["positions"][row, at:end] = np.arange(end - at)
        arrays["segment_ids"][row, at:end] = segment
        arrays["source_ids"][row, at:end] = source
        at = end
