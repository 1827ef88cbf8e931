"""What was left out, from rejects.jsonl: a few samples for each reason, and how often each kept sample was repeated.

The file may be huge, so it is read line by line, once. The samples of a reason are those whose lines have the smallest
hashes: they come from all over the file, and are the same every time.
"""

import dataclasses
import hashlib
import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.reporting.accounts import Account
from data_pipelines.reporting.repeats import Repeats
from data_pipelines.workers import advance

SAMPLES = 3
LONGEST = 1 << 20  # bytes of a line that are looked at
DEDUPE = "dedupe"

# How `dedupe` names what it kept: "of source/id, by way of … (estimated Jaccard 0.87)"
_KEEPER = re.compile(r"of (.+?)(?:, by way of .+)?(?: \(estimated Jaccard [\d.]+\))?", re.DOTALL)

Key = tuple[str, str, str]  # source, stage, reason


@dataclasses.dataclass
class Rejects:
    """samples, counts: by (source, stage, reason). unreadable: lines that are no drop of this data. copies: dropped
    duplicates by the sample that was kept of them."""

    samples: dict[Key, list[dict[str, Any]]]
    counts: Counter[Key]
    unreadable: int = 0
    copies: Repeats = dataclasses.field(default_factory=Repeats)
    missing: bool = False  # there is no such file

    def differing(self, accounts: Iterable[Account]) -> dict[Key, tuple[int, int]]:
        """Where the file has another number of lines than the manifest says: (lines, manifest)."""
        said = expected(accounts)
        return {key: (self.counts[key], count) for key, count in said.items() if self.counts[key] != count}


def expected(accounts: Iterable[Account]) -> dict[Key, int]:
    return {
        (account.name, step.name, reason): count
        for account in accounts
        for step in account.steps
        for reason, count in step.dropped.items()
    }


def read_rejects(path: Path, accounts: Sequence[Account]) -> Rejects:
    """Tells the progress bar the bytes it has read."""
    known = expected(accounts)
    kept: dict[Key, list[tuple[int, int, dict[str, Any]]]] = {key: [] for key in known}
    rejects = Rejects({}, Counter(), missing=not path.exists())
    numbers = itertools.count()
    for line in lines(path) if path.exists() else ():
        drop = parsed(line)
        key = (drop["source"], drop["stage"], drop["reason"]) if drop else None
        if drop is None or key not in known:
            rejects.unreadable += 1
            continue
        rejects.counts[key] += 1
        if key[1] == DEDUPE and (keeper := _KEEPER.fullmatch(str(drop.get("found")))):
            rejects.copies.add(keeper[1], rejects.counts[key])
        smallest = -int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
        push = heapq.heappush if len(kept[key]) < SAMPLES else heapq.heappushpop
        push(kept[key], (smallest, -next(numbers), drop))
    for key, heap in kept.items():
        rejects.samples[key] = [drop for _, _, drop in sorted(heap, key=lambda entry: -entry[1])]
    return rejects


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than LONGEST, its beginning."""
    with open(path, "rb") as file:
        while line := file.readline(LONGEST):
            advance(len(line))
            rest = line
            while len(rest) == LONGEST and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST)
                advance(len(rest))
            yield line


def parsed(line: bytes) -> dict[str, Any] | None:
    """A drop, or None for a line that is none."""
    try:
        drop = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = ("source", "stage", "reason")
    return drop if isinstance(drop, dict) and all(isinstance(drop.get(name), str) for name in names) else None
