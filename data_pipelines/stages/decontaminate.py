"""Leaves out conversations that hold items of benchmarks, or reports them.

What counts as held is said in `contamination.overlap`; the index is a file by `contamination.index.prepared_index`. A
conversation is dropped whole, as "contaminated/<benchmark>" of what comes first in it. (GPT-3 cut the run and 200
characters around it out of its documents, since one quotation should not cost a book; half a conversation is no
example, and long documents can be looked at with `report_only`.) Of a comparison both answers go. Token ids cannot be
compared with texts: examples of these stay, whatever they hold.

    index, sha256   the file, and what it must be
    rules           those of the index by default
    share, measure  of "8-gram": 0.7 of "grams", or of "words"
    turns           "all", or "user": open-instruct compares prompts alone
    report_only     counts and keeps
    ignore          items that are known to be harmless, as "benchmark:item"

For the report, "contamination" counts conversations by benchmark, and "contamination_items/<benchmark>" by item: at
most as many entries as the benchmark has items. What `report_only` keeps counts as changed, "contaminated".
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from data_pipelines.contamination.ngrams import BOUNDARY, Words
from data_pipelines.contamination.overlap import Held, loaded
from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.stages.base import Dropped, Stage
from data_pipelines.stages.chunk import Ledger
from data_pipelines.token_ids import ROLE


class Decontaminate(Stage):
    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "index": "",
        "sha256": "",
        "rules": (),
        "share": 0.7,
        "measure": "grams",
        "turns": "all",
        "report_only": False,
        "ignore": (),
    }

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        for key, allowed in (("measure", ("grams", "words")), ("turns", ("all", "user"))):
            if self.options[key] not in allowed:
                raise InputError(f"{key}: found {self.options[key]!r}; expected {' or '.join(allowed)}")
        share = self.options["share"]
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise InputError(f"share: found {share!r}; expected a share above 0, 1 at most")
        self.index = loaded(str(self.options["index"]), self.options["sha256"])
        self.rules = tuple(self.options["rules"] or self.index.tables)
        if wrong := [rule for rule in self.rules if rule not in self.index.tables]:
            raise InputError(f"rules: found {wrong[0]!r}; expected one of the index's {', '.join(self.index.tables)}")
        self.ignored = frozenset(self.options["ignore"])

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        everything = self.options["turns"] == "all"
        read = [turn.role == "user" or (everything and turn.role != ROLE) for turn in conversation.turns]
        texts = [turn.text.replace(BOUNDARY, " ") for turn, wanted in zip(conversation.turns, read) if wanted]
        words = Words(BOUNDARY.join(texts))
        first: tuple[str, str, Held] | None = None
        items: set[tuple[str, str]] = set()
        for held in self.index.held(words, self.rules, self.options["share"], self.options["measure"]):
            for benchmark, item in self.index.owned(held.text):
                if f"{benchmark}:{item}" not in self.ignored:
                    first = first or (benchmark, item, held)
                    items.add((benchmark, item))
        if first is None:
            return conversation
        for benchmark in sorted({benchmark for benchmark, _ in items}):
            ledger.see("contamination", benchmark)
        for benchmark, item in sorted(items):
            ledger.see(f"contamination_items/{benchmark}", item)
        if self.options["report_only"]:
            ledger.change("contaminated")
            return conversation
        benchmark, item, held = first
        before = int(np.count_nonzero(words.codes[words.starts[: held.first]] == ord(BOUNDARY)))
        turn = [number for number, wanted in enumerate(read, start=1) if wanted][before]
        raise Dropped(f"contaminated/{benchmark}", f"{item}: {words.quote(held.first, held.last)!r}", turn)
