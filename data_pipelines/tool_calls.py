"""Tools that an assistant may call: how they and the calls are kept, and how a chat template gets them.

A conversation keeps the list of its tools as JSON text, in the shape that OpenAI's interface and Hugging Face's chat
templates share, and so does a turn with the role "call":

    tools    [{"type": "function", "function": {"name": "time", "description": …, "parameters": {…}}}]
    a call   [{"name": "time", "arguments": {"zone": "UTC"}}]        with "id" where the source gives one

A turn of the role "call" lists the calls that the assistant makes at once. It is learned like an answer; the turns of
the role "tool" after it are what came back, one a call and in their order, and are read only. JSON rather than a
structure of its own, because most of what handles a conversation wants to count, search or show text. The order of keys
is kept.

`messages` gives a template what `apply_chat_template` of Hugging Face takes: what the assistant says before a call and
the call are one message.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.conversation import DataError, Turn, Where
from data_pipelines.errors import InputError, shown

A_CALL = '{"name": …, "arguments": {…}}'
A_TOOL = '{"name": …, "description": …, "parameters": {…}}'


def calls_text(value: object, where: Where) -> str:
    """Calls as a turn keeps them. `value`: one call or a list of them, or JSON text of that; a call is {"name",
    "arguments"} or, as OpenAI has it, {"id", "function": {"name", "arguments"}}, with arguments as an object or as
    JSON text. Raises DataError with the reason wrong_call."""
    value = _parsed(value, "a call", A_CALL, where, "wrong_call")
    calls = [_call(call, where) for call in (value if isinstance(value, list) else [value])]
    if not calls:
        raise DataError(where, "an empty list of calls", A_CALL, "wrong_call")
    return _text(calls, A_CALL, where, "wrong_call")


def tools_text(value: object, where: Where) -> str:
    """Tools as a conversation keeps them; nothing for an empty list. `value`: a list of tools, wrapped in {"type":
    "function", "function": …} or not, or JSON text of that. Raises DataError with the reason wrong_tools."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    value = _parsed(value, '"tools"', f"a list of {A_TOOL}", where, "wrong_tools")
    if not isinstance(value, list):
        raise DataError(where, f'"tools" is {shown(value)}', f"a list of {A_TOOL}", "wrong_tools")
    tools = []
    for tool in value:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not isinstance(inner, Mapping) or not _named(inner):
            raise DataError(where, f"the tool {shown(tool)}", A_TOOL, "wrong_tools")
        tools.append({"type": "function", "function": inner})
    return _text(tools, A_TOOL, where, "wrong_tools") if tools else ""


def messages(turns: Sequence[Turn], marked: bool = False) -> tuple[list[dict[str, Any]], list[float]]:
    """(messages, weights of the assistant's), for a chat template; with `marked` each tells whether it is helpful.

    Raises InputError for calls that are no JSON, and for a message whose words and calls have two weights.
    """
    out: list[dict[str, Any]] = []
    weights: list[float] = []
    waiting: list[dict[str, Any]] = []  # calls that a turn of the tool may answer
    for turn in turns:
        if turn.role == "call":
            waiting = read_calls(turn.text)
            calls = [_message_call(call) for call in waiting]
            if out and out[-1]["role"] == "assistant" and "tool_calls" not in out[-1]:
                if weights[-1] != turn.weight:
                    raise InputError(f"found a message of the weight {weights[-1]:g} with a call of {turn.weight:g}")
                out[-1]["tool_calls"] = calls
                continue
            out.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif turn.role == "tool":
            called = waiting.pop(0) if waiting else {}
            ids = {"tool_call_id": called["id"]} if "id" in called else {}
            name = {"name": called["name"]} if called else {}
            out.append({"role": "tool", **name, **ids, "content": turn.text})
        else:
            out.append({"role": turn.role, "content": turn.text})
        if marked:
            out[-1]["helpful"] = turn.helpful
        if out[-1]["role"] == "assistant":
            weights.append(turn.weight)
    return out, weights


def read_calls(text: str) -> list[dict[str, Any]]:
    """The calls of a turn. Raises InputError where a stage between made something else of the text."""
    try:
        calls = json.loads(text)
        if calls and all(isinstance(call["arguments"], dict) and _named(call) for call in calls):
            return list(calls)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    raise InputError(f"found {shown(text)} as a call; expected [{A_CALL}]")


def _message_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {key: call[key] for key in ("id",) if key in call} | {"type": "function", "function": function}


def _call(call: object, where: Where) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping) or not _named(inner):
        raise DataError(where, f"the call {shown(call)}", A_CALL, "wrong_call")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", '"arguments"', A_CALL, where, "wrong_call")
    if not isinstance(arguments, Mapping):
        raise DataError(where, f'"arguments" is {shown(arguments)}', "an object, or JSON text of one", "wrong_call")
    given = call.get("id")
    return ({"id": given} if isinstance(given, str) and given else {}) | {"name": inner["name"], "arguments": arguments}


def _named(function: Mapping[str, Any]) -> bool:
    name = function.get("name")
    return isinstance(name, str) and bool(name.strip())


def _parsed(value: object, name: str, expected: str, where: Where, reason: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(where, f"{name} is {shown(value)}", f"JSON text of {expected}", reason) from None


def _text(value: object, expected: str, where: Where, reason: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise DataError(where, "a number that JSON does not have", expected, reason) from None
