"""Filter: conversations and documents that are not worth learning from, or that teach the wrong thing, go.

    stages.filter = {"languages": ("en",), "origins": ORIGINS, "page_errors": True, "broken_lists": True}    a chat dump
    stages.filter = {"languages": ("zh",), "min_chars": 200, "repetition": True, "chinese": {}}              web text

Every rule is off until a configuration asks for it. They are applied in this order; the first that applies is the
reason, and is what `dropped` counts by. (Conversations with tools are for the stage `tools`.) They are about text, so
examples that are token ids go through as they are.

    page_errors      False   True: a chat ends before "Too many requests in 1 hour" and the like (counted as changed);
                             page_error where nothing is left of it
    min_turns, max_turns, min_chars, max_chars, min_turn_chars, max_turn_chars
                     None    turns of a conversation, characters of it and of each turn: too_few_turns,
                             too_many_turns, too_short, too_long, turn_too_short, turn_too_long
    origins          ()      names of where answers come from, in any turn and in any case: names_its_origin
    phrases          ()      the same for phrases of your own: phrase
    refusals         False   "drop" or "flag": answers that decline (see `refusals`): refusal
    identity         False   "drop" or "flag": the assistant calls itself an AI: ai_identity
    broken_lists     False   True: no second "1." before a "2.": broken_list
    repeated_digits  False   True: no digit nine times in a row: repeated_digits
    languages        ()      codes that stay (see `language`): language; "any": all stay, and are counted
    chinese          None    options of `chinese`, for turns of the role "text": not_chinese, mojibake, spelled_out,
                             boilerplate, short_lines, no_sentences, chinese_script
    repetition       False   True: Gopher's rules (see `repetition`), for turns of the role "text": repetition

"flag" counts the conversations that stay in the table "refusals". The language is decided on all turns together,
without code (`min_letters`, 30, and `language_chars`, 400: how many letters are needed, and characters read); where it
cannot be told the conversation stays and counts as "und". The table "language" has those that came so far as this
rule. Of a pair both halves go or none (see `base`), and "flag" may be better than "drop" there: the answer that people
liked less is often the one that declines.

Where the rules come from. Koala (koala_data_pipeline of young-geng) drops a conversation if any turn contains one of
ORIGINS, and languages other than English. Vicuna (fastchat/data of lm-sys/FastChat) drops on "openai" and "chatgpt",
under 16 characters, on \\n1\\. [^2]*\\n1\\. (lists whose numbers the page lost) and on (\\d)\\1{8}; of an error of the
page it drops the answer alone, where we end the chat, since the question before it would get the next one's answer.
C4 (arXiv 1910.10683), Gopher (2112.11446) and FineWeb (2406.17557) filter documents by length, language, boilerplate
and repetition. Lists of bad words are left out on purpose: they drop what minorities write about themselves (J. Dodge
et al., arXiv 2104.08758).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages import chinese, code_spans, refusals
from data_pipelines.stages.base import NOT_TEXT, Dropped, Stage, map_texts
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.language import language
from data_pipelines.stages.repetition import repetition
from data_pipelines.token_ids import ROLE

ORIGINS = ("openai", "open-ai", "open ai", "chatgpt", "chat-gpt", "chadgpt", "gpt-3", "gpt3")  # Koala's

PAGE_ERRORS = (
    "Too many requests in 1 hour. Try again later.",
    "An error occurred. If this issue persists please contact us",
    "An error occurred. Either the engine you requested does not exist",
    "Something went wrong. If this issue persists please contact us",
    "Hmm...something seems to have gone wrong.",
    "The server had an error while processing your request",
    "Only one message at a time. Please allow any other responses to complete",
)
ANSWERS = (("refusals", "refusal", refusals.refusal), ("identity", "ai_identity", refusals.identity))  # option, reason
_LIMITS = ("min_turns", "max_turns", "min_chars", "max_chars", "min_turn_chars", "max_turn_chars")
_DIGITS = re.compile(r"(\d)\1{8}")


class Filter(Stage):
    """See the module."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "page_errors": False,
        **dict.fromkeys(_LIMITS),
        "origins": (),
        "phrases": (),
        "refusals": False,
        "identity": False,
        "broken_lists": False,
        "repeated_digits": False,
        "languages": (),
        "min_letters": 30,
        "language_chars": 400,
        "chinese": None,
        "repetition": False,
    }

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        self.check_options()
        self.origins = tuple(phrase.lower() for phrase in self.options["origins"])
        self.phrases = tuple(phrase.lower() for phrase in self.options["phrases"])
        self.chinese = None if self.options["chinese"] is None else chinese.checked(self.options["chinese"])
        given = self.options
        rules: tuple[tuple[Any, Callable[[Conversation, Ledger], None]], ...] = (
            (any(given[key] is not None for key in _LIMITS), self.lengths),
            (self.origins or self.phrases, self.named),
            ("drop" in (given["refusals"], given["identity"]), self.declines),
            (given["broken_lists"] or given["repeated_digits"], self.broken),
            (given["languages"], self.spoken),
            (self.chinese, self.web),
            (given["repetition"], self.repeats),
        )
        self.rules = [rule for wanted, rule in rules if wanted]

    def check_options(self) -> None:
        for key in ("page_errors", "broken_lists", "repeated_digits", "repetition"):
            if not isinstance(self.options[key], bool):
                raise InputError(f"{key}: found {self.options[key]!r}; expected True or False")
        for key in (*_LIMITS, "min_letters", "language_chars"):
            value, absent = self.options[key], key in _LIMITS and self.options[key] is None
            if not absent and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise InputError(f"{key}: found {value!r}; expected a whole number" + " or None" * (key in _LIMITS))
        for key in ("origins", "phrases", "languages"):
            value = self.options[key]
            if not isinstance(value, list | tuple) or not all(isinstance(each, str) and each for each in value):
                raise InputError(f"{key}: found {value!r}; expected a list of texts")
        for key in ("refusals", "identity"):
            if self.options[key] not in ("drop", "flag", False):
                raise InputError(f'{key}: found {self.options[key]!r}; expected "drop", "flag" or False')

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        if conversation.turns[0].role == ROLE:
            return conversation
        kept = _before_error(conversation) if self.options["page_errors"] else conversation
        for rule in self.rules:
            rule(kept, ledger)
        if self.chinese is not None and self.chinese["drop_lines"]:
            kept = self.without_boilerplate(kept, ledger)
        if len(kept.turns) < len(conversation.turns):
            ledger.change("page_error")
        for option, reason, found in ANSWERS:
            if self.options[option] == "flag" and any(found(t.text) for t in kept.turns if t.role == "assistant"):
                ledger.see("refusals", reason)
        return kept

    def lengths(self, conversation: Conversation, ledger: Ledger) -> None:
        sizes = {number: len(turn.text) for number, turn in _texts(conversation)}
        self.within(len(sizes), "turns", "turns", "too_few_turns", "too_many_turns", None)
        self.within(sum(sizes.values()), "chars", "characters", "too_short", "too_long", None)
        for number, size in sizes.items():
            self.within(size, "turn_chars", "characters", "turn_too_short", "turn_too_long", number)

    def within(self, found: int, key: str, unit: str, few: str, many: str, turn: int | None) -> None:
        least, most = self.options[f"min_{key}"], self.options[f"max_{key}"]
        if least is not None and found < least:
            raise Dropped(few, f"{found:,} {unit}; expected {least:,} or more", turn)
        if most is not None and found > most:
            raise Dropped(many, f"{found:,} {unit}; expected {most:,} or fewer", turn)

    def named(self, conversation: Conversation, ledger: Ledger) -> None:
        for number, turn in enumerate(conversation.turns, start=1):
            text = turn.text.lower()
            for reason, phrases in (("names_its_origin", self.origins), ("phrase", self.phrases)):
                for phrase in phrases:
                    if phrase in text:
                        raise Dropped(reason, f"the phrase {phrase!r}", number)

    def declines(self, conversation: Conversation, ledger: Ledger) -> None:
        for number, turn in enumerate(conversation.turns, start=1):
            for option, reason, rule in ANSWERS if turn.role == "assistant" else ():
                if self.options[option] == "drop" and (found := rule(turn.text)) is not None:
                    raise Dropped(reason, repr(found), number)

    def broken(self, conversation: Conversation, ledger: Ledger) -> None:
        for number, turn in _texts(conversation):
            text = code_spans.prose(turn.text)
            if self.options["broken_lists"] and _broken_list(text):
                raise Dropped("broken_list", 'a second "1." before a "2."', number)
            if self.options["repeated_digits"] and (digits := _DIGITS.search(text)):
                raise Dropped("repeated_digits", f"{digits[0]}; expected no digit nine times in a row", number)

    def spoken(self, conversation: Conversation, ledger: Ledger) -> None:
        texts = (turn.text for _, turn in _texts(conversation))
        code = language(texts, self.options["min_letters"], self.options["language_chars"])
        ledger.see("language", code)
        if code != "und" and not {code, "any"} & {*self.options["languages"]}:
            raise Dropped("language", f"{code}; expected {', '.join(self.options['languages'])}")

    def web(self, conversation: Conversation, ledger: Ledger) -> None:
        for number, turn in _documents(conversation):
            if self.chinese is not None and (flaw := chinese.flaw(turn.text, self.chinese)) is not None:
                raise Dropped(*flaw, number)

    def repeats(self, conversation: Conversation, ledger: Ledger) -> None:
        for number, turn in _documents(conversation):
            if (found := repetition(turn.text)) is not None:
                raise Dropped("repetition", found, number)

    def without_boilerplate(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        """Raises Dropped for what is too short without it."""
        kept = map_texts(conversation, lambda turn: chinese.cleaned(turn.text) if turn.role == "text" else turn.text)
        if kept is not conversation:
            self.lengths(kept, ledger)
            for number, turn in enumerate(kept.turns, start=1):
                if not turn.text.strip():
                    raise Dropped("boilerplate", "nothing but boilerplate", number)
            ledger.change("boilerplate_lines")
        return kept


def _texts(conversation: Conversation) -> list[tuple[int, Turn]]:
    """Turns that are text, numbered from 1: not calls of tools, nor special tokens."""
    return [(number, turn) for number, turn in enumerate(conversation.turns, start=1) if turn.role not in NOT_TEXT]


def _documents(conversation: Conversation) -> list[tuple[int, Turn]]:
    """Turns of the role "text", numbered from 1."""
    return [(number, turn) for number, turn in enumerate(conversation.turns, start=1) if turn.role == "text"]


def _before_error(conversation: Conversation) -> Conversation:
    """The exchanges before the first answer that is an error of the page. Raises Dropped where there are none."""
    turns = conversation.turns
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and turn.text[:80].lstrip().startswith(PAGE_ERRORS):
            kept = turns[: number - 1]
            while kept and kept[-1].role != "assistant":
                kept = kept[:-1]
            if not kept:
                raise Dropped("page_error", repr(turn.text[:60]), number)
            return dataclasses.replace(conversation, turns=kept)
    return conversation


def _broken_list(text: str) -> bool:
    """Whether a line "1. " follows another one without a 2 between them, in linear time."""
    _, *others = text.split("\n1. ")
    return any("2" not in between for between in others[:-1])
