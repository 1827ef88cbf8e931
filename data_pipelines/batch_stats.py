"""What a batch is made of, and the counts of what has been handed out."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipelines.packing import Arrays, empty_arrays, fill_row
from data_pipelines.template import Example


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """`arrays` as in packing.empty_arrays; `examples`: (source name, conversation id) of each row's segments."""

    arrays: Arrays
    examples: list[list[tuple[str, str]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """An encoded example with its source's position and its conversation's id."""

    source: int
    id: str
    example: Example
    loss_tokens: int


def make_batch(rows: Sequence[Sequence[Item]], length: int, names: Sequence[str]) -> Batch:
    """One batch row for each list of items; an empty list gives padding."""
    arrays = empty_arrays(len(rows), length)
    for place, items in enumerate(rows):
        fill_row(arrays, place, [(item.example, item.source) for item in items])
    return Batch(arrays, [[(names[item.source], item.id) for item in items] for items in rows])


class Statistics:
    """Examples, tokens (positions with a target), loss tokens, examples that were cut and the tokens that cost,
    examples dropped by reason, all also by source; the padding's share of all positions."""

    _KINDS = ("examples", "tokens", "loss_tokens", "examples_cut", "tokens_cut")

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
                self._counts["examples", item.source] += 1
                self._counts["tokens", item.source] += item.example.positions
                self._counts["loss_tokens", item.source] += item.loss_tokens
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
