"""Between other people's tensors and our weights, by the tables of tables.py."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.bitnet import packed_layouts, packed_tensors
from easylm_plus.interop.tables import Rule, Table
from easylm_plus.interop.tensor_files import Layout, ShardWriter, Tensors
from easylm_plus.interop.weights import (
    Index,
    Names,
    Ternary,
    Weights,
    batches,
    indices,
    piece_shapes,
    stored,
    ternary_names,
    workers,
)
from easylm_plus.models.config import ModelConfig

Progress = Callable[[int], None]  # told the bytes of what was written


def rules_for(table: Table, shapes: Mapping[str, tuple[int, ...]], place: str) -> list[Rule]:
    """The rules about the weights that a model has; an error names one that no rule is about."""
    rules = [rule for rule in table if all(name in shapes for name in rule.ours)]
    if homeless := sorted(set(shapes) - {name for rule in rules for name in rule.ours}):
        raise UserError(f"{place}: found no tensors that stand for our {homeless[0]}")
    return rules


def their_names(rule: Rule, index: Index) -> list[str]:
    """A rule's tensors for a layer and an expert."""
    return [name.format(**dict(zip("ie", index))) for name in rule.theirs]


def their_shapes(rule: Rule, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> list[tuple[int, ...]]:
    """The shapes of a rule's tensors, which follow from those of our pieces."""
    empty = tuple(np.broadcast_to(np.zeros((), np.uint8), shapes[name]) for name in rule.ours)
    return [array.shape for array in rule.write(empty, config)]


class Translated(Weights):
    """Other people's tensors as our weights.

    Args:
      ignored: whether a tensor that no rule names may be left out.

    Raises UserError, before a tensor is read, for one that is missing, is left over, or has a shape that does not fit.
    """

    def __init__(self, tensors: Tensors, table: Table, config: ModelConfig, ignored: Callable[[str], bool]):
        self.config, self.place = config, tensors.place
        self._tensors: Any = tensors
        self._shapes = piece_shapes(config)
        rules = rules_for(table, self._shapes, self.place)
        self.groups: list[Names] = [rule.ours for rule in rules]
        self._rule_of = {name: rule for rule in rules for name in rule.ours}
        is_packed = getattr(tensors, "is_ternary", lambda _: False)
        self.packed_names = {
            name for name, rule in self._rule_of.items() if any(map(is_packed, their_names(rule, (0, 0))))
        }
        unread = set(tensors.names()).difference(*(self._check(rule) for rule in rules))
        if left := sorted(name for name in unread if not ignored(name)):
            raise UserError(f"{self.place}: found {left[0]} ({len(left)} such), for which this model has no place")

    def _check(self, rule: Rule) -> set[str]:
        """The names of the tensors that a rule reads."""
        expected, seen = their_shapes(rule, self._shapes, self.config), set()
        dtypes: dict[np.dtype, str] = {}
        for index in indices(rule.ours[0], self.config):
            for name, shape in zip(their_names(rule, index), expected, strict=True):
                ours = f"our {stored(rule.ours[0], index, scan=False)[0]}"
                if name not in self._tensors.names():
                    raise UserError(f"{self.place}: found no tensor {name} {list(shape)}, which is {ours}")
                if (found := self._tensors.shape(name)) != shape:
                    raise UserError(f"{self.place}: {name} has shape {list(found)}, expected {list(shape)} ({ours})")
                dtypes.setdefault(self._tensors.dtype(name), name)
                seen.add(name)
        if len(dtypes) > 1:
            told = ", ".join(f"{name} {dtype}" for dtype, name in dtypes.items())
            raise UserError(f"{self.place}: found {told}; expected one dtype for what becomes one array of ours")
        return seen

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(their_names(self._rule_of[name], (0, 0))[0])

    def ternary(self, name: str, index: Index) -> Ternary | None:
        if name not in self.packed_names:
            return None
        rule = self._rule_of[name]
        (theirs,) = their_names(rule, index)  # several would have a gamma each
        codes, gamma = self._tensors.ternary(theirs)
        return dict(zip(rule.ours, rule.read((codes,), self.config), strict=True))[name], gamma

    def read(self, names: Names, index: Index) -> list[np.ndarray]:
        rule = self._rule_of[names[0]]
        theirs = tuple(self._tensors.read(name) for name in their_names(rule, index))
        ours = dict(zip(rule.ours, rule.read(theirs, self.config), strict=True))
        rest = tuple(name for name in names if name not in ours)  # of another rule
        more = dict(zip(rest, self.read(rest, index), strict=True)) if rest else {}
        return [(ours | more)[name] for name in names]


def write_tensors(weights: Weights, table: Table, writer: Callable[[Sequence[Sequence[Layout]]], ShardWriter],
                  progress: Progress, packed: str = "") -> None:  # fmt: skip
    """Writes our weights as other people's tensors: first what is there once, then layer after layer.

    `packed`: the form (bitnet.py) that ternary weights are packed in; "": all are floats.

    The order of writing is another: weight after weight, as they lie in our checkpoints.
    """
    config, shapes = weights.config, piece_shapes(weights.config)
    rules = rules_for(table, shapes, weights.place)
    rule_of = {rule.ours: rule for rule in rules}
    made = {rule.ours: their_shapes(rule, shapes, config) for rule in rules}
    order = batches(rule_of, config)
    ternary = ternary_names(weights) if packed else frozenset()

    def layouts(piece: tuple[Names, Index]) -> list[Layout]:
        names, index = piece
        theirs = zip(their_names(rule_of[names], index), made[names], strict=True)
        plain = [Layout(name, weights.dtype(names[0]), shape) for name, shape in theirs]
        return packed_layouts(plain, weights.place) if names[0] in ternary else plain

    groups = [layouts(piece) for piece in sorted(itertools.chain(*order), key=lambda piece: piece[1][:1])]

    def contents(names: Names, index: Index) -> Sequence[np.ndarray]:
        rule = rule_of[names]
        if names[0] not in ternary:
            return rule.write(tuple(weights.read(names, index)), config)
        piece = weights.ternary(names[0], index)
        assert piece is not None, names[0]
        return packed_tensors(rule.write((piece[0],), config)[0], piece[1], packed)

    def move(piece: tuple[Names, Index]) -> None:
        arrays = contents(*piece)
        for (name, *_), array in zip(layouts(piece), arrays, strict=True):
            shards.write(name, array)
            progress(array.nbytes)

    with writer(groups) as shards, workers() as each:
        for batch in order:
            each(move, batch)
