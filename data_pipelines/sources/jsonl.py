"""JSON rows of your own, in any of four shapes; the first that fits by its keys is taken:

    {"source": …, "id": …, "turns": [["user", "Hi", 0.0, true], ["assistant", "Hello!", 1.0, true]]}    our own record,
                                                                 with "tools" where there are any
    {"messages": [{"role": "user", "content": …}, …]}    also "conversations", "items": see `sharegpt`
    {"prompt": "Hi", "completion": "Hello!"}    TRL's and MaxText's; each is text or a list of messages
    {"text": "a document"}    see `text`

The first is `Conversation.to_json`: a turn is role, text, weight, and whether it is helpful. Its order of turns and
its weights are taken as they are. The id is made anew from file and row, because ids of several files may clash.

A prompt and its completion are read as the messages of both, with "system" and "tools" beside them, and turns count
through both. They are what the user and what the assistant says, not two halves of a text, so neither may be empty;
what follows no prompt is a document. Nothing of the prompt is learned unless a message says so ("train", "weight" or
"loss_weight"). A "label" beside them, true or false, is a verdict (the reason), which the source `preference` reads.

Option: `reasoning`, see `sharegpt`.

Origin and licence: yours. This is the source for one's own data.
"""

from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.conversation import ROLES, SPECIAL, Conversation, DataError, Turn, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, at, items, number, row_id, sharegpt, string
from data_pipelines.sources.text import convert as convert_text
from data_pipelines.tool_calls import calls_text, tools_text

FORMAT = '{"turns": [[role, text, weight, helpful], …]}, {"messages": [{"role": …, "content": …}, …]}, '
FORMAT += '{"prompt": …, "completion": …} or {"text": …}'
ORIGIN = "rows of your own, .jsonl, .json or .parquet"
LICENCE = "yours"
PATTERNS = ("jsonl/*.jsonl", "jsonl/*.jsonl.gz", "jsonl/*.json", "jsonl/*.json.gz", "jsonl/*.parquet")

COMPLETION = ("prompt", "completion")


def convert(row: Row, where: Where, *, reasoning: str = "reject") -> list[Conversation]:
    if "turns" in row:
        turns = [turn(item, at(where, i)) for i, item in enumerate(items(row["turns"], '"turns"', where), start=1)]
        if not turns:
            raise DataError(where, "no turns", FORMAT, "no_exchange")
        return [Conversation("jsonl", row_id(where), tuple(turns), tools_text(row.get("tools"), where))]
    if any(key in row for key in sharegpt.TURN_KEYS):
        return sharegpt.convert(row, where, reasoning=reasoning)
    if all(key in row for key in COMPLETION):
        if isinstance(row.get("label"), bool):
            expected = "the source preference for verdicts"
            raise DataError(where, '"label" beside a prompt and its completion', expected, "verdict")
        return sharegpt.convert(as_messages(row, where), where, reasoning=reasoning)
    if "text" in row:
        return convert_text(row, where)
    raise DataError(where, shown(row), FORMAT, "wrong_keys")


def turn(item: object, where: Where) -> Turn:
    if not isinstance(item, list) or len(item) != 4:
        raise DataError(where, shown(item), "[role, text, weight, helpful]", "wrong_type")
    role, said, weight, helpful = item
    if role not in ROLES:
        raise DataError(where, f"the role {shown(role)}", f"one of {', '.join(ROLES)}", "wrong_role")
    if not isinstance(helpful, bool):
        raise DataError(where, f"helpful is {shown(helpful)}", "true or false", "wrong_type")
    text = string(said, "the text", where)
    if role == "special" and text not in SPECIAL:
        raise DataError(where, f"the special token {shown(text)}", f"one of {', '.join(SPECIAL)}", "wrong_special")
    text = calls_text(text, where) if role == "call" else text
    return Turn(role, text, number(weight, "the weight", where), helpful)


def as_messages(row: Row, where: Where) -> Row:
    """The row of a prompt and its completion with the messages of both instead."""
    prompt = [read(message) for message in messages_of(row["prompt"], "user", '"prompt"', where)]
    return {**row, "messages": [*prompt, *messages_of(row["completion"], "assistant", '"completion"', where)]}


def messages_of(value: object, role: str, name: str, where: Where) -> list[Any]:
    if isinstance(value, list):
        return value
    return [{"role": role, "content": string(value, name, where)}]


def read(message: Any) -> Any:
    """A message of which nothing is learned, unless it says so."""
    if not isinstance(message, Mapping) or any(message.get(key) is not None for key in sharegpt.LEARNED):
        return message
    return {**message, "train": False}


def _repair(reason: str) -> Callable[[Row], Row]:
    """Called only for rows whose turns were read."""
    repair = sharegpt.REPAIRS[reason]
    return lambda row: repair(row if any(key in row for key in sharegpt.TURN_KEYS) else as_messages(row, Where("")))


REPAIRS = {reason: _repair(reason) for reason in sharegpt.REPAIRS}
