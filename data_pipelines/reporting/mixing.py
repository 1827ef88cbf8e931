"""Which source comes how often in a run, what share of the tokens that is, and how rows fill up.

Draws are counted exactly (`Mixture.counts`). What they are in tokens, and how many of them a row takes, is measured
on the first draws, packed as they come: a run with several shards packs other examples together.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.batches.batch_stats import Item
from data_pipelines.batches.packing import pack
from data_pipelines.batches.training_data import chosen_sources
from data_pipelines.datasets import Manifest
from data_pipelines.mixing.mixture import Mixture
from data_pipelines.reporting.encoding import encode
from data_pipelines.reporting.recipe import Recipe, learned_by
from data_pipelines.reporting.scan import TRAIN, opened

WINDOWS, WINDOW = 40, 50  # at most so many, of so many draws at least
MEASURED = 4096  # draws
PICTURED = 8  # rows


@dataclasses.dataclass(frozen=True)
class Share:
    """A source in a run: `weight` is its share of the draws as asked for, `drawn` what it got; `furthest` the largest
    distance, in examples, of draws so far from the share asked for, at the ends of the windows."""

    name: str
    size: int
    weight: float
    drawn: int
    furthest: float

    @property
    def epochs(self) -> float:
        return self.drawn / self.size


@dataclasses.dataclass(frozen=True)
class Packed:
    """The first draws as rows. tokens, loss_tokens: by source. lost: draws that are no example, since nothing is
    learned of them or the template refuses them."""

    length: int
    draws: int
    rows: Sequence[Sequence[Item]]
    tokens: Counter[str]
    loss_tokens: Counter[str]
    lost: int

    @property
    def padding(self) -> float:
        return 1 - self.tokens.total() / (len(self.rows) * self.length) if self.rows else 0.0


@dataclasses.dataclass(frozen=True)
class Mixing:
    """A run's draws. ends: where each window ends; windows: source -> draws in each. steps: None where no run says how
    many rows a step has."""

    shares: Sequence[Share]
    draws: int
    ends: Sequence[int]
    windows: Mapping[str, Sequence[int]]
    packed: Packed | None
    steps: int | None = None
    left_out: Sequence[str] = ()  # sources without an example to train on

    def measured_share(self, name: str, what: str) -> float:
        """A source's share of the `tokens` or `loss_tokens` of the first draws."""
        counts: Counter[str] = getattr(self.packed, what)
        return counts[name] / counts.total() if counts.total() else 0.0


def mix(
    directory: Path, manifest: Manifest, wanted: Sequence[str], recipe: Recipe | None, length: "Length", seed: int
) -> Mixing:
    """The mixture of a run over prepared data; `wanted` as in `chosen_sources`. Raises InputError if there is nothing
    to draw from."""
    names, weights = chosen_sources(wanted, manifest)
    sizes = {name: manifest["sources"][name]["splits"].get(TRAIN, {}).get("examples", 0) for name in names}
    there = {name: size for name, size in sizes.items() if size}
    mixture = Mixture(there, weights and {name: weights[name] for name in there}, seed)
    packed = pack_first(directory, mixture, recipe, seed) if recipe else None
    draws, steps = length.draws(mixture, packed)
    draws = draws if mixture.end is None else min(draws, mixture.end)
    number = max(1, min(WINDOWS, draws // WINDOW))
    ends = [draws * window // number for window in range(1, number + 1)]
    so_far = [mixture.counts(end) for end in (0, *ends)]
    expected = [mixture.expected(end) for end in (0, *ends)]
    shares = []
    for name, size in there.items():
        distances = [float(abs(counts[name] - asked[name])) for counts, asked in zip(so_far, expected)]
        asked_for = float(expected[-1][name] / draws)
        shares.append(Share(name, size, asked_for, so_far[-1][name], max(distances)))
    windows = {name: [b[name] - a[name] for a, b in itertools.pairwise(so_far)] for name in there}
    left_out = [name for name in names if name not in there]
    return Mixing(shares, draws, ends, windows, packed, steps, left_out)


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is: `epochs` of the examples, or so many steps of `rows` rows."""

    epochs: float = 1.0
    steps: int = 0
    rows: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Length":
        """By a run's configuration."""
        data, train = config["data"], config["train"]
        steps = train.get("steps") or -(-train.get("tokens", 0) // (data["batch_size"] * data["length"]))
        return cls(train.get("epochs") or 1.0, steps, data["batch_size"])

    def draws(self, mixture: Mixture, packed: Packed | None) -> tuple[int, int | None]:
        """(draws, steps); the steps of a run are made of rows, which take as many draws as the first ones did."""
        if not self.rows or packed is None or not packed.rows:
            return mixture.draws_for_epochs(self.epochs), None
        draws_per_row = packed.draws / len(packed.rows)
        if self.steps:
            return round(self.steps * self.rows * draws_per_row), self.steps
        draws = mixture.draws_for_epochs(self.epochs)
        return draws, max(1, -(-draws // max(1, round(self.rows * draws_per_row))))


def pack_first(directory: Path, mixture: Mixture, recipe: Recipe, seed: int) -> Packed:
    """The first draws, packed pool by pool."""
    sources = {name: opened(str(directory), name) for name in mixture.names}
    number = min(MEASURED, mixture.draws_for_epochs(1))
    draws = [mixture.draw(k) for k in range(number)]
    found = [item for _, item in encode(learned_by(recipe), sources, draws, seed)]
    items = [item for item in found if isinstance(item, Item)]
    rows: list[list[Item]] = []
    for start in range(0, len(items), recipe.pool):
        pool = items[start : start + recipe.pool]
        for row in pack([item.example.positions for item in pool], recipe.length, recipe.packing):
            rows.append([pool[piece.example].piece(piece) for piece in row])
    tokens, loss_tokens = Counter[str](), Counter[str]()
    for item in items:
        tokens[mixture.names[item.source]] += item.example.positions
        loss_tokens[mixture.names[item.source]] += item.loss_tokens
    return Packed(recipe.length, number, rows, tokens, loss_tokens, number - len(items))
