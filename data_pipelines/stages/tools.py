"""Leaves out conversations with calls of tools, for formats that have no place for them (Koala's, Yuan's).

    calls    what happens to a conversation in which a tool is called: "keep", or "drop" (tool_call)
    unused   and to a list of tools of which none is called: "keep", "drop" (unused_tools), or "forget", which keeps the
             conversation without its list

Forgetting has a price: an answer such as "I cannot do that, I can only look up the weather" is then learned without
what it came from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.stages.base import Dropped, Stage
from data_pipelines.stages.chunk import Ledger

CHOICES = {"calls": ("keep", "drop"), "unused": ("keep", "drop", "forget")}


class Tools(Stage):
    OPTIONS: ClassVar[Mapping[str, Any]] = {"calls": "drop", "unused": "drop"}

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        for key, choices in CHOICES.items():
            if self.options[key] not in choices:
                raise InputError(f"{key}: found {self.options[key]!r}; expected one of {', '.join(choices)}")

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        for number, turn in enumerate(conversation.turns, start=1):
            if turn.role in ("call", "tool"):
                if self.options["calls"] == "drop":
                    raise Dropped("tool_call", f"a turn with the role {turn.role!r}", number)
                return conversation
        if not conversation.tools or self.options["unused"] == "keep":
            return conversation
        if self.options["unused"] == "drop":
            raise Dropped("unused_tools", "a list of tools of which none is called")
        ledger.change("forgot_tools")
        return dataclasses.replace(conversation, tools="")
