"""Small pictures as SVG: histograms, bars, stacked columns, curves, packed rows.

Colours and line styles are classes that the page's style sheet knows (source n is "s0" to "s11"), so that a picture
follows the light or the dark page. Every text passes `tag`, which escapes it.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from data_pipelines.inert import inert
from data_pipelines.reporting.numbers import number, power, share

COLOURS = 12

Points = Sequence[tuple[float, float]]
Content = str | Iterable[Markup]


def tag(name: str, content: Content = "", **attributes: Any) -> Markup:
    """An element; `class_` is the attribute class, and view_box stands for view-box or viewBox as SVG has it."""
    written = "".join(
        f' {_ATTRIBUTES.get(key, key.rstrip("_").replace("_", "-"))}="{escape(inert(str(_round(value))))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = escape(inert(content)) if isinstance(content, str) else Markup("").join(content)
    return Markup(f"<{name}{written}>{inner}</{name}>")


_ATTRIBUTES = {"view_box": "viewBox", "aspect": "preserveAspectRatio"}


def _round(value: Any) -> Any:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def picture(width: float, height: float, label: str, parts: Iterable[Markup], class_: str = "chart") -> Markup:
    inner = [tag("title", label), *parts]
    return tag("svg", inner, class_=class_, width=width, height=height, view_box=f"0 0 {width} {height}", role="img")


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    return tag("text", content, x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor)


def box(x: float, y: float, width: float, height: float, class_: str, hint: str = "") -> Markup:
    inner = [tag("title", hint)] if hint else ""
    return tag("rect", inner, x=float(x), y=float(y), width=float(width), height=float(height), class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def colour(index: int) -> str:
    """The class of a source or a run."""
    return f"s{index % COLOURS}"


################################################ One source ################################################


def bin_of(value: int) -> int:
    """The half octave of a length of 1 or more: floor(2 · log2(value)), in whole numbers."""
    return (value * value).bit_length() - 1


def bin_start(number_: int) -> int:
    """The smallest length in a half octave."""
    return math.isqrt((1 << number_) - 1) + 1


def histogram(
    lengths: Mapping[int, int], domain: tuple[int, int], unit: str, class_: str, mark: tuple[int, str] | None = None
) -> Markup:
    """How many examples have which length, in half octaves from bin domain[0] to domain[1]; `mark`: a length to draw
    a line at, such as that of a row, and what it is called. What is longer is hatched."""
    width, height, left, top, bottom = 320, 168, 42, 22, 30
    bins: dict[int, int] = {}
    for length, count in lengths.items():
        bins[bin_of(max(1, length))] = bins.get(bin_of(max(1, length)), 0) + count
    total, most = sum(bins.values()), max(bins.values(), default=1)
    column = (width - left - 4) / (domain[1] - domain[0] + 1)
    at = lambda value: left + column * (2 * math.log2(value) - domain[0])
    base, scale = height - bottom, (height - bottom - top) / most
    parts = [line(left, base, width - 2, base, "axis")]
    top_share = most / max(1, total)
    parts += [text(left - 5, top + 4, share(top_share), "tick", "end"), line(left - 3, top, left, top, "axis")]
    for place, count in sorted(bins.items()):
        low, high = bin_start(place), bin_start(place + 1) - 1
        hint = f"{number(low)} to {number(high)} {unit}: {number(count)} examples, {share(count / total)}"
        x, tall = left + column * (place - domain[0]), max(1.0, count * scale)
        beyond = mark is not None and low > mark[0]
        parts.append(box(x + 0.5, base - tall, column - 1, tall, "over" if beyond else class_, hint))
    for place in range(domain[0] + domain[0] % 2, domain[1] + 2, 2 * max(1, (domain[1] - domain[0]) // 10)):
        x = at(2 ** (place // 2))
        parts += [line(x, base, x, base + 3, "axis"), text(x, base + 14, power(2 ** (place // 2)), "tick", "middle")]
    parts.append(text((left + width) / 2, height - 2, unit, "tick", "middle"))
    if mark is not None and domain[0] <= 2 * math.log2(mark[0]) <= domain[1] + 1:
        x, right = at(mark[0]), at(mark[0]) > width / 2
        label = text(x - 4 if right else x + 4, top - 8, mark[1], "mark", "end" if right else "start")
        parts += [line(x, top - 14, x, base, "mark"), label]
    return picture(width, height, f"lengths in {unit}", parts)


def bar(part: float, class_: str, width: int = 120) -> Markup:
    """A bar for the cell of a table: `part` of its width."""
    filled = box(0, 0, max(0.0, min(1.0, part)) * width, 10, class_)
    ground = box(0, 0, width, 10, "ground")
    return tag("svg", [ground, filled], class_="bar", width=width, height=10, view_box=f"0 0 {width} 10")


def swatch(class_: str) -> Markup:
    """The colour of a source, before its name."""
    return tag("svg", [box(0, 0, 11, 11, class_)], class_="swatch", width=11, height=11, view_box="0 0 11 11")


############################################### Mixture, rows ##############################################


def columns(
    windows: Mapping[str, Sequence[int]], classes: Mapping[str, str], axis: Sequence[tuple[float, str]]
) -> Markup:
    """The shares of sources, window after window, as columns of height 1. axis: (place from 0 to 1, label)."""
    width, height, left, top, bottom = 720, 200, 44, 8, 34
    count = len(next(iter(windows.values()), ()))
    column, tall, base = (width - left - 8) / max(1, count), height - top - bottom, height - bottom
    parts = [text(left - 6, base - tall * p + 4, share(p), "tick", "end") for p in (0, 0.5, 1)]
    for place in range(count):
        total, y = sum(values[place] for values in windows.values()), float(base)
        for name, values in windows.items():
            part = values[place] / total if total else 0.0
            y -= part * tall
            hint = f"{name}: {number(values[place])} of {number(total)} draws, {share(part)}"
            parts.append(box(left + place * column, y, column - 0.6, part * tall, classes[name], hint))
    for part, label in axis:
        x = left + part * (width - left - 8)
        anchor = "start" if part == 0 else "end" if part == 1 else "middle"
        parts += [line(x, base, x, base + 4, "axis"), text(x, base + 17, label, "tick", anchor)]
    return picture(width, height, "share of each source in the draws", parts)


Segment = tuple[str, str, int, Sequence[tuple[int, int]]]  # class, hint, positions, learned stretches within


def packed_rows(rows: Sequence[Sequence[Segment]], length: int) -> Markup:
    """Rows of `length` positions with their segments; what is learned has a dark bar below it, padding is hatched."""
    width, left, tall, gap = 1000, 46, 20, 9
    scale, parts = (width - left - 2) / length, list[Markup]()
    for number_, row in enumerate(rows):
        y, at = number_ * (tall + gap) + 2, 0
        parts.append(text(left - 8, y + 14, f"row {number_ + 1}", "tick", "end"))
        for class_, hint, positions, learned in row:
            x = left + at * scale
            parts.append(box(x, y, max(0.4, positions * scale - 1), tall - 5, class_, hint))
            for start, end in learned:
                parts.append(box(x + start * scale, y + tall - 4, (end - start) * scale, 4, "ink"))
            at += positions
        if at < length:
            rest = f"padding: {number(length - at)} of {number(length)} positions"
            parts.append(box(left + at * scale, y, (length - at) * scale, tall, "hatched", rest))
    label = f"packed rows of {number(length)} positions"
    return picture(width, len(rows) * (tall + gap) + 4, label, parts, "chart wide")


################################################### Curves #################################################


def curves(series: Sequence[tuple[str, str, Points]], title: str, steps: tuple[float, float]) -> Markup:
    """Lines of (class, name, points) over steps from steps[0] to steps[1]."""
    width, height, left, top, bottom = 320, 190, 40, 26, 28
    values = [value for _, _, points in series for _, value in points]
    margin = max(0.05 * (max(values) - min(values)), 0.005)
    (first, last), low, high = steps, max(0.0, min(values) - margin), max(values) + margin
    at = lambda step: left + (width - left - 10) * (step - first) / max(1e-9, last - first)
    up = lambda value: height - bottom - (height - bottom - top) * (value - low) / max(1e-9, high - low)
    parts = [text(left, 14, title, "title")]
    for value in ticks(low, high):
        parts += [line(left, up(value), width - 10, up(value), "grid")]
        parts += [text(left - 5, up(value) + 4, f"{value:g}", "tick", "end")]
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(text(at(step), height - 12, number(round(step)), "tick", anchor))
    parts.append(text((left + width) / 2, height - 12, "step", "tick", "middle"))
    for class_, name, points in series:
        path = " ".join(f"{at(step):.1f},{up(value):.1f}" for step, value in points)
        hint = [tag("title", f"{name}: {points[-1][1]:.4f} at step {number(round(points[-1][0]))}")]
        parts.append(tag("polyline", hint, points=path, class_=f"curve {class_}"))
        step, value = points[-1]
        parts.append(tag("circle", hint, cx=float(at(step)), cy=float(up(value)), r=3, class_=class_))
    return picture(width, height, title, parts)


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers from low to high."""
    raw = max(high - low, 1e-9) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    return list(itertools.takewhile(lambda v: v <= high + 1e-9, (round((first + i) * step, 10) for i in range(8))))
