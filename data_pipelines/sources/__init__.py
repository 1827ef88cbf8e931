"""Sources: one module per data set, each turning rows of its files into conversations.

A module that reads files has a docstring (format, origin, licence, what Koala did), `FORMAT` (the expected shape in
one line), `ORIGIN` (where a person gets the files), `LICENCE`, `PATTERNS` (globs under the input folder; "!glob"
leaves out) and

    convert(row: Row, where: Where) -> list[Conversation]    # DataError where the row does not fit

It may have `SEPARATOR`, what ends a document of a .txt file unless the configuration says otherwise, and `REPAIRS`:
reason -> function(row) -> row, tried when `convert` raises a DataError with that reason; every repair is counted. A
module that makes its text up has `generate(**options)` instead, which yields conversations or pairs (split,
conversation). The kind of a source is the name of its module here, or a dotted path to one elsewhere.

The rest of this file is what the modules share.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from types import ModuleType
from typing import Any

from data_pipelines.conversation import ANSWERS, Conversation, DataError, Turn, Where
from data_pipelines.errors import InputError, nearest, shown
from data_pipelines.files import array_records
from data_pipelines.token_ids import FORM, ROLE, read_ids

Row = Mapping[str, Any]

READ = ("system", "user", "tool")  # roles of which nothing can be learned
HEAVIEST = float.fromhex("0x1.fffffep+127")  # of a weight: what float32 holds


class Filtered(DataError):
    """A row left out on purpose (a tie, a phrase): counted as a reject, but no reason to stop."""


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(kind: str) -> ModuleType:
    """The module of a kind. Raises InputError for one that does not exist or has neither of the two functions."""
    known = names()
    if kind not in known and "." not in kind:
        expected = f"one of {', '.join(known)} or a dotted module path"
        raise InputError(f"kind: found {kind!r}; expected {expected}{nearest(kind, known)}")
    path = f"{__name__}.{kind}" if kind in known else kind
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise InputError(f"kind: found {kind!r}, which cannot be imported ({error}); expected a module") from error
    if not hasattr(module, "convert") and not hasattr(module, "generate"):
        raise InputError(f"kind: found {kind!r} without convert or generate; expected a module with one of them")
    return module


@functools.lru_cache(maxsize=1024)  # asked for every row of a file
def stem(path: PurePath | str) -> str:
    """`hc3/all.jsonl.gz` -> `hc3/all`, `c4.array_record-00000-of-00008` -> `c4-00000-of-00008`: what the ids of a
    file's conversations start with."""
    pure = PurePath(path)
    if array_records.NAME.search(pure.name):
        return pure.with_name(array_records.NAME.sub("", pure.name)).as_posix()
    if pure.suffix.lower() == ".gz":
        pure = pure.with_suffix("")
    return pure.with_suffix("").as_posix()


def row_id(where: Where) -> str:
    return f"{stem(where.path)}:{where.row}"


def at(where: Where, turn: int) -> Where:
    return Where(where.path, where.row, turn)


def need(row: Row, keys: Sequence[str], where: Where, expected: str) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        names = " and ".join(json.dumps(key) for key in missing)
        raise DataError(where, f"{shown(row)}, without {names}", expected, "wrong_keys")


def string(value: object, name: str, where: Where, *, empty: str | None = "empty_text") -> str:
    """`value` if it is text. An empty one is an error with the reason `empty`, unless that is None."""
    if not isinstance(value, str):
        raise DataError(where, f"{name} is {shown(value)}", f"{name} as text", "wrong_type")
    if empty and not value.strip():
        raise DataError(where, f"{name} is empty", f"{name} with text in it", empty)
    return value


def number(value: object, name: str, where: Where) -> float:
    """`value` as a float, if it is a finite number; a boolean is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that no float can hold
            if math.isfinite(value):
                return float(value)
    raise DataError(where, f"{name} is {shown(value)}", f"{name} as a finite number", "wrong_type")


def items(value: object, name: str, where: Where) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(where, f"{name} is {shown(value)}", f"{name} as a list", "wrong_type")
    return value


def exchange(question: str, answer: str, helpful: bool = True) -> tuple[Turn, Turn]:
    return Turn("user", question, 0.0), Turn("assistant", answer, 1.0, helpful)


def comparison(
    source: str, where: Where, better: Sequence[Turn], worse: Sequence[Turn], tools: str = ""
) -> list[Conversation]:
    """Two chats that differ in their last answer as a helpful and an unhelpful conversation; the same answer twice does
    not fit.

    Only the last answers were compared. So the last answer alone of the worse one is unhelpful, and the answers before
    it, which both have, get the weight 0 there: they are learned from the other.
    """
    if better[-1].text == worse[-1].text:
        found = "the same text as the better and the worse answer"
        raise DataError(where, found, "two different answers", "identical_pair")
    return [
        Conversation(source, f"{row_id(where)}:chosen", tuple(better), tools),
        unhelpful(Conversation(source, f"{row_id(where)}:rejected", tuple(worse), tools)),
    ]


def unhelpful(conversation: Conversation) -> Conversation:
    """The conversation with its last answer as an unhelpful one, of which nothing else is learned."""
    *before, last = conversation.turns
    read = [turn._replace(weight=0.0) for turn in before]
    return dataclasses.replace(conversation, turns=(*read, last._replace(helpful=False)))


def alternate(roles: Sequence[str], where: Where, expected: str, numbers: Sequence[int] | None = None) -> None:
    """Checks the order of turns: [system] user [tools] assistant [tools] [assistant] user … assistant, where tools are
    a call and what comes back, any number of times. The last may be a call. `numbers`: of the turns in the file.

    What stands in the middle is checked before the ends, so that a repair of an end (dropping a turn) can only be
    followed by an error about the other end, and turn numbers always count the turns of the file.
    """
    follows = {
        "system": {"user", "assistant", "call"},  # system, assistant: an end to repair
        "user": {"assistant", "call"},
        "call": {"tool"},
        "tool": {"assistant", "call", "tool"},
        "assistant": {"user", "call", "tool"},
    }
    place = lambda index: at(where, numbers[index] if numbers else index + 1)
    for index, (before, after) in enumerate(itertools.pairwise(roles), start=1):
        if after not in follows[before]:
            found = f"a turn of the {after} after a turn of the {before}"
            raise DataError(place(index), found, expected, "not_alternating")
    spoken = [role for role in roles if role != "system"]
    if "user" not in spoken or not {*ANSWERS} & {*spoken}:
        found = f"only turns of {' and '.join(sorted(set(roles)))}" if roles else "no turns"
        raise DataError(where, found, expected, "no_exchange")
    if spoken[0] != "user":
        first = len(roles) - len(spoken)
        raise DataError(place(first), f"a first turn of the {spoken[0]}", expected, f"starts_with_{spoken[0]}")
    if spoken[-1] not in ANSWERS:
        found = f"a last turn of the {spoken[-1]}"
        raise DataError(place(-1 + len(roles)), found, expected, f"ends_with_{spoken[-1]}")


def check(conversation: Conversation, where: Where, max_turn_chars: int) -> None:
    """What must hold for a conversation of any source, beyond its types. Raises DataError naming the turn.

    `max_turn_chars` counts a token id as one character, however many digits it has."""
    for turn_number, (role, text, weight, _) in enumerate(conversation.turns, start=1):
        if not text or text.isspace():
            raise DataError(at(where, turn_number), "an empty turn", "a turn with text in it", "empty_text")
        size = count_ids(text, at(where, turn_number)) if role == ROLE else len(text)
        if size > max_turn_chars:
            found = f"a turn of {size:,} {'token ids' if role == ROLE else 'characters'}"
            expected = f"max_turn_chars={max_turn_chars:,} or fewer"
            raise DataError(at(where, turn_number), found, expected, "turn_too_long")
        writable(text, where, turn_number)
        if not 0 <= weight <= HEAVIEST:
            expected = "0 or more, as far as float32 goes"
            raise DataError(at(where, turn_number), f"the weight {weight}", expected, "wrong_weight")
        if weight and role in READ:
            found = f"the weight {weight:g} of a turn of the {role}"
            expected = "0: templates learn what the assistant says"
            raise DataError(at(where, turn_number), found, expected, "wrong_weight")
    if len(conversation.tools) > max_turn_chars:
        found = f"a list of tools of {len(conversation.tools):,} characters"
        raise DataError(where, found, f"max_turn_chars={max_turn_chars:,} or fewer", "turn_too_long")
    writable(conversation.tools, where)
    if not any(turn.weight for turn in conversation.turns):
        raise DataError(where, "no turn with a weight above 0", "something to learn", "nothing_to_learn")
    if len(roles := {turn.role for turn in conversation.turns}) > 1 and ROLE in roles:
        raise DataError(where, f"turns of {' and '.join(sorted(roles))}", "turns of ids alone", "mixed_ids")


def count_ids(text: str, where: Where) -> int:
    """How many there are in a turn of ids."""
    try:
        return len(read_ids(text))
    except InputError:
        raise DataError(where, f"{shown(text)} as token ids", FORM, "wrong_ids") from None


def writable(text: str, where: Where, turn: int | None = None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}"
        raise DataError(where._replace(turn=turn), found, "text that UTF-8 can hold", "half_surrogate") from None


def stable_hash(key: str) -> int:
    """64 bits that depend on the text alone: not on the process, the platform or the order of rows."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:8], "big")
