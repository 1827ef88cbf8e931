"""JSON rows of your own, in any of three shapes; the first that fits by its keys is taken:

    {"source": …, "id": …, "turns": [["user", "Hi", 0.0, true], ["assistant", "Hello!", 1.0, true]]}    our own record,
                                                                 with "tools" where there are any
    {"messages": [{"role": "user", "content": …}, …]}    also "conversations", "items": see `sharegpt`
    {"text": "a document"}    see `text`

The first is `Conversation.to_json`: a turn is role, text, weight, and whether it is helpful. Its order of turns and
its weights are taken as they are. The id is made anew from file and row, because ids of several files may clash.

Origin and licence: yours. This is the source for one's own data.
"""

from data_pipelines.conversation import ROLES, SPECIAL, Conversation, DataError, Turn, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, at, items, number, row_id, sharegpt, string
from data_pipelines.sources.text import convert as convert_text
from data_pipelines.tool_calls import calls_text, tools_text

FORMAT = '{"turns": [[role, text, weight, helpful], …]}, {"messages": [{"role": …, "content": …}, …]} or {"text": …}'
ORIGIN = "rows of your own, .jsonl or .json"
LICENCE = "yours"
PATTERNS = ("jsonl/*.jsonl", "jsonl/*.jsonl.gz", "jsonl/*.json", "jsonl/*.json.gz")

REPAIRS = sharegpt.REPAIRS


def convert(row: Row, where: Where) -> list[Conversation]:
    if "turns" in row:
        turns = [turn(item, at(where, i)) for i, item in enumerate(items(row["turns"], '"turns"', where), start=1)]
        if not turns:
            raise DataError(where, "no turns", FORMAT, "no_exchange")
        return [Conversation("jsonl", row_id(where), tuple(turns), tools_text(row.get("tools"), where))]
    if any(key in row for key in sharegpt.TURN_KEYS):
        return sharegpt.convert(row, where)
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
