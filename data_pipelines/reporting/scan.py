"""A pass over all examples of the train splits: what can be counted without a tokenizer.

Each source is shared out among the workers in parts that depend on its size alone, so that the counts are the same
with any number of workers; there are few of them, and each part's counts are small, so that memory is bounded.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.conversation import Conversation
from data_pipelines.datasets import SourceDataset, open_source
from data_pipelines.reporting.accounts import Account
from data_pipelines.reporting.repeats import Repeats
from data_pipelines.stages.split import prompt
from data_pipelines.token_ids import ROLE
from data_pipelines.workers import Workers, advance

RANGE = 8192  # examples of a part, at least
PARTS = 64  # of a source, at most
QUESTIONS = 8192  # that a part keeps; with PARTS, no fewer than the whole can use (`repeats.CAPACITY`)
TOLD = 256  # examples between two steps of the progress bar
TRAIN = "train"

_ROW = re.compile(r".+?:\d+(?=:|$)")


@dataclasses.dataclass
class Scan:
    """Of examples: `lengths` in characters and `turns` as value -> examples, `roles` as role -> turns,
    `role_characters` as role -> characters. `learned` characters are those of turns with a weight above 0. Token ids
    have the characters of their numbers, which are no `words`. `prompts` counts rows by their first question."""

    examples: int = 0
    characters: int = 0
    words: int = 0
    learned: int = 0
    learned_turns: int = 0
    unhelpful: int = 0
    lengths: Counter[int] = dataclasses.field(default_factory=Counter)
    turns: Counter[int] = dataclasses.field(default_factory=Counter)
    roles: Counter[str] = dataclasses.field(default_factory=Counter)
    role_characters: Counter[str] = dataclasses.field(default_factory=Counter)
    prompts: Repeats = dataclasses.field(default_factory=Repeats)

    def add(self, conversation: Conversation) -> None:
        length = 0
        for turn in conversation.turns:
            size = len(turn.text)
            length += size
            self.words += 0 if turn.role == ROLE else len(turn.text.split())
            self.roles[turn.role] += 1
            self.role_characters[turn.role] += size
            self.unhelpful += not turn.helpful
            if turn.weight > 0:
                self.learned += size
                self.learned_turns += 1
        self.examples += 1
        self.characters += length
        self.lengths[length] += 1
        self.turns[len(conversation.turns)] += 1

    def merge(self, other: "Scan") -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, int):
                setattr(self, field.name, mine + theirs)
            else:
                (mine.merge if isinstance(mine, Repeats) else mine.update)(theirs)


def scan_all(directory: Path, accounts: Sequence[Account], pool: Workers) -> dict[str, Scan]:
    """source -> counts over its train split."""
    scans = {}
    for account in accounts:
        tasks = [(str(directory), account.name, part) for part in parts(account.train, RANGE)]
        scans[account.name] = Scan()
        for scan in pool.run(f"read {account.name}", scan_part, tasks, total=account.train):
            scans[account.name].merge(scan)
    return scans


def parts(count: int, smallest: int) -> list[range]:
    """range(count) in at most PARTS parts."""
    step = max(smallest, -(-count // PARTS))
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def scan_part(directory: str, source: str, part: range) -> Scan:
    """The counts over a part of a train split."""
    dataset, scan = opened(directory, source), Scan(prompts=Repeats(QUESTIONS))
    row_before = row_of(dataset[part.start - 1].id) if part.start else ""
    for index in part:
        if (index - part.start) % TOLD == 0:
            advance(min(TOLD, part.stop - index))
        conversation = dataset[index]
        scan.add(conversation)
        if (row := row_of(conversation.id)) != row_before:  # the answers of one row share its question
            scan.prompts.add(prompt(conversation), index)
        row_before = row
    return scan


def top_prompts(directory: Path, account: Account, scan: Scan, number: int = 5) -> list[tuple[int, str]]:
    """(rows, text) of the questions that come most often."""
    dataset = opened(str(directory), account.name)
    return [(count, prompt(dataset[index])) for count, index in scan.prompts.top(number)]


def row_of(identity: str) -> str:
    """The row that a conversation was made of: "file:7:chosen" -> "file:7"."""
    match = _ROW.match(identity)
    return match[0] if match else identity


@functools.lru_cache(maxsize=64)
def opened(directory: str, source: str) -> SourceDataset:
    """The train split; opened once in each process."""
    return open_source(directory, source, TRAIN)


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that `share` of the counted things do not exceed; 0 if there are none."""
    total, below = sum(counts.values()), 0
    for value in sorted(counts):
        below += counts[value]
        if below >= share * total:
            return value
    return 0
