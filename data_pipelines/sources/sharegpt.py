"""ShareGPT: chats that people shared, and everything else that is written as a list of turns.

Format. A row is an object with its turns under "conversations", "messages" or "items":

    {"id": "a1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "train": true}]}
    {"conversations": [{"from": "human", "value": "Time?"}, {"from": "function_call", "value": "{\"name\": …}"},
                       {"from": "observation", "value": "12:00"}, {"from": "gpt", "value": "Noon."}], "tools": "[…]"}
    {"messages": […, {"role": "assistant", "tool_calls": [{"id": …, "function": {"name": …, "arguments": "{…}"}}]},
                  {"role": "tool", "tool_call_id": …, "content": "12:00"}, …], "tools": […]}

The speakers are human or user, gpt, assistant, chatgpt, bing or bard, system or developer, function_call or tool_call,
and function, observation, tool or tool_response. A system prompt is the first turn or stands under "system". A turn may
say how much it is learned: "train": true or false, or "loss_weight" or "weight" as a number; without that what the
assistant says or calls weighs 1 and everything else 0. The content may be a list of parts, as long as all are text.
Answers of tools that name their call ("tool_call_id") are put into the order of the calls. What the assistant thought
beside its answer ("reasoning_content", "reasoning" or "thinking") has no place in our turns: a row with some is left
out (reasoning), or read without it where the option is reasoning="drop".

Origin and licence. The Koala authors collected about 60,000 chats through an interface of sharegpt.com, of which
30,000 were left after removing repeated queries and languages other than English. Neither these nor the interface are
public; the texts belong to the people who shared them. Community copies of about 90,000 chats exist without clear
terms. Open data in the same format: OASST (Apache-2.0), UltraChat (MIT), the demonstration files of FastChat.

What Koala did: any conversation that names OpenAI, ChatGPT or GPT-3 was dropped whole (`drop_phrases` in the config
does that), and the page's "Copy code" was removed from answers. What Vicuna did, and we do (`REPAIRS`, counted): a
leading answer without a question and a trailing question without an answer are cut off. Where we depart: turns that
do not alternate and empty turns are errors, not silently dropped. HTML is left as it is; cleaning it is a stage of its
own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.conversation import ANSWERS, Conversation, DataError, Turn, Where
from data_pipelines.errors import InputError, shown
from data_pipelines.sources import Row, alternate, at, items, number, row_id, string
from data_pipelines.tool_calls import calls_text, tools_text

FORMAT = '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}'
ORIGIN = "your own or a community copy of ShareGPT chats as JSON; or OASST, UltraChat and others in this format"
LICENCE = "that of the copy; the texts belong to the people who shared them"
PATTERNS = ("sharegpt/*.json", "sharegpt/*.json.gz", "sharegpt/*.jsonl", "sharegpt/*.jsonl.gz", "sharegpt/*.parquet")

TURN_KEYS = ("conversations", "messages", "items")
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("function", "observation", "tool", "tool_response"), "tool"),
}
ORDER = "the user and the assistant in turns, the user first and the assistant last"
CALLS = ("tool_calls", "function_call")  # of an assistant's message as OpenAI has it
LEARNED = ("train", "loss_weight", "weight")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
REASONING = ("reject", "drop")


def convert(row: Row, where: Where, *, reasoning: str = "reject") -> list[Conversation]:
    if reasoning not in REASONING:
        raise InputError(f"reasoning: found {reasoning!r}; expected one of {', '.join(REASONING)}")
    turns = chat(row, where, thoughts=reasoning == "drop")
    return [Conversation("sharegpt", row_id(where), turns, tools_text(row.get("tools"), where))]


def chat(row: Row, where: Where, order: str = ORDER, *, thoughts: bool = False) -> tuple[Turn, ...]:
    """The turns of a row, in an order that fits. `thoughts`: whether messages may have some, which are dropped."""
    key = next((key for key in TURN_KEYS if key in row), None)
    if key is None:
        raise DataError(where, shown(row), FORMAT, "wrong_keys")
    messages = in_order_of_calls(items(row[key], f'"{key}"', where), where)
    if not thoughts:
        without_thoughts(messages, where)
    numbered = [(here, turn) for here, item in messages for turn in message(item, at(where, here))]
    alternate([turn.role for _, turn in numbered], where, order, [here for here, _ in numbered])
    turns = [turn for _, turn in numbered]
    if row.get("system") is not None and string(row["system"], '"system"', where, empty=None).strip():
        if turns[0].role == "system":
            raise DataError(where, 'a system turn beside "system"', "one system prompt", "two_systems")
        turns.insert(0, Turn("system", row["system"], 0.0))
    return tuple(turns)


def without_thoughts(messages: list[tuple[int, Any]], where: Where) -> None:
    for here, item in messages:
        fields = item if isinstance(item, Mapping) else {}
        if key := next((key for key in THOUGHTS if thought(fields.get(key))), None):
            expected = 'turns without, or the option reasoning="drop" of sharegpt and jsonl'
            raise DataError(at(where, here), f'"{key}" beside what is said', expected, "reasoning")


def thought(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def message(item: Any, where: Where) -> list[Turn]:
    """The turn of a message; two where the assistant says something and calls tools."""
    if not isinstance(item, Mapping):
        raise DataError(where, shown(item), '{"from": …, "value": …}', "wrong_type")
    called = item.get(CALLS[0]) or item.get(CALLS[1])
    if "from" in item and (called or "value" in item):
        names = "from", "value"
    elif "role" in item and (called or "content" in item):
        names = "role", "content"
    else:
        raise DataError(where, shown(item), '"from" and "value", or "role" and "content"', "wrong_keys")
    speaker, content = item[names[0]], item.get(names[1])
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(where, f"the speaker {shown(speaker)}", f"one of {', '.join(SPEAKERS)}", "wrong_role")
    learned = weight(item, role, where)
    if role == "call":
        return [Turn(role, calls_text(content, where), learned)]
    if not called:
        return [Turn(role, said(content, names[1], where), learned)]
    if role != "assistant":
        raise DataError(where, f"a call of the {role}", "calls of the assistant", "wrong_call")
    words = [] if content in (None, "", []) else [Turn(role, said(content, names[1], where), learned)]
    return [*words, Turn("call", calls_text(called, where), learned)]


def in_order_of_calls(messages: list[Any], where: Where) -> list[tuple[int, Any]]:
    """(number in the row, message), the answers of tools in the order of the calls before them that they name."""
    numbered = list(enumerate(messages, start=1))
    if not any(isinstance(item, dict) and "tool_call_id" in item for item in messages):
        return numbered
    places: dict[int, tuple[int, int]] = {}
    called, ids = 0, list[Any]()
    for here, item in numbered:
        fields = item if isinstance(item, Mapping) else {}
        answered = fields.get("tool_call_id")
        places[here] = (called, 1 + ids.index(answered)) if answered in ids else (here, 0)
        if answered is None:
            calls = fields.get("tool_calls")
            calls = [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
            called, ids = here, [call["id"] for call in calls if call.get("id") is not None]
        elif ids and answered not in ids:
            found = f"an answer to the call {shown(answered)}"
            raise DataError(at(where, here), found, "one of the calls before it", "wrong_call")
    return sorted(numbered, key=lambda pair: places[pair[0]])


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
    given = [key for key in LEARNED if item.get(key) is not None]
    if not given:
        return 1.0 if role in ANSWERS else 0.0
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
        system = [item for item in turns[:1] if message(item, Where(""))[0].role == "system"]
        return {**row, key: system + turns[len(system) :][keep]}

    return repair


REPAIRS = {"starts_with_assistant": _without(slice(1, None)), "ends_with_user": _without(slice(None, -1))}
