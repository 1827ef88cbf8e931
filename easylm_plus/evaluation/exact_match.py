"""Exact match: the share of questions whose greedy answer is, letter for letter, the right one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_pipelines.conversation import Conversation
from easylm_plus.inference.chat import Chatter


class Answer(NamedTuple):
    """One question with what was said and what was right."""

    question: str
    given: str
    expected: str

    @property
    def correct(self) -> bool:
        return self.given == self.expected


def answers(chatter: Chatter, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to conversations that end with the right one."""
    asked = [dataclasses.replace(c, turns=c.turns[:-1]) for c in conversations]
    given = chatter.reply(asked, max_new_tokens)
    return [Answer(c.turns[-2].text, g, c.turns[-1].text.strip()) for c, g in zip(conversations, given)]


def exact_match(results: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    """task -> share of correct answers."""
    return {task: sum(a.correct for a in rows) / len(rows) for task, rows in results.items() if rows}
