"""Makes the index of benchmarks that `overlap` looks texts up in.

Boilerplate. GPT-3 ignored 13-grams of more than 10 training documents, mostly common phrases. That takes a count over
the whole of the training data before any of it can be judged, which a stage that sees one sample has not. Here runs
are ignored that more than `max_texts` different texts of the benchmarks share ("Choose the correct answer …"), counted
apart for each way to write an item, so that a passage with twelve questions is one text. What remains, such as a
quotation in many documents, shows in the report as an item with many hits, and can be named in the stage's `ignore`.

The bytes of the file depend on the items and the options alone. Memory: some 60 bytes a word of the benchmarks while
it is made; MMLU, C-Eval, CMMLU, AGIEval and ten smaller ones (54,616 items) are 63 MB for 13-gram, 10 for 50-char.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.addresses import code_of, sha256_of
from data_pipelines.contamination.eval_items import Item, benchmark_files, read_benchmark
from data_pipelines.contamination.ngrams import BOUNDARY, Characters, Ints, Runs, UInts, Words
from data_pipelines.contamination.overlap import (
    ANYWHERE,
    FORMAT,
    LONGER,
    OF_A_WORD,
    RULES,
    SHORT,
    Arrays,
    Index,
    Int32s,
    Table,
)
from data_pipelines.errors import InputError

OPTIONS = {"rules": ("13-gram", "50-char"), "answers": False, "max_texts": 20, "min_words": 4}


def build_index(benchmarks: Mapping[str, Any], folder: Path | str, options: Mapping[str, Any] | None = None) -> Index:
    """The index of benchmarks (name -> files and layout, see `eval_items`) in a folder.

    Options: rules; answers (whether answers and solutions count); max_texts and min_words, see above. Raises InputError
    for options, files and rows that do not fit.
    """
    chosen = {**OPTIONS, **(options or {})}
    if unknown := [key for key in chosen if key not in OPTIONS]:
        raise InputError(f"index: found the key {unknown[0]!r}; expected one of {', '.join(OPTIONS)}")
    if wrong := [rule for rule in chosen["rules"] if rule not in RULES]:
        raise InputError(f"index.rules: found {wrong[0]!r}; expected one of {', '.join(RULES)}")
    builder = _Builder(chosen)
    for name, spec in benchmarks.items():
        builder.benchmark(name, read_benchmark(name, spec, Path(folder), answers=chosen["answers"]))
    return builder.index()


class _Builder:
    """Collects texts, each once, however many items have it."""

    def __init__(self, options: Mapping[str, Any]):
        self.options = options
        self.counts: dict[str, Counter[str]] = {}
        self.ids: list[str] = []
        self.of: list[int] = []
        self.texts: dict[tuple[int, int], int] = {}  # (hash, words) -> text
        self.items: list[list[int]] = []  # by text
        self.ways: list[int] = []  # by text: which of an item's texts it is
        self.words: list[UInts] = []  # by text
        self.anywhere: list[bool] = []
        self.runs: dict[str, list[tuple[UInts, Ints]]] = {rule: [] for rule in options["rules"]}

    def benchmark(self, name: str, items: Iterable[Item]) -> None:
        counts = self.counts[name] = Counter(items=0, texts=0, too_short=0, without_text=0)
        for item in items:
            counts["items"] += 1
            self.ids.append(item.id)
            self.of.append(len(self.counts) - 1)
            texts = [Words(text.replace(BOUNDARY, " ")) for text in item.texts]
            if all(weight(words) < SHORT for words in texts):
                texts += [Words(text.replace(BOUNDARY, " ")) for text in item.short]
            counts["without_text"] += not texts
            for way, words in enumerate(texts):
                long_enough = len(words) >= self.options["min_words"]
                counts["texts" if long_enough else "too_short"] += 1
                if long_enough:
                    self.add(words, way)

    def add(self, words: Words, way: int) -> None:
        runs = Runs(words.hashes)
        whole = int(runs.between(np.array([0]), np.array([len(words)]))[0])
        text = self.texts.setdefault((whole, len(words)), len(self.texts))
        if text < len(self.items):
            self.items[text].append(len(self.ids) - 1)
            return
        self.items.append([len(self.ids) - 1])
        self.ways.append(way)
        self.words.append(words.hashes)
        self.anywhere.append(weight(words) >= ANYWHERE)
        for rule, found in self.runs.items():
            length = RULES[rule]
            if rule == "13-gram" and words.alone.mean() > 0.5:
                length = LONGER
            hashes = (Runs(Characters(words).hashes) if rule == "50-char" else runs).of(length)
            places = np.arange(len(hashes))
            if rule == "50-char":
                places = np.unique(np.append(places[::length], places[-1:]))
            found.append((hashes[places], places))

    def index(self) -> Index:
        arrays: Arrays = {"of": np.array(self.of, np.int16)}
        arrays["owners"] = np.cumsum([0, *map(len, self.items)])
        arrays["items"] = np.array([item for items in self.items for item in items], np.int32)
        arrays["lengths"] = np.array([len(words) for words in self.words], np.int32)
        arrays["hashes"] = np.array([whole for whole, _ in self.texts], np.uint64)
        found = np.ones(len(self.items), bool)  # texts of which some run can be found, by every rule
        for rule in self.runs:
            table = self.table(rule)
            arrays |= stored(rule, table)
            found &= np.bincount(table.texts, minlength=len(found)) > 0
            if rule == "8-gram":
                arrays |= self.sizes(table)
        arrays |= self.whole(np.flatnonzero(~found), arrays["lengths"])
        meta = {
            "format": FORMAT,
            "rules": list(self.runs),
            "options": dict(self.options),
            "benchmarks": list(self.counts),
            "counts": {name: dict(counts) for name, counts in self.counts.items()},
            "ids": self.ids,
        }
        return Index(meta, arrays)

    def table(self, rule: str) -> Table:
        """All runs but those of boilerplate."""
        runs = self.runs[rule]
        keys = np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in runs)])
        places = np.concatenate([np.zeros(0, np.int64), *(places for _, places in runs)]).astype(np.int32)
        texts = np.repeat(np.arange(len(runs), dtype=np.int32), [len(hashes) for hashes, _ in runs])
        kept = ~np.isin(keys, self.boilerplate(keys, texts))
        return Table.made(keys[kept], texts[kept], places[kept])

    def boilerplate(self, keys: UInts, texts: Int32s) -> UInts:
        """The keys of too many texts, of those that are the same way to write an item."""
        found = np.empty(len(keys), [("key", np.uint64), ("way", np.int32), ("text", np.int32)])
        found["key"], found["way"], found["text"] = keys, np.array(self.ways, np.int32)[texts], texts
        found = np.unique(found)
        _, first, counts = np.unique(found[["key", "way"]], return_index=True, return_counts=True)
        return found["key"][first[counts > self.options["max_texts"]]]

    def sizes(self, table: Table) -> Arrays:
        """By text, what `measure` counts: runs, and words that lie in one."""
        order = np.lexsort((table.places, table.texts))
        texts, places, length = table.texts[order], table.places[order], RULES["8-gram"]
        new = np.minimum(np.diff(places, append=0), length)  # words that the next run does not cover
        new[np.append(texts[1:] != texts[:-1], True)[: len(new)]] = length
        count = lambda weights: np.bincount(texts, weights, len(self.items)).astype(np.int32)
        return {"8-gram.grams": count(None), "8-gram.words": count(new)}

    def whole(self, texts: Ints, lengths: Int32s) -> Arrays:
        """Texts that no run finds, by their first words, or as turns. The short ones of many items are boilerplate."""
        rare = [t for t in texts.tolist() if lengths[t] >= SHORT or len(self.items[t]) <= self.options["max_texts"]]
        anchored = [text for text in rare if self.anywhere[text]]
        turns = [text for text in rare if not self.anywhere[text]]
        first = [Runs(self.words[text][:ANYWHERE]).of(ANYWHERE)[0] for text in anchored]
        hashes = list(self.texts)
        arrays = stored("anchored", whole_table(first, anchored))
        return arrays | stored("turns", whole_table([hashes[text][0] for text in turns], turns))


def weight(words: Words) -> float:
    """How many words these are, in a script with spaces."""
    return len(words) - float(words.alone.sum()) * (1 - OF_A_WORD)


def whole_table(keys: Sequence[Any], texts: Sequence[int]) -> Table:
    return Table.made(np.array(keys, np.uint64), np.array(texts, np.int32), np.zeros(len(texts), np.int32))


def stored(prefix: str, table: Table) -> Arrays:
    return {f"{prefix}.{name}": getattr(table, name) for name in Table.NAMES}


def prepared_index(
    benchmarks: Mapping[str, Any], folder: Path | str, work: Path, options: Mapping[str, Any] | None = None
) -> tuple[Path, str]:
    """The path and sha256 of the index in the folder `work`, made if it is not there: its name says what of."""
    hashed = hashlib.sha256(json.dumps([benchmarks, {**OPTIONS, **(options or {})}], sort_keys=True).encode())
    for name, spec in benchmarks.items():
        for path in benchmark_files(name, spec, Path(folder)):
            hashed.update(sha256_of(path).encode())
    hashed.update(code_of(__name__).encode())
    path = work / f"contamination-{hashed.hexdigest()[:16]}.npz"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        build_index(benchmarks, folder, options).save(scratch)
        scratch.rename(path)
    return path, sha256_of(path)
