"""Texts of 1 kB with planted copies of known kinds, and texts that look like copies and are none.

`plant` adds one copy of each document, of the kind whose turn it is: exact; noise (2 % of the characters replaced, left
out or put in, always the full 2 %); reordered (its sentences shuffled); cut_start and cut_end (a tenth is missing). All
originals come first, so a copy's keeper has to be its own original. Copies do not help each other to be found: there is
one of each document, and originals are `distinct`.
"""

import gzip
import hashlib
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.sources import pydoc

SIZE = 1000  # bytes of a text
NOISE, CUT = 0.02, 0.1
WINDOW = 24  # characters that two documents have by chance only if one quotes the other
END = "。！？"
SENTENCE = re.compile(rf"(?<=[.!?])\s+|(?<=[{END}])\s*|\n\n+")


class Document(NamedTuple):
    """`family`: the number of the original, the same for its copy."""

    text: str
    kind: str
    family: int


def corpora(data: Path | None) -> dict[str, Iterator[str]]:
    """Texts in three languages from a folder of real data; without one those of the standard library alone."""
    if data is None:
        return {"pydoc": documentation()}
    chinese = (row["text"] for row in rows(data / "eval/skywork/zh_general.jsonl.gz"))
    answers = (
        row["human_answers"] + row["chatgpt_answers"] for row in rows(data / "koala/hc3/hc3_en_native_subset.jsonl.gz")
    )
    stories = "\n".join(lines(data / "pretrain/tinystories/tinystories_sample_2MiB.txt.gz")).split("<|endoftext|>")
    return {
        "pydoc": documentation(),
        "HC3 answers": each_alone(itertools.chain.from_iterable(answers)),
        "WikiText-2": pieces(lines(data / "pretrain/wikitext2/wiki.valid.tokens.gz")),
        "TinyStories": each_alone(stories),
        "Chinese web": pieces(chinese),
        "Japanese novel": pieces(lines(data / "pretrain/wagahai_ja/wagahaiwa_nekodearu.txt.gz")),
    }


def documentation() -> Iterator[str]:
    made = pydoc.generate(kinds=("topic", "module", "class", "function"))
    return pieces(turn.text for conversation in made for turn in conversation.turns if turn.role != "user")


def rows(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rt") as file:
        yield from map(json.loads, file)


def lines(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return file.read().splitlines()


def each_alone(texts: Iterable[str]) -> Iterator[str]:
    return itertools.chain.from_iterable(pieces([text]) for text in texts)


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Whole sentences, as many as give SIZE bytes in UTF-8 or a little more."""
    held = ""
    for text in texts:
        for sentence in sentences(text):
            held = joined([held, sentence])
            if len(held.encode()) >= SIZE:
                yield held
                held = ""


def sentences(text: str) -> list[str]:
    return [sentence for sentence in SENTENCE.split(text) if sentence]


def joined(parts: Iterable[str]) -> str:
    """With a space between, which Chinese and Japanese do not have."""
    return "".join(part if not part or part[-1] in END else f"{part} " for part in parts).strip()


def distinct(texts: Iterable[str]) -> Iterator[str]:
    """Those of which nine tenths are in no text before: no near duplicates, by a measure that is not MinHash."""
    seen: set[int] = set()
    for text in texts:
        windows = {zlib.crc32(text[at : at + WINDOW].encode()) for at in range(len(text) - WINDOW + 1)}
        if len(windows & seen) <= len(windows) / 10:
            seen |= windows
            yield text


def noise(text: str, rng: random.Random) -> str:
    """round(2 %) of the characters changed; new ones are taken from the text itself."""
    letters, characters = sorted(set(text)), list(text)
    for place in sorted(rng.sample(range(len(text)), round(NOISE * len(text))), reverse=True):
        other = rng.choice(letters)
        characters[place : place + 1] = rng.choice(([other], [], [other, characters[place]]))
    return "".join(characters)


def reorder(text: str, rng: random.Random) -> str:
    shuffled = sentences(text)
    rng.shuffle(shuffled)
    return joined(shuffled)


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
    """All texts as "original", then a copy of each."""
    originals = [Document(text, "original", family) for family, text in enumerate(texts)]
    kinds = list(KINDS)
    copies = [Document(text, kinds[family % len(kinds)], family) for text, _, family in originals]
    return originals + [
        copy._replace(text=KINDS[copy.kind](copy.text, random.Random(f"{seed}/{copy.family}"))) for copy in copies
    ]


def boilerplate(texts: Sequence[str], share: float, group: int = 10) -> list[str]:
    """Documents of which every `group` start with the same text; it is `share` of each, and the rest is its own."""
    made = []
    for start in range(0, len(texts) - group, group + 1):
        header = texts[start]
        for own in texts[start + 1 : start + 1 + group]:
            made.append(header[: round(share * len(header))] + " " + own[round(share * len(own)) :])
    return made


def other_numbers(text: str, rng: random.Random) -> str:
    """Every digit replaced by another one."""
    return re.sub(r"\d", lambda digit: rng.choice([d for d in "123456789" if d != digit[0]]), text)


def word_shingles(texts: Iterable[str], size: int) -> Iterator[npt.NDArray[np.uint32]]:
    """For each text the hashes uint32[m] of its runs of `size` words; of a shorter text one, of all its words."""
    for text in texts:
        words = text.split()
        runs = [" ".join(words[at : at + size]) for at in range(max(1, len(words) - size + 1))]
        digests = b"".join(hashlib.blake2b(run.encode(), digest_size=4).digest() for run in runs)
        yield np.frombuffer(digests, "<u4").astype(np.uint32)
