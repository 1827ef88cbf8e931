"""What of the texts of benchmarks a text holds, by an index of these (made by `index`).

Three rules say that an item is held, after what has been published:

    13-gram   a run of 13 words is the same. GPT-3 (Brown et al. 2020, appendix C) filtered its training data so, with
              words in lower case and without punctuation. In items that are mostly in a script without spaces it is
              a run of 21 characters: 13 are but 8 words of Chinese, as few as the name of a committee.
    8-gram    of the item's runs of 8 words, at least `share` are there. PaLM (Chowdhery et al. 2022, section 8): 0.7 of
              the runs of the question, prompt or target. Tülu 3 (Lambert et al. 2024; open-instruct, decontamination):
              more than 0.5 of the item's words lie in such runs within one training text; here `measure` = "words".
    50-char   50 characters of words are the same, spaces and symbols left out. GPT-4 (OpenAI 2023, appendix C) took
              three random places of an item; here they are those at 0, 50, 100 … and the last, so that whatever copies
              99 characters in a row is found, and the same index comes out every time.

An item that is too short for a run is looked for whole: anywhere if it has 8 words (GPT-3's least N) or 13 characters;
else as a turn of its own ("Who are you?"); below `min_words` not at all. Rephrasing and translation escape all of this
(Yang et al. 2023, "Rethinking benchmark and contamination for language models with rephrased samples").

The index is arrays: sorted hashes of runs, each with the texts and the places in these where it stands (`Table`), and
whole short texts by their first 8 words or as turns. As a file it is an .npz without pickles.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt

from data_pipelines.addresses import sha256_of
from data_pipelines.contamination.ngrams import BOUNDARY, Characters, Ints, Runs, UInts, Words
from data_pipelines.errors import InputError

RULES = {"13-gram": 13, "8-gram": 8, "50-char": 50}
LONGER = 21  # the run of 13-gram in scripts without spaces
OF_A_WORD = 5 / 8  # is a character of these
SHORT = 13  # words: below, the texts for short items are looked for besides
ANYWHERE = 8  # words: from here on, what is looked for whole may stand within a text
ROUNDING = 1e-9  # of a share of runs
FORMAT = 1  # of the file

Int32s = npt.NDArray[np.int32]
Arrays = dict[str, npt.NDArray[Any]]


class Held(NamedTuple):
    """Something of a text of a benchmark, from word `first` to word `last` of the text that holds it."""

    text: int
    first: int
    last: int


class Table:
    """For each run: the texts that hold it and where. keys uint64[K] ascending; texts, places int32[E], those of key k
    from starts[k] to starts[k + 1]."""

    NAMES = ("keys", "starts", "texts", "places")

    def __init__(self, keys: UInts, starts: Ints, texts: Int32s, places: Int32s):
        self.keys, self.starts, self.texts, self.places = keys, starts, texts, places

    @classmethod
    def made(cls, keys: UInts, texts: Int32s, places: Int32s) -> "Table":
        order = np.lexsort((places, texts, keys))
        unique, starts = np.unique(keys[order], return_index=True)
        return cls(unique, np.append(starts, len(keys)), texts[order], places[order])

    def find(self, hashes: UInts) -> "Found":
        """The runs of the table that are among `hashes`."""
        if not len(self.keys) or not len(hashes):
            return NOTHING
        at = np.minimum(np.searchsorted(self.keys, hashes), len(self.keys) - 1)
        hits = np.flatnonzero(self.keys[at] == hashes)
        if not len(hits):
            return NOTHING
        first, last = self.starts[at[hits]], self.starts[at[hits] + 1]
        counts = last - first
        entries = np.repeat(last - np.cumsum(counts), counts) + np.arange(counts.sum())
        return Found(np.repeat(hits, counts), self.texts[entries], self.places[entries])


class Found(NamedTuple):
    """A run of a table each, in the order of `at`, where it was found; three arrays of one length."""

    at: Ints
    texts: Int32s
    places: Int32s

    def firsts(self, length: int) -> list[Held]:
        """Each text once, with the first of its runs."""
        if not len(self.at):
            return []
        texts, index = np.unique(self.texts, return_index=True)
        return [Held(int(text), int(first), int(first) + length - 1) for text, first in zip(texts, self.at[index])]


NOTHING = Found(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))


class Index:
    """See above. `benchmarks` are names, `ids` the items'; the items of text t are items[owners[t] : owners[t + 1]],
    and item i is of the benchmark of[i]. `counts` says what was made of the files, by benchmark."""

    def __init__(self, meta: Mapping[str, Any], arrays: Arrays):
        self.meta, self.arrays = meta, arrays
        self.benchmarks: list[str] = meta["benchmarks"]
        self.ids: list[str] = meta["ids"]
        self.counts: dict[str, dict[str, int]] = meta["counts"]
        self.of, self.owners, self.items = arrays["of"], arrays["owners"], arrays["items"]
        self.tables = {rule: Table(*(arrays[f"{rule}.{name}"] for name in Table.NAMES)) for rule in meta["rules"]}
        self.anchored = Table(*(arrays[f"anchored.{name}"] for name in Table.NAMES))
        self.turns = Table(*(arrays[f"turns.{name}"] for name in Table.NAMES))

    def save(self, path: Path) -> str:
        """Writes the index; returns the file's sha256."""
        text = np.frombuffer(json.dumps(self.meta, ensure_ascii=False).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez(file, meta=text, **self.arrays)  # type: ignore[arg-type]
        return sha256_of(path)

    @classmethod
    def load(cls, path: Path | str) -> "Index":
        """Raises InputError for a file that is no index."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
            if meta["format"] != FORMAT:
                raise KeyError(f"format {meta['format']}")
            return cls(meta, arrays)
        except (ValueError, KeyError, OSError) as error:
            found = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: found no index of benchmarks ({found}); expected one by build_index") from error

    def owned(self, text: int) -> Iterator[tuple[str, str]]:
        """(benchmark, item) of those that have this text."""
        for item in self.items[self.owners[text] : self.owners[text + 1]]:
            yield self.benchmarks[self.of[item]], self.ids[item]

    def held(self, words: Words, rules: Sequence[str], share: float, measure: str) -> list[Held]:
        """What of the benchmarks' texts is held by texts that are joined by BOUNDARY, each once, by place."""
        runs = Runs(words.hashes)
        held = [*self.whole(words, runs)]
        for rule in rules:
            length, table = RULES[rule], self.tables[rule]
            if rule == "13-gram":
                for run in (length, LONGER) if words.alone.any() else (length,):
                    held += table.find(runs.of(run)).firsts(run)
            elif rule == "8-gram":
                held += self.shared(table.find(runs.of(length)), share, measure)
            else:
                held += self.characters(words, table, length)
        found: dict[int, Held] = {}
        for each in sorted(held, key=lambda held: (held.first, held.text)):
            found.setdefault(each.text, each)
        return list(found.values())

    def shared(self, found: Found, share: float, measure: str) -> Iterator[Held]:
        """Texts of which at least `share` is there."""
        length = RULES["8-gram"]
        for held in found.firsts(length):
            places = np.unique(found.places[found.texts == held.text])
            covered = len(places) if measure == "grams" else int(np.minimum(np.diff(places), length).sum()) + length
            if covered >= share * int(self.arrays[f"8-gram.{measure}"][held.text]) - ROUNDING:
                yield held

    def characters(self, words: Words, table: Table, length: int) -> Iterator[Held]:
        characters = Characters(words)
        for held in table.find(Runs(characters.hashes).of(length)).firsts(length):
            places = characters.places[[held.first, held.last]]
            first, last = np.searchsorted(words.starts, places, "right") - 1
            yield Held(held.text, int(first), int(last))

    def whole(self, words: Words, runs: Runs) -> Iterator[Held]:
        """Texts that are looked for whole."""
        lengths, hashes = self.arrays["lengths"], self.arrays["hashes"]
        found = self.anchored.find(runs.of(ANYWHERE))
        ends = found.at + lengths[found.texts]
        there = np.flatnonzero(ends <= len(words))
        there = there[runs.between(found.at[there], ends[there]) == hashes[found.texts[there]]]
        for i in there.tolist():
            yield Held(int(found.texts[i]), int(found.at[i]), int(ends[i]) - 1)
        bounds = np.flatnonzero(words.codes[words.starts] == ord(BOUNDARY))
        starts, ends = np.append(0, bounds + 1), np.append(bounds, len(words))
        found = self.turns.find(runs.between(starts, ends))
        for turn, text in zip(found.at.tolist(), found.texts.tolist()):
            yield Held(text, int(starts[turn]), int(ends[turn]) - 1)


@functools.lru_cache(maxsize=2)
def loaded(path: str, digest: str) -> Index:
    """The index at a path or URL, once in a process. Raises InputError if the file is not the one that is meant."""
    if "://" not in path:
        return _checked(path, path, digest)
    with tempfile.NamedTemporaryFile(suffix=".npz") as copy, fsspec.open(path, "rb") as file:
        shutil.copyfileobj(file, copy)
        copy.flush()
        return _checked(copy.name, path, digest)


def _checked(path: str, name: str, digest: str) -> Index:
    if digest and (found := sha256_of(path)) != digest:
        raise InputError(f"{name}: found the sha256 {found}; expected {digest}")
    return Index.load(path)
