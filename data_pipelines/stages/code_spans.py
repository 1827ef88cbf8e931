"""Where a text in Markdown is code, so that stages which mend or judge prose can leave it alone.

Code is what stands in a fenced block (``` or ~~~, also in a list or a quotation, whatever the indentation) and in
backticks within a paragraph, as CommonMark 0.31 has it. Where that is not clear, more is taken for code: a fence that
is never closed goes on to the end. Code by indentation alone is taken for prose, since lists are indented as well.
Time is linear in the text, whatever stands in it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

FENCE = re.compile(r"^[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_RUN = re.compile("`+")
_BLANK = re.compile(r"\n[ \t]*\n")


class Piece(NamedTuple):
    """A stretch of a text. kind: "prose", "fence" (with its fence lines) or "code" (with its backticks)."""

    kind: str
    text: str


def pieces(text: str) -> list[Piece]:
    """The text cut up, in order and without a gap; none of the pieces is empty."""
    if "`" not in text and "~~~" not in text:
        return [Piece("prose", text)] if text else []
    cut: list[Piece] = []
    end = 0
    for start, stop in [*fences(text), (len(text), len(text))]:
        cut += _inline(text[end:start])
        cut.append(Piece("fence", text[start:stop]))
        end = stop
    return [piece for piece in cut if piece.text]


def prose(text: str) -> str:
    """The text without its code."""
    return "".join(piece.text for piece in pieces(text) if piece.kind == "prose")


def fences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every fenced block, from the start of its first line to the end of its last one."""
    opened: re.Match[str] | None = None
    for line in FENCE.finditer(text) if "```" in text or "~~~" in text else ():
        mark, rest = line.groups()
        if opened is None:
            if mark[0] == "~" or "`" not in rest:  # ```x``` on one line is code in backticks
                opened = line
        elif mark.startswith(opened[1]) and not rest.strip():
            yield opened.start(), line.end()
            opened = None
    if opened is not None:
        yield opened.start(), len(text)


def _inline(text: str) -> Iterator[Piece]:
    """Backticks close with the next run of as many in the same paragraph; a run without such a one is prose."""
    runs = [match.span() for match in _RUN.finditer(text)]
    blanks = [match.start() for match in _BLANK.finditer(text)] if runs else []
    closing: dict[int, int] = {}
    latest: dict[int, int] = {}  # length of a run -> the nearest one to the right, in the same paragraph
    for i in range(len(runs) - 1, -1, -1):
        start, stop = runs[i]
        while blanks and blanks[-1] >= stop:
            blanks.pop()
            latest.clear()
        if (other := latest.get(stop - start)) is not None:
            closing[i] = other
        latest[stop - start] = i
    end = i = 0
    while i < len(runs):
        if (other := closing.get(i)) is None:
            i += 1
            continue
        yield Piece("prose", text[end : runs[i][0]])
        end = runs[other][1]
        yield Piece("code", text[runs[i][0] : end])
        i = other + 1
    yield Piece("prose", text[end:])
