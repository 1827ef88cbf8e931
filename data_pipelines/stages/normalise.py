"""Normalise: one way of writing a text, without what does not belong to it.

    stages.normalise = {}                                          what is safe for prose of any source
    sources.sharegpt.stages.normalise = {"page_leftovers": True}   a chat page that people copied
    sources.hc3.stages.normalise = {"detokenise": True, "escaped_newlines": True}
    sources.code.stages.normalise = {"code": True}

Options, and what `changed` counts (conversations in which it was):

    code              False    the text is code: nothing but what "always" says below
    repair            True     mojibake and ligatures                                      mojibake, ligatures
    html              "page"   turns that are the HTML of a chat page become Markdown; "fragment": also answers that
                               are bare HTML, for dumps known to be; False: none           html
    page_leftovers    False    "Copy code", "2 / 3", "Copy12 chars / 3 words" in text      copy_code, page_counter
    entities          False    "&amp;" and the like in text                                entities
    escaped_newlines  False    a backslash and an n for a line break                       escaped_newlines
    detokenise        False    "hello , world ."                                           detokenised
    chinese           False    "simplified" or "traditional": converts the other script by the words of OpenCC
                               (github.com/BYVoid/OpenCC), which has to be installed       chinese
    nfc               True     Unicode's normal form C                                     nfc
    trailing_spaces   True     at the ends of lines, and around the turn unless it is one of several parts of a
                               document                                                    trailing_spaces
    max_blank_lines   2        so many of a run of empty lines stay; -1: all               blank_lines

Always: line ends become "\\n"; what is invisible goes; spaces that do not break become plain ones (line_ends, control,
bidi, zero_width, no_break_space). U+FFFD, which stands where something was lost for good, stays and is counted (table
"characters"). Roles, weights and the order of turns are as before; calls of tools, special tokens and token ids are no
text and stay as they are. A turn of which nothing is left drops its conversation (empty_after_normalise), and so does a
page too large to convert (html_too_large); a comparison goes whose two answers have become the same (identical_pair).

Code in a text (`code_spans`) is touched by "always" alone, since all else can break it: the space at the end of a line
of a diff, an "é" in a string, an entity in HTML. See `chat_page`, `characters` and `detokenise` for what is done and
which published rules it follows.

Normalising twice gives what normalising once gives. To that end a text is worked on until nothing changes any more,
which takes two rounds as a rule; one that still changes after ROUNDS (made to, or by accident) drops its conversation
(no_stable_form). Time is linear in the text.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.stages import characters, chat_page, code_spans, detokenise, html_markdown
from data_pipelines.stages.base import NOT_TEXT, Dropped, Stage
from data_pipelines.stages.chunk import Ledger, Sample

ROUNDS = 6

_ENTITY = re.compile(r"&(?:amp;){0,64}+((?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});)?")


class Normalise(Stage):
    """See the module."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {
        "code": False,
        "repair": True,
        "html": "page",
        "page_leftovers": False,
        "entities": False,
        "escaped_newlines": False,
        "detokenise": False,
        "chinese": False,
        "nfc": True,
        "trailing_spaces": True,
        "max_blank_lines": 2,
    }

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        for key, default in self.OPTIONS.items():
            value = self.options[key]
            if isinstance(default, bool) and key != "chinese" and not isinstance(value, bool):
                raise InputError(f"{key}: found {value!r}; expected True or False")
        if self.options["html"] not in ("page", "fragment", False):
            raise InputError(f'html: found {self.options["html"]!r}; expected "page", "fragment" or False')
        blank = self.options["max_blank_lines"]
        if not isinstance(blank, int) or isinstance(blank, bool) or blank < -1:
            raise InputError(f"max_blank_lines: found {blank!r}; expected a whole number, or -1 for no limit")
        self.blank_lines = re.compile(f"\n{{{blank + 2},}}") if blank >= 0 else None
        self.convert_chinese = _converter(self.options["chinese"])

    def sample(self, sample: Sample, ledger: Ledger) -> Sample | None:
        after = super().sample(sample, ledger)
        if after is None or not after.pair or _said(after.conversations[0]) != _said(after.conversations[1]):
            return after
        for conversation in after.conversations:
            ledger.drop(conversation, "identical_pair", "two answers that did not differ in what can be read")
        ledger.left -= 2
        return None

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        changed: set[str] = set()
        dump = any(turn.role == "assistant" and self.is_html(turn, True) for turn in conversation.turns)
        parts = [turn for turn in conversation.turns if turn.role == "text"]
        apart = self.options["trailing_spaces"] and len(parts) < 2
        turns = tuple(
            turn if turn.role in NOT_TEXT else self.turn(i, turn, dump, apart, changed)
            for i, turn in enumerate(conversation.turns, start=1)
        )
        for what in sorted(changed):
            ledger.change(what)
        if any("\ufffd" in turn.text for turn in turns):
            ledger.see("characters", "U+FFFD")
        return dataclasses.replace(conversation, turns=turns) if changed else conversation

    def is_html(self, turn: Turn, dump: bool) -> bool:
        """`dump`: an answer of the conversation is a page. A question is taken for one only then: a page that somebody
        pastes to ask about it stays as it is."""
        if not self.options["html"] or turn.text[:64].lstrip()[:1] != "<":
            return False
        if turn.role == "user":
            return dump and (chat_page.is_question(turn.text) or chat_page.is_answer(turn.text))
        fragment = self.options["html"] == "fragment" and turn.role == "assistant"
        return chat_page.is_answer(turn.text) or (fragment and chat_page.is_fragment(turn.text))

    def turn(self, number: int, turn: Turn, dump: bool, apart: bool, changed: set[str]) -> Turn:
        """The turn as it goes on, the same object if nothing was changed. Raises Dropped. `apart`: what stands around
        the text does not count, since no other text follows."""
        given = turn
        try:
            for _ in range(ROUNDS):
                text = self.round(turn, dump, changed)
                if apart and not self.options["code"]:
                    text = _noted("trailing_spaces", _stripped, text, changed)
                if text == turn.text:
                    break
                turn = turn._replace(text=text)
            else:
                raise Dropped("no_stable_form", f"a text that still changes after {ROUNDS} rounds", number)
        except html_markdown.PageTooLarge as error:
            raise Dropped("html_too_large", str(error), number) from error
        if not turn.text.strip():
            raise Dropped("empty_after_normalise", "nothing left of the turn", number)
        return given if turn.text == given.text else turn

    def round(self, turn: Turn, dump: bool, changed: set[str]) -> str:
        """The text after every step once."""
        text = turn.text
        if self.options["code"]:
            return characters.spaced(characters.visible(text, changed), changed)
        leftovers = self.options["page_leftovers"]
        if self.is_html(turn, dump):
            text, leftovers = chat_page.to_markdown(text), True
            changed.add("html")
        if leftovers:
            text = chat_page.without_leftovers(text, turn.role == "assistant", changed)
        text = characters.visible(text, changed)
        if self.options["escaped_newlines"]:
            text = _noted("escaped_newlines", detokenise.unescaped, text, changed)
        return "".join(
            self.prose(piece.text, changed) if piece.kind == "prose" else characters.spaced(piece.text, changed)
            for piece in code_spans.pieces(text)
        )

    def prose(self, text: str, changed: set[str]) -> str:
        """A stretch of text without code."""
        if self.options["entities"] and "&" in text:
            text = _noted("entities", _without_entities, text, changed)
        if self.options["repair"]:
            text = characters.mended(text, changed)
        text = characters.spaced(text, changed)
        if self.options["nfc"]:
            text = characters.composed(text, changed)
        if self.options["detokenise"]:
            text = _noted("detokenised", detokenise.detokenised, text, changed)
        if self.convert_chinese is not None:
            text = _noted("chinese", self.convert_chinese, text, changed)
        if self.options["trailing_spaces"] and (" \n" in text or "\t\n" in text):
            changed.add("trailing_spaces")
            *lines, last = text.split("\n")  # by lines, since an expression for this is quadratic in a run of spaces
            text = "\n".join([*(line.rstrip(" \t") for line in lines), last])
        if self.blank_lines is not None and self.blank_lines.search(text):
            changed.add("blank_lines")
            text = self.blank_lines.sub("\n" * (self.options["max_blank_lines"] + 1), text)
        return text


def _said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in conversation.turns]


def _noted(what: str, change: Callable[[str], str], text: str, changed: set[str]) -> str:
    after = change(text)
    if after != text:
        changed.add(what)
    return after


def _without_entities(text: str) -> str:
    """Entities of any depth ("&amp;amp;lt;") at once, so that depth costs no rounds."""
    return _ENTITY.sub(lambda entity: html_markdown.unescaped(f"&{entity[1] or ''}"), text)


def _stripped(text: str) -> str:
    """Without spaces at the end, empty lines at the start, and up to three spaces before the first word, since four
    are the indentation of code."""
    text = text.rstrip()
    start = len(text) - len(text.lstrip())
    indentation = text[:start].rpartition("\n")[2]
    return text[start if indentation in (" ", "  ", "   ") else start - len(indentation) :]


def _converter(to: str | bool) -> Callable[[str], str] | None:
    if to is False:
        return None
    if to not in ("simplified", "traditional"):
        raise InputError(f'chinese: found {to!r}; expected "simplified", "traditional" or False')
    try:
        import opencc
    except ImportError as error:
        raise InputError(f"chinese: found no OpenCC ({error}); expected it installed: pip install opencc") from error
    convert: Callable[[str], str] = opencc.OpenCC("t2s" if to == "simplified" else "s2t").convert
    return convert
