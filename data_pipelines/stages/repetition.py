"""Text that repeats itself, by the rules of Gopher (J. Rae et al., arXiv 2112.11446, table A1), as FineWeb applies them
(G. Penedo et al., arXiv 2406.17557).

A document goes if too much of it is lines, paragraphs or word n-grams that it has already had: menus, lists of tags,
pages put together by machines, answers caught in a loop. Shares are of characters, but for the two that say so.
Documents of fewer than WORDS words are left alone (Gopher drops them for that).

Where we depart: in a text without spaces every Han, kana or Thai character counts as half a word, so that what is an
n-gram for Gopher has 2n characters. Of 240 Chinese news articles 8 go in that way, and 81 with n characters; of 272
English pages of C4 it is 12. Meant for documents: of short answers the rules drop some that are fine (3 % of Alpaca in
Chinese), since a short text has to repeat what it is about.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

WORDS = 50

LINES, PARAGRAPHS = 0.30, 0.30  # shares by number
LINE_CHARS, PARAGRAPH_CHARS = 0.20, 0.20
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # the most frequent n-gram
ALL = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # n-grams that occurred before

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af"
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def repetition(text: str) -> str | None:
    """What repeats itself too much, with its share, for a person to read; None if nothing does."""
    words = _WORD.findall(text)
    if len(words) < WORDS:
        return None
    unit = 2 if 2 * len(_CHARACTER.findall(text)) > len(words) else 1
    return (
        _parts(text.split("\n"), "lines", LINES, LINE_CHARS)
        or _parts(text.split("\n\n"), "paragraphs", PARAGRAPHS, PARAGRAPH_CHARS)
        or _ngrams(words, unit)
    )


def _parts(parts: Sequence[str], name: str, share: float, chars: float) -> str | None:
    kept = [stripped for part in parts if (stripped := part.strip())]
    again = [part for part, count in Counter(kept).items() for _ in range(count - 1)]
    if len(again) > share * len(kept):
        return f"{len(again)} of {len(kept)} {name} repeated; expected {share:.0%} or less"
    if (found := sum(map(len, again))) > chars * sum(map(len, kept)):
        return f"{name} repeated in {found / sum(map(len, kept)):.0%} of the text; expected {chars:.0%} or less"
    return None


def _ngrams(words: list[str], unit: int) -> str | None:
    """`unit`: how many of `words` are one word."""
    total = sum(map(len, words))
    for n, share in TOP.items():
        gram, count = Counter(_grams(words, n * unit)).most_common(1)[0]
        if count == 1:
            return None
        if (found := count * (len(gram) - gram.count(" "))) > share * total:
            return f"{gram!r} makes up {found / total:.0%} of the text; expected {share:.0%} or less"
    for n, share in ALL.items():
        found = _repeated_chars(words, n * unit)
        if found > share * total:
            return f"{n}-grams repeated in {found / total:.0%} of the text; expected {share:.0%} or less"
        if found <= min(ALL.values()) * total:  # what is in longer ones is in shorter ones as well
            return None
    return None


def _grams(words: list[str], n: int) -> list[str]:
    """Runs of n words, with a space between them: cut from one text, which is faster than tuples."""
    text = " ".join(words)
    starts = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    return [text[start : end - 1] for start, end in zip(starts, starts[n:])]


def _repeated_chars(words: list[str], n: int) -> int:
    """Characters in n-grams that occurred before, each counted once."""
    seen: set[str] = set()
    found = end = 0
    for i, gram in enumerate(_grams(words, n)):
        if gram in seen:
            found += sum(map(len, words[max(i, end) : i + n]))
            end = i + n
        seen.add(gram)
    return found
