"""Takes addresses, numbers and keys of particular people out of every turn that is text (token ids, whose digits may
look like a number of somebody's, are none); see `redaction` for what and by what.

    kinds         what is taken out. "cn_id" and "cn_mobile" (China's identity numbers, and its mobile numbers that are
                  not called so) are further ones: the second takes any 11 digits that begin like one
    placeholders  kind -> text, for those that are to differ

Counted as changed, by kind: "redacted_email" and so on. Nothing is dropped.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages.base import Stage, map_texts
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.redaction import PLACEHOLDERS, RULES, redacted


class Redact(Stage):
    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "kinds": ("secret", "email", "ipv4", "ipv6", "card", "phone"),
        "placeholders": {},
    }

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        for key in ("kinds", "placeholders"):
            if wrong := [kind for kind in self.options[key] if kind not in RULES]:
                raise InputError(f"{key}: found {wrong[0]!r}; expected one of {', '.join(RULES)}")
        self.kinds = tuple(kind for kind in RULES if kind in self.options["kinds"])
        self.by = {**PLACEHOLDERS, **self.options["placeholders"]}
        for kind, text in self.by.items():
            if redacted(text, RULES)[0] != text:
                raise InputError(f"placeholders.{kind}: found {text!r}; expected a text that is not taken out itself")

    def text(self, text: str) -> str:
        return redacted(text, self.kinds, self.by)[0]

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        kinds: set[str] = set()

        def change(turn: Turn) -> str:
            text, counts = redacted(turn.text, self.kinds, self.by)
            kinds.update(counts)
            return text

        changed = map_texts(conversation, change)
        for kind in sorted(kinds):
            ledger.change(f"redacted_{kind}")
        return changed
