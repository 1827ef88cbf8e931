"""ShareGPT: chats that people shared, and everything else that is written as a list of turns.

Format. A row is an object with its turns under "conversations", "messages" or "items":

    {"id": "a1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "train": true}]}

The speakers are human or user, gpt, assistant, chatgpt, bing or bard, system, and function_call, function,
observation or tool. A system prompt is the first turn or stands under "system". A turn may say how much it is
learned: "train": true or false, or "loss_weight" or "weight" as a number; without that the assistant's turns weigh 1
and all others 0. The content may be a list of parts, as long as all are text.

Origin and licence. The Koala authors collected about 60,000 chats through an interface of sharegpt.com, of which
30,000 were left after removing repeated queries and languages other than English. Neither these nor the interface are
public; the texts belong to the people who shared them. Community copies of about 90,000 chats exist without clear
terms. Open data in the same format: OASST (Apache-2.0), UltraChat (MIT), the demonstration files of FastChat.

What Koala did: any conversation that names OpenAI, ChatGPT or GPT-3 was dropped whole (`drop_phrases` in the config
does that), and the page's "Copy code" was removed from answers. What Vicuna did, and we do (`REPAIRS`, counted): a
leading answer without a question and a trailing question without an answer are cut off. Where we depart: turns that
do not alternate and empty turns are errors, not silently dropped. HTML is left as it is; cleaning it is a stage of its
own. A function call is read as a turn of the tool, so it is not learned unless the row gives it a weight; the list of
tools ("tools") is not kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.sources import Row, alternate, at, items, number, row_id, shown, string

FORMAT = '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}'
ORIGIN = "your own or a community copy of ShareGPT chats as JSON; or OASST, UltraChat and others in this format"
LICENCE = "that of the copy; the texts belong to the people who shared them"
PATTERNS = ("sharegpt/*.json", "sharegpt/*.json.gz", "sharegpt/*.jsonl", "sharegpt/*.jsonl.gz")

TURN_KEYS = ("conversations", "messages", "items")
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "function", "observation", "tool"), "tool"),
}
ORDER = "the user and the assistant in turns, the user first and the assistant last"


def convert(row: Row, where: Where) -> list[Conversation]:
    key = next((key for key in TURN_KEYS if key in row), None)
    if key is None:
        raise DataError(where, shown(row), FORMAT, "wrong_keys")
    turns = [turn(item, at(where, i)) for i, item in enumerate(items(row[key], f'"{key}"', where), start=1)]
    alternate([turn.role for turn in turns], where, ORDER)
    if row.get("system") is not None and string(row["system"], '"system"', where, empty=None).strip():
        if turns[0].role == "system":
            raise DataError(where, 'a system turn beside "system"', "one system prompt", "two_systems")
        turns.insert(0, Turn("system", row["system"], 0.0))
    return [Conversation("sharegpt", row_id(where), tuple(turns))]


def turn(item: Any, where: Where) -> Turn:
    if not isinstance(item, Mapping):
        raise DataError(where, shown(item), '{"from": …, "value": …}', "wrong_type")
    pairs = (("from", "value"), ("role", "content"))
    names = next((pair for pair in pairs if all(key in item for key in pair)), None)
    if names is None:
        raise DataError(where, shown(item), '"from" and "value", or "role" and "content"', "wrong_keys")
    speaker, content = item[names[0]], item[names[1]]
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(where, f"the speaker {shown(speaker)}", f"one of {', '.join(SPEAKERS)}", "wrong_role")
    return Turn(role, said(content, names[1], where), weight(item, role, where))


def said(content: Any, name: str, where: Where) -> str:
    """The text of a turn; a list of parts is joined with line breaks."""
    if not isinstance(content, list):
        return string(content, f'"{name}"', where)
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(where, f"the part {shown(part)}", 'parts of the type "text" alone', "not_text")
        parts.append(string(part.get("text", part.get("value")), "the text of a part", where, empty=None))
    return string("\n".join(parts), f'"{name}"', where)


def weight(item: Row, role: str, where: Where) -> float:
    """What the turn says about itself, or 1 for the assistant and 0 for the others."""
    given = [key for key in ("train", "loss_weight", "weight") if item.get(key) is not None]
    if not given:
        return 1.0 if role == "assistant" else 0.0
    if len(given) > 1:
        raise DataError(where, f"{' and '.join(given)} in one turn", "one of them", "wrong_weight")
    value = item[given[0]]
    if given == ["train"]:
        if not isinstance(value, bool):
            raise DataError(where, f'"train" is {shown(value)}', "true or false", "wrong_weight")
        return float(value)
    return number(value, f'"{given[0]}"', where)


def _without(keep: slice) -> Callable[[Row], Row]:
    def repair(row: Row) -> Row:
        """Called only for rows whose turns were read, so the list is there; a leading system turn stays."""
        key = next(key for key in TURN_KEYS if key in row)
        turns = row[key]
        system = [item for item in turns[:1] if turn(item, Where("")).role == "system"]
        return {**row, key: system + turns[len(system) :][keep]}

    return repair


REPAIRS = {"starts_with_assistant": _without(slice(1, None)), "ends_with_user": _without(slice(None, -1))}
