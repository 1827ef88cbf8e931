"""The way of each source from the rows that were read to the examples that were written, as bands that get narrower.

Every source has a lane of its own, and all lanes one scale. At each step stands what came there: what went on, and
below it, hatched, what the step left out, with its number. The band behind reading widens where a row gives several
conversations.
"""

import itertools
from collections.abc import Sequence

from markupsafe import Markup

from data_pipelines.reporting.accounts import Flow
from data_pipelines.reporting.charts import box, colour, picture, tag, text
from data_pipelines.reporting.numbers import number

WIDTH, LEFT, RIGHT, TOP = 1060, 132, 116, 54
BANDS = 300, 100  # pixels of all bands together, and of one at most, where they are at their widest
NODE, GAP, LANE = 8, 12, 20
LABEL = 14  # pixels of the line in which a lane has the numbers of what was left out


def flow(ways: Sequence[Flow], steps: Sequence[str], splits: Sequence[str]) -> Markup:
    """`steps`: titles of reading and the stages; behind them comes what is written."""
    places = [LEFT + (WIDTH - LEFT - RIGHT) * i / len(steps) for i in range(len(steps) + 1)]
    scale = min(BANDS[0] / max(1, sum(way.widest for way in ways)), BANDS[1] / max(1, *(w.widest for w in ways), 1))
    parts, y = [], float(TOP)
    for way in ways:
        parts += _lane(way, places, y, scale, splits)
        dropped = any(step[0] > step[1] for step in way.steps if step)
        y += max(LANE, way.widest * scale) + GAP + LABEL * dropped
    came = [sum(step[0] for way in ways if (step := way.steps[i])) for i in range(len(steps))]
    units = ["rows", *["conversations"] * len(steps)]
    totals = [*came, sum(sum(way.parts) for way in ways)]
    for place, title, total, unit in zip(places, [*steps, "written"], totals, units):
        lines = ((12, title, "strong"), (27, number(total), "tick"), (40, unit, "tick"))
        parts += [text(place, *line) for line in lines]
    return picture(WIDTH, round(y), "what was read, left out and written, source by source", parts, "chart wide")


def _lane(way: Flow, places: Sequence[float], y: float, scale: float, splits: Sequence[str]) -> list[Markup]:
    class_, name = colour(way.account.number), way.account.name
    tall = lambda count: max(1.5, count * scale) if count else 0.0
    shown = name if len(name) < 20 else f"{name[:18]}…"
    parts = [text(LEFT - 10, y + 11, shown, "strong", "end")]
    stops = [(x, *step) for x, step in zip(places, way.steps) if step] + [(places[-1], sum(way.parts), 0)]
    for (x, size, kept), (after, goes_to, _) in itertools.pairwise(stops):
        hint = f"{name}: {number(kept)} of {number(size)} go on"
        parts.append(band(x + NODE, after, y, tall(kept), tall(goes_to), f"{class_} ribbon", hint))
        parts.append(box(x, y, NODE, tall(kept), class_, hint))
        if lost := size - kept:
            height = max(3.0, lost * scale)
            parts.append(box(x, y + tall(kept), NODE, height, "hatched", f"{name}: {number(lost)} left out"))
            parts.append(text(x, y + tall(kept) + height + 11, number(-lost), "lost"))
    top = y
    for split, count in zip(splits, way.parts):
        if count:
            second = "" if split == splits[0] else " second"
            hint = f"{name}, {split}: {number(count)}"
            parts.append(box(places[-1], top, NODE, tall(count), class_ + second, hint))
            top += tall(count)
    written = " + ".join(number(count) for count in way.parts)
    return [*parts, text(places[-1] + NODE + 8, y + 11, written, "tick")]


def band(x: float, after: float, y: float, height: float, height_after: float, class_: str, hint: str) -> Markup:
    """From one column to the next; its upper edge is straight."""
    middle, low, low_after = (x + after) / 2, y + height, y + height_after
    curve = f"C {middle:.1f} {low_after:.1f} {middle:.1f} {low:.1f} {x:.1f} {low:.1f}"
    path = f"M {x:.1f} {y:.1f} L {after:.1f} {y:.1f} L {after:.1f} {low_after:.1f} {curve} Z"
    return tag("path", [tag("title", hint)], d=path, class_=class_)
