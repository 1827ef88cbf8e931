"""Documents with planted copies of known kinds, to measure what finds them and what it takes for copies wrongly.

Copies, one of each document: exact; noise (2 % of the characters replaced, left out or put in, always the full 2 %);
reordered (the sentences shuffled); cut_start and cut_end (a tenth of it is missing). Each copy's family is its
original, so copies do not help each other to be found. Not copies: `boilerplate` (documents that share half of their
text with others, such as a licence under which each has its own).
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

NOISE, CUT = 0.02, 0.1
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")


class Document(NamedTuple):
    """`family`: the number of the original, the same for its copies."""

    text: str
    kind: str
    family: int


def pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """Texts put together, or cut where white space or a sentence is, to about `size` bytes each."""
    held = ""
    for text in texts:
        for sentence in filter(None, SENTENCE.split(text)):
            held += ("" if not held else "\n" if len(held) % 3 else " ") + sentence
            if len(held.encode()) >= size:
                yield held
                held = ""


def noise(text: str, rng: random.Random) -> str:
    """Changes round(2 %) of the characters; new ones are taken from the text itself."""
    letters, characters = sorted(set(text)), list(text)
    for place in sorted(rng.sample(range(len(text)), round(NOISE * len(text))), reverse=True):
        other = rng.choice(letters)
        characters[place : place + 1] = rng.choice(([other], [], [other, characters[place]]))
    return "".join(characters)


def reorder(text: str, rng: random.Random) -> str:
    sentences = [sentence for sentence in SENTENCE.split(text) if sentence]
    rng.shuffle(sentences)
    return " ".join(sentences)


def cut_start(text: str, _: random.Random) -> str:
    return text[round(CUT * len(text)) :]


def cut_end(text: str, _: random.Random) -> str:
    return text[: len(text) - round(CUT * len(text))]


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "exact": lambda text, _: text,
    "noise": noise,
    "reordered": reorder,
    "cut_start": cut_start,
    "cut_end": cut_end,
}


def plant(texts: Sequence[str], seed: int = 0) -> list[Document]:
    """All texts, then of each a copy of the kind whose turn it is."""
    kinds = list(KINDS)
    copies = []
    for family, text in enumerate(texts):
        kind = kinds[family % len(kinds)]
        copies.append(Document(KINDS[kind](text, random.Random(f"{seed}/{family}")), kind, family))
    return [Document(text, "original", family) for family, text in enumerate(texts)] + copies
