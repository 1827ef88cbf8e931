"""The one record that every source becomes and everything downstream reads, and the error for what does not fit.

A turn's weight multiplies the loss of its tokens: 0 for what is read but not learned (questions, system prompts, tool
results), 1 for what is learned. Three roles stand for something else than a person's words:

* `text`: a plain document, a conversation of this one turn. A document of which parts carry loss is several turns of
  `text`, each tokenised on its own, among which `special` ("<|eos|>" or "<|bos|>") puts a token by its name.
* `ids`: token ids, of an example that another program tokenised; a conversation of such turns alone, see `token_ids`.
* `call`: the assistant calls tools; the text is JSON, see `tool_calls`. What they answer is a turn of the `tool`. The
  tools there are, as JSON, are the conversation's `tools`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import InputError

ROLES = ("system", "user", "assistant", "call", "tool", "text", "special", "ids")
ANSWERS = ("assistant", "call")  # what the assistant says and does, which is what can be learned of a chat
SPECIAL = ("<|bos|>", "<|eos|>")
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


class Turn(NamedTuple):
    """One utterance. `helpful=False` marks an answer that people liked less (Koala's "An Unhelpful Answer:")."""

    role: str
    text: str
    weight: float
    helpful: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, with the name of their source and an id that is unique within it. `tools`: those that may be
    called, as `tool_calls.tools_text` writes them, or nothing."""

    source: str
    id: str
    turns: tuple[Turn, ...]
    tools: str = ""
    _line: str = dataclasses.field(default="", init=False, repr=False, compare=False)  # `to_json`, where it is known

    def to_json(self) -> str:
        """One line of JSON; keys in a fixed order, so equal conversations are equal bytes."""
        return self._line or _ENCODE(self.to_dict())

    @classmethod
    def from_json(cls, line: str | bytes) -> "Conversation":
        return cls.from_dict(json.loads(line))

    @classmethod
    def from_line(cls, line: str) -> "Conversation":
        """From what `to_json` wrote, which is kept: whoever writes the conversation again need not make it anew."""
        conversation = cls.from_json(line)
        object.__setattr__(conversation, "_line", line)
        return conversation

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; without the key "tools" where there are none."""
        record: dict[str, Any] = {
            "source": self.source,
            "id": self.id,
            "turns": self.turns,  # lists, in JSON; `Turn(*…)` is the way back
        }
        return record | {"tools": self.tools} if self.tools else record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Conversation":
        turns = tuple(Turn(*turn) for turn in record["turns"])
        return cls(record["source"], record["id"], turns, record.get("tools", ""))


class Where(NamedTuple):
    """A place in the input: file, row (from 1) and, inside a conversation, turn (from 1)."""

    path: Path | str
    row: int | None = None
    turn: int | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        return f"{self.path}{row}" + ("" if self.turn is None else f", turn {self.turn}")


class DataError(InputError):
    """Input that does not fit: where it stands, what was found, what was expected."""

    def __init__(self, where: Where, found: str, expected: str, reason: str):
        super().__init__(f"{where}: found {found}; expected {expected}")
        self.where, self.found, self.expected = where, found, expected
        self.reason = reason  # a short name such as "wrong_keys", which counts are kept by

    def __reduce__(self) -> tuple[Any, ...]:
        """An exception is sent to another process as its arguments; by default that would be the message alone."""
        return type(self), (self.where, self.found, self.expected, self.reason)

    def to_dict(self) -> Mapping[str, str | int | None]:
        return {
            "file": str(self.where.path),
            "row": self.where.row,
            "turn": self.where.turn,
            "reason": self.reason,
            "found": self.found,
            "expected": self.expected,
        }
