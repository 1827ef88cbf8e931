"""What flows through the stages of preparation: samples, in chunks, each with the accounts of the stage that made it.

A sample is what one row of a source gave: one conversation, or several that belong together, such as the better and
the worse answer of a comparison. Samples keep their order; a chunk is a run of them from one file, small enough to be
held in memory and large enough to be worth a process of its own.
"""

import dataclasses
import json
from collections import Counter
from typing import Any

from data_pipelines.conversation import Conversation

_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
EXCERPT = 240  # characters of a conversation that the list of drops quotes


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The conversations of one row. `id` is unique within the source; `split` is None until it is known."""

    id: str
    conversations: tuple[Conversation, ...]
    split: str | None = None

    @property
    def pair(self) -> bool:
        """Whether these are the two halves of a comparison, of which one alone says nothing."""
        ids = [conversation.id for conversation in self.conversations]
        return len(ids) == 2 and ids[0].endswith(":chosen") and ids[1].endswith(":rejected")

    def to_line(self) -> str:
        """Id, split and characters, then each conversation, all as JSON, which has no tabs, with tabs between."""
        characters = sum([len(turn.text) for conversation in self.conversations for turn in conversation.turns])
        head = _ENCODE([self.id, self.split, characters])
        return "\t".join([head, *[conversation.to_json() for conversation in self.conversations]])

    @classmethod
    def from_line(cls, line: str) -> "Sample":
        head, *conversations = line.split("\t")
        sample_id, split, _ = json.loads(head)
        return cls(sample_id, tuple(map(Conversation.from_line, conversations)), split)


@dataclasses.dataclass
class Ledger:
    """What a stage did to a chunk: conversations in = conversations out + the sum of `dropped`.

    dropped: reason -> conversations. changed: what was changed -> conversations in which it was. seen: a table's name
    -> value -> conversations (such as "language" -> "en"), for the report. drops: a line each, in order.
    """

    entered: int = 0
    left: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    seen: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    drops: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def drop(self, conversation: Conversation, reason: str, found: str, *, turn: int | None = None) -> None:
        """Counts a conversation that leaves here. `found`: what was found, for a person; `turn` counts from 1."""
        self.dropped[reason] += 1
        text = next((t.text for t in conversation.turns[(turn or 1) - 1 :]), "")
        place = {"id": conversation.id, "turn": turn}
        self.drops.append({**place, "reason": reason, "found": found, "excerpt": text[:EXCERPT]})

    def change(self, what: str) -> None:
        self.changed[what] += 1

    def see(self, table: str, value: str) -> None:
        self.seen.setdefault(table, Counter())[value] += 1

    def add(self, other: "Ledger") -> None:
        """Adds the counts of another ledger; its drops stay where they are."""
        self.entered += other.entered
        self.left += other.left
        self.dropped.update(other.dropped)
        self.changed.update(other.changed)
        for table, counts in other.seen.items():
            self.seen.setdefault(table, Counter()).update(counts)
