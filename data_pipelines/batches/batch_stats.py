"""What a batch is made of, and the counts of what has been handed out."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.batches.packing import Arrays, Piece, empty_arrays, fill_row, part
from data_pipelines.templates.template import Example

# Of a row's segment: (source name, conversation id), and (..., start, stop) where it is a part of an example.
Segment = tuple[str, str] | tuple[str, str, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """`arrays` as in packing.empty_arrays; `examples`: what each row's segments are."""

    arrays: Arrays
    examples: list[list[Segment]]


def digest(batch: Batch) -> str:
    """A short hash of which examples are in which row: equal runs log equal hashes."""
    return hashlib.sha256(repr(batch.examples).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """An encoded example with its source's position and its conversation's id; `span`: which of its positions these
    are, if packing has split it."""

    source: int
    id: str
    example: Example
    loss_tokens: int
    span: tuple[int, int] | None = None

    def piece(self, piece: Piece) -> "Item":
        """Some positions of it, or all of them."""
        start, stop = piece[1:]
        if (start, stop) == (0, self.example.positions):
            return self
        example = part(self.example, start, stop)
        return Item(self.source, self.id, example, int(np.count_nonzero(example.row()[2])), (start, stop))

    def segment(self, names: Sequence[str]) -> Segment:
        return (names[self.source], self.id) if self.span is None else (names[self.source], self.id, *self.span)


def make_batch(rows: Sequence[Sequence[Item]], length: int, names: Sequence[str]) -> Batch:
    """One batch row for each list of items; an empty list gives padding."""
    arrays = empty_arrays(len(rows), length)
    for place, items in enumerate(rows):
        fill_row(arrays, place, [(item.example, item.source) for item in items])
    return Batch(arrays, [[item.segment(names) for item in items] for items in rows])


class Statistics:
    """Examples (counted with their first piece), tokens (positions with a target), loss tokens, examples that were cut
    and the tokens that cost, examples that were split over rows, examples dropped by reason, all also by source; the
    padding's share of all positions."""

    _KINDS = ("examples", "tokens", "loss_tokens", "examples_cut", "tokens_cut", "examples_split")

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._positions = 0
        self._counts: Counter[tuple[str, int]] = Counter()
        self._dropped: Counter[tuple[str, int]] = Counter()

    def add(self, rows: Sequence[Sequence[Item]], length: int) -> None:
        """Counts a batch of rows of `length` positions."""
        self._positions += len(rows) * length
        for items in rows:
            for item in items:
                self._counts["tokens", item.source] += item.example.positions
                self._counts["loss_tokens", item.source] += item.loss_tokens
                if item.span and item.span[0]:
                    continue
                self._counts["examples", item.source] += 1
                if item.span:
                    self._counts["examples_split", item.source] += 1
                if item.example.cut:
                    self._counts["examples_cut", item.source] += 1
                    self._counts["tokens_cut", item.source] += item.example.cut

    def drop(self, reason: str, source: int) -> None:
        self._dropped[reason, source] += 1

    def summary(self) -> dict[str, Any]:
        """{kind: number, "padding_share": float, "dropped": {reason: number}, "sources": {name: the same}}"""
        sources = {name: self._of([i]) for i, name in enumerate(self._names)}
        total = self._of(range(len(self._names)))
        padding = 1 - total["tokens"] / self._positions if self._positions else 0.0
        return {**total, "padding_share": padding, "sources": sources}

    def _of(self, sources: Sequence[int]) -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        for (reason, source), count in self._dropped.items():
            if source in sources:
                dropped[reason] += count
        counts = {kind: sum(self._counts[kind, source] for source in sources) for kind in self._KINDS}
        return {**counts, "dropped": dict(dropped)}
