"""Preference data as tools of today write it: pairs of answers (DPO), or answers with a verdict (KTO).

Format. A row is a chat with two answers to its last question, or a chat whose last answer was judged:

    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello!"},
     "rejected": {"from": "gpt", "value": "What?"}}
    {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "What?"}
    {"instruction": "Hi", "input": "", "output": ["Hello!", "What?"], "history": [["question", "answer"]]}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "label": true}
    {"prompt": "Hi", "completion": "Hello!", "label": true}

The chat is what `sharegpt` reads, "system" and "tools" included, or what `alpaca` reads, or a question under "prompt".
Of two outputs the first is the better one.

Origin and licence: yours. These are the shapes of LLaMA-Factory's demonstration files (Apache-2.0), of TRL and of many
sets made for them. The sets that Koala used have sources of their own: `hh_rlhf`, `webgpt`, `summarize`.

Weights are as in `hh_rlhf`: a worse answer is marked unhelpful, and of its conversation nothing else is learned. A pair
gives two conversations, a verdict one, with ":chosen" or ":rejected" behind the id.
"""

from collections.abc import Mapping

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, alpaca, comparison, exchange, items, jsonl, row_id, sharegpt, string, unhelpful
from data_pipelines.tool_calls import tools_text

FORMAT = '{"conversations": […], "chosen": …, "rejected": …} or {"messages": […], "label": true or false}'
ORIGIN = "your own pairs or verdicts, in the shapes of LLaMA-Factory's DPO and KTO files"
PATTERNS = tuple(f"preference/*.{end}" for end in ("json", "json.gz", "jsonl", "jsonl.gz", "parquet"))

REPAIRS = jsonl.REPAIRS


def convert(row: Row, where: Where) -> list[Conversation]:
    tools = tools_text(row.get("tools"), where)
    if "label" in row:
        return [judged(row, tools, where)]
    better, worse = (chat(row, answer, name, where) for name, answer in answers(row, where).items())
    return comparison("preference", where, better, worse, tools)


def judged(row: Row, tools: str, where: Where) -> Conversation:
    if not isinstance(row["label"], bool):
        raise DataError(where, f'"label" is {shown(row["label"])}', "true or false", "wrong_label")
    prompted = not any(key in row for key in sharegpt.TURN_KEYS) and all(key in row for key in jsonl.COMPLETION)
    turns = sharegpt.chat(jsonl.as_messages(row, where) if prompted else row, where)
    if row["label"]:
        return Conversation("preference", f"{row_id(where)}:chosen", turns, tools)
    return unhelpful(Conversation("preference", f"{row_id(where)}:rejected", turns, tools))


def answers(row: Row, where: Where) -> dict[str, object]:
    """The better and the worse answer as the row has them."""
    if "chosen" in row and "rejected" in row:
        return {"chosen": row["chosen"], "rejected": row["rejected"]}
    if "output" not in row:
        raise DataError(where, shown(row), FORMAT, "wrong_keys")
    ranked = items(row["output"], '"output"', where)
    if len(ranked) != 2:
        raise DataError(where, f"{len(ranked)} outputs", "two, the better one first", "wrong_outputs")
    return {"chosen": ranked[0], "rejected": ranked[1]}


def chat(row: Row, answer: object, name: str, where: Where) -> tuple[Turn, ...]:
    """The row's turns with this answer behind them."""
    if isinstance(answer, list):
        raise DataError(where, f'"{name}" is {shown(answer)}', "one answer: text or a turn", "wrong_type")
    if key := next((key for key in sharegpt.TURN_KEYS if key in row), None):
        last = answer if isinstance(answer, Mapping) else {"role": "assistant", "content": answer}
        return sharegpt.chat({**row, key: [*items(row[key], f'"{key}"', where), last]}, where)
    text = string(answer, f'"{name}"', where)
    if "prompt" in row:
        return exchange(string(row["prompt"], '"prompt"', where), text)
    (conversation,) = alpaca.convert({**row, "output": text}, where)
    return conversation.turns
