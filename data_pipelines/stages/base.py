"""What a stage that looks at one sample at a time is made of.

A stage is made once in each process from its options, and must be a function of these and the sample alone: no
randomness, no state from sample to sample, nothing that depends on the machine. That is what makes its output
cacheable, and the same on one core, on many and on Apache Beam. What a stage reads besides (a model file, an index)
is an option, by path and hash.
"""

import abc
import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import known_key
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.token_ids import ROLE

HALF = "other_half_of_pair"
NOT_TEXT = ("call", "special", ROLE)  # roles


class Dropped(Exception):
    """Raised by a stage for a conversation that leaves here."""

    def __init__(self, reason: str, found: str, turn: int | None = None):
        super().__init__(reason)
        self.reason, self.found, self.turn = reason, found, turn


class Stage(abc.ABC):
    """One step. OPTIONS: name -> default of what a configuration may say."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Mapping[str, Any]):
        """Raises InputError for options that do not fit; check values in an overriding method."""
        known_key(options, self.OPTIONS, "")
        self.options = {**self.OPTIONS, **options}

    @abc.abstractmethod
    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        """The conversation as it goes on, changed or not; raises Dropped if it does not go on. Changes are counted
        with `ledger.change`."""

    def sample(self, sample: Sample, ledger: Ledger) -> Sample | None:
        """The sample as it goes on, with the conversations that are left; of a pair both or none."""
        kept: list[Conversation] = []
        ledger.entered += len(sample.conversations)
        for conversation in sample.conversations:
            try:
                kept.append(self.conversation(conversation, ledger))
            except Dropped as dropped:
                ledger.drop(conversation, dropped.reason, dropped.found, turn=dropped.turn)
            except Exception as error:
                error.add_note(f"in {type(self).__name__}, at {conversation.source}/{conversation.id}")
                raise
        if sample.pair and len(kept) == 1:
            ledger.drop(kept.pop(), HALF, "the other answer of the comparison was dropped")
        ledger.left += len(kept)
        return dataclasses.replace(sample, conversations=tuple(kept)) if kept else None

    def __call__(self, samples: Iterable[Sample], ledger: Ledger) -> Iterator[Sample]:
        for sample in samples:
            if (kept := self.sample(sample, ledger)) is not None:
                yield kept


def map_texts(conversation: Conversation, change: Callable[[Turn], str]) -> Conversation:
    """The conversation with the texts that `change` gives for its turns; the same object if none differs. What is not
    text, calls of tools, special tokens and token ids, stays as it is."""
    turns = tuple(
        t if t.role in NOT_TEXT or (text := change(t)) == t.text else t._replace(text=text) for t in conversation.turns
    )
    return conversation if turns == conversation.turns else dataclasses.replace(conversation, turns=turns)


def normal(text: str) -> str:
    """The text as it is compared: Unicode's NFKC, cases folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
