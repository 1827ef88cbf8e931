"""From figures to pictures: which numbers go into which chart, on which scale."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from data_pipelines.batches.batch_stats import Item
from data_pipelines.reporting import charts
from data_pipelines.reporting.accounts import Account, flows
from data_pipelines.reporting.flow import flow
from data_pipelines.reporting.mixing import PICTURED, Mixing
from data_pipelines.reporting.numbers import number, short, words
from data_pipelines.reporting.runs import Curve, Run


def flow_picture(accounts: Sequence[Account], stages: Sequence[str], splits: Sequence[str]) -> Markup:
    return flow(flows(accounts, stages, splits), ["reading", *map(words, stages)], splits)


class Lengths:
    """Histograms of several sources on one axis."""

    def __init__(self, lengths: Mapping[str, Counter[int]], unit: str, mark: tuple[int, str] | None):
        self.lengths, self.unit, self.mark = lengths, unit, mark
        found = [charts.bin_of(max(1, value)) for counts in lengths.values() for value in counts]
        if mark is not None:
            found.append(charts.bin_of(mark[0]))
        self.domain = (min(found, default=0), max(found, default=1))

    def picture(self, account: Account) -> Markup:
        counts, class_ = self.lengths[account.name], charts.colour(account.number)
        return charts.histogram(counts, self.domain, self.unit, class_, self.mark) if counts else Markup("")


def turn_bars(turns: Mapping[int, int], most: int = 10) -> list[tuple[str, int]]:
    """(label, examples) for 1, 2, … turns and for `most` or more; no more labels than needed."""
    longest = max(turns, default=0)
    bars = [(str(n), turns.get(n, 0)) for n in range(min(turns, default=1), min(longest, most - 1) + 1)]
    return [*bars, (f"{most} or more", sum(c for n, c in turns.items() if n >= most))] if longest >= most else bars


def mixture_picture(mixing: Mixing, classes: Mapping[str, str]) -> Markup:
    """Shares over the draws, with steps at the axis where they are known."""
    total = mixing.steps or mixing.draws
    unit = "steps" if mixing.steps else "draws"
    axis = [(part, f"{short(total * part)}{f' {unit}' if part == 1 else ''}") for part in (0, 0.25, 0.5, 0.75, 1)]
    return charts.columns(mixing.windows, classes, axis)


def rows_picture(mixing: Mixing, names: Sequence[str], classes: Mapping[str, str]) -> Markup:
    """The first rows of a run."""
    assert mixing.packed is not None
    picked = mixing.packed.rows[:PICTURED]
    return charts.packed_rows([[segment(item, names, classes) for item in row] for row in picked], mixing.packed.length)


def segment(item: Item, names: Sequence[str], classes: Mapping[str, str]) -> charts.Segment:
    positions, name = item.example.positions, names[item.source]
    hint = f"{name}, {item.id}: {number(positions)} positions, {number(item.loss_tokens)} learned"
    hint += f"; {number(item.example.cut)} cut off" if item.example.cut else ""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], item.example.row()[2] > 0, [0]))))
    stretches = [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2])]
    return classes[name], hint, positions, stretches


def run_curves(runs: Sequence[Run]) -> list[Markup]:
    """Held-out loss by source, a picture each, over the same steps; a line for each run that has the source. What the
    loss was before training is left out: all that follows would look the same beside it."""
    found: dict[str, list[tuple[str, str, Curve]]] = {}
    for place, run in enumerate(runs):
        for source, curve in run.heldout.items():
            later = [point for point in curve if point[0] > 0] or curve
            found.setdefault(source, []).append((f"{charts.colour(place)} dash{place % 3}", run.name, later))
    steps = [step for series in found.values() for _, _, curve in series for step, _ in curve]
    return [charts.curves(found[source], source, (min(steps), max(steps))) for source in sorted(found)]
