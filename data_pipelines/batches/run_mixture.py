"""The mixture that a run's `data` section asks for.

    sources      "name" or "name=weight"; weights are relative, 0 for a source that waits for the schedule
    weigh        what weights are shares of: "examples", "tokens", or "" for what the prepared data says
    temperature  above 1 makes shares more even, as in T5
    max_epochs   "name=epochs": a source is read so often at most; the others go on in their proportions
    schedule     "STEP: name=weight, name=weight", ascending: the weights from that step on

The order of examples is one of draws, of which rows take as many as fit. What is said in steps or tokens is brought to
draws by measuring lengths on the first examples, with the run's own tokenizer, template and packing, so it is the same
in every process and after every resumption. Weights therefore change at the step asked for to within what the lengths
of 2,048 examples tell, about one step in a hundred, and within the few steps in which one shard after the other comes
to the change. The draw at which they change is exact, and the banner names it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.batches.examples import Encode, Examples, Source
from data_pipelines.batches.packing import count_rows
from data_pipelines.errors import InputError
from data_pipelines.mixing.mixture import Draws, Mixture
from data_pipelines.mixing.shares import example_weights

SAMPLE = 2048  # examples whose lengths are measured
KEYS: Mapping[str, Any] = {"weigh": "", "temperature": 1.0, "max_epochs": (), "schedule": ()}

Section = Mapping[str, Any]
Weights = Mapping[str, float]


def make_mixture(
    section: Section,
    sources: Mapping[str, Source],
    encode: Encode,
    weights: Weights | None,
    seed: int,
    unit: str = "examples",
) -> Mixture:
    """`weights` and `unit`: those of the sources, as the section or else the prepared data has them."""
    chosen = {key: section.get(key, default) for key, default in KEYS.items()}
    unit = chosen["weigh"] or unit
    if unit not in ("examples", "tokens"):
        raise InputError(f"data.weigh: found {unit!r}; expected 'examples' or 'tokens'")
    measure = _Measure(section, sources, encode, seed)
    by_examples = lambda given: measure.by_examples(given) if unit == "tokens" and given else dict(given)
    temperature = float(chosen["temperature"])
    first = now = by_examples(weights or {})
    schedule: list[tuple[int, Weights]] = []
    step = draw = 0
    for at, later in map(change, chosen["schedule"]):
        if at <= step:
            raise InputError(f"data.schedule: found step {at} after step {step}; expected ascending ones")
        draws_per_step = section["batch_size"] / measure.rows_per_draw(now, temperature)
        draw += max(1, round((at - step) * draws_per_step))
        step, now = at, by_examples(later)
        schedule.append((draw, now))
    max_epochs = dict(pair(entry, "max_epochs") for entry in chosen["max_epochs"])
    return Mixture(measure.sizes, first, seed, temperature=temperature, max_epochs=max_epochs, schedule=schedule)


def rows_per_draw(
    section: Section, sources: Mapping[str, Source], encode: Encode, mixture: Mixture, seed: int
) -> float:
    """Rows that an example takes, padding included: the first draws of the run are packed as they will be."""
    picked = mixture.draw_many(range(min(SAMPLE, mixture.draws_for_epochs(1))))
    sizes = Examples(sources, encode, seed).positions(picked)
    kept, pool = sizes[sizes > 0].tolist(), section["pool"]
    pools = [kept[i : i + pool] for i in range(0, len(kept), pool)]
    rows = sum(count_rows(pool, section["length"], section["packing"]) for pool in pools)
    return rows / len(picked.source)


class _Measure:
    """Lengths of the sources' first examples."""

    def __init__(self, section: Section, sources: Mapping[str, Source], encode: Encode, seed: int):
        self.section, self.sources, self.encode, self.seed = section, sources, encode, seed
        self.sizes = {name: len(source) for name, source in sources.items()}

    def by_examples(self, token_weights: Weights) -> dict[str, float]:
        """Weights by examples that mix tokens as asked."""
        if unknown := [name for name in token_weights if name not in self.sizes]:
            raise InputError(f"weights: found {unknown}; expected names among {list(self.sizes)}")
        return example_weights(token_weights, {name: self.mean(name) for name, w in token_weights.items() if w})

    def mean(self, name: str) -> float:
        """Positions of an example of a source, on average."""
        alone = Mixture({name: self.sizes[name]}, seed=self.seed)
        picked = alone.draw_many(range(min(SAMPLE, self.sizes[name])))
        zeros = Draws(np.zeros_like(picked.source), picked.epoch, picked.example)
        return float(Examples({name: self.sources[name]}, self.encode, self.seed).positions(zeros).mean())

    def rows_per_draw(self, weights: Weights, temperature: float) -> float:
        drawn = [name for name in self.sizes if not any(weights.values()) or weights.get(name)]
        sources = {name: self.sources[name] for name in drawn}
        given = {name: weights[name] for name in drawn} if any(weights.values()) else None
        alone = Mixture({name: self.sizes[name] for name in drawn}, given, self.seed, temperature=temperature)
        return rows_per_draw(self.section, sources, self.encode, alone, self.seed)


def change(entry: str) -> tuple[int, dict[str, float]]:
    """ "1000: hc3=1, sharegpt=3" -> (1000, {"hc3": 1.0, "sharegpt": 3.0})."""
    step, colon, weights = entry.partition(":")
    if not colon or not step.strip().isdecimal() or int(step) < 1:
        raise InputError(f"data.schedule: found {entry!r}; expected 'STEP: name=weight, name=weight'")
    return int(step), dict(pair(item, "schedule") for item in weights.split(",") if item.strip())


def pair(entry: str, key: str) -> tuple[str, float]:
    name, _, number = entry.strip().partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise InputError(f"data.{key}: found {entry!r}; expected 'name=number'") from None


def phase_lines(mixture: Mixture) -> Sequence[str]:
    """What is drawn from when on, a line a phase; nothing where it never changes."""
    if len(mixture.phases) == 1 and mixture.end is None:
        return []
    lines = []
    for phase in mixture.phases:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in phase.shares.items() if share)
        lines.append(f"from draw {phase.start:,}: {shares}")
    return [*lines, f"the data ends after draw {mixture.end:,}"] if mixture.end is not None else lines
