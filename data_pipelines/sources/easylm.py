"""Rows of EasyLM: texts, and `fields`, which says how they are put together and what of it is learned.

Format. A row is an object of texts by name; "fields" is a list of fields with commas between them:

    {"marker_user": "USER:", "marker_gpt": "GPT:", "human_0": "Hi", "gpt_1": "Hello!",
     "fields": "[marker_user+human_0+marker_gpt],gpt_1,<|eos|>"}
    {"problem": "1 + 1?", "answer": "2", "fields": "[problem],answer"}

A field names texts, joined by a space where there is a "+" between them, and is tokenised on its own. Brackets around a
field mean that it is read and not learned. <|bos|> and <|eos|> are tokens. This is the language of EasyLM's
TextProcessor (young-geng/EasyLM, EasyLM/data.py) with fields_from_example=fields, as Koala's data was written.

Rows in Koala's shape, which is told by the texts of the markers, become chats, with "An Unhelpful Answer:" as an answer
marked unhelpful; the template `koala` makes of them what EasyLM made. Any other row becomes a document of several parts
(the role "text"), each with the weight 1 or 0; every template lays it out alike: bos, the parts, eos.

Where we depart. EasyLM's configuration decides whether bos and eos surround a row (add_bos_token, add_eos_token; both
by default). Here they always do, once: a <|bos|> at the beginning and a learned <|eos|> at the end are these. Its
prepend_text belongs to the template (`koala`) or into the row. Fields that are token ids, <|123|>, or packed ids,
{name}, are refused (raw_tokens): ids mean nothing without the tokenizer that made them. A part without any text gives
no tokens and is left out; one of white space alone is refused (empty_text).

Origin and licence: yours; github.com/young-geng/koala_data_pipeline writes such rows.
"""

import re
from typing import NamedTuple

from data_pipelines.conversation import SPECIAL, Conversation, DataError, Turn, Where
from data_pipelines.errors import SHOWN, shown
from data_pipelines.sources import Row, exchange, need, row_id, string

FORMAT = '{"fields": "[name+name],name,<|eos|>", and a text for each name}'
ORIGIN = "your own rows for EasyLM, such as koala_data_pipeline writes"
PATTERNS = tuple(f"easylm/*.{end}" for end in ("jsonl", "jsonl.gz", "json", "json.gz", "parquet"))

BOS, EOS = SPECIAL
USER = "USER:"
ANSWERS = {"GPT:": True, "An Unhelpful Answer:": False}  # marker -> whether the answer is helpful
IDS = re.compile(r"<\|.*\|>|\{.*\}", re.DOTALL)


class Field(NamedTuple):
    """Texts that are joined, or the name of a special token; what it weighs."""

    texts: tuple[str, ...]
    special: str
    weight: float


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("fields",), where, FORMAT)
    spelled = string(row["fields"], '"fields"', where).split(",")
    fields = [field(each, row, where) for each in spelled]
    turns = chat(fields) or document(fields, where)
    return [Conversation("easylm", row_id(where), tuple(turns))]


def field(spelled: str, row: Row, where: Where) -> Field:
    weight = 0.0 if spelled[:1] == "[" and spelled[-1:] == "]" else 1.0
    name = spelled if weight else spelled[1:-1]
    if name in SPECIAL:
        return Field((), name, weight)
    if IDS.fullmatch(name):
        raise DataError(where, f"the field {shown(name)}", "texts, <|bos|> or <|eos|>, no ids of tokens", "raw_tokens")
    names = name.split("+")
    for each in names:
        if each not in row:
            raise DataError(where, f'"fields" with {shown(each)}, which the row lacks', FORMAT, "wrong_keys")
    texts = tuple(string(row[each], repr(each[:SHOWN]), where, empty=None) for each in names)
    return Field(texts, "", weight)


def chat(fields: list[Field]) -> list[Turn]:
    """The turns of a row in Koala's shape; none for any other."""
    turns: list[Turn] = []
    for question, answer, end in zip(fields[::3], fields[1::3], fields[2::3]):
        if (len(question.texts), len(answer.texts), end.special) != (3, 1, EOS):
            return []
        user, asked, marker = question.texts
        if user != USER or marker not in ANSWERS or (question.weight, answer.weight, end.weight) != (0, 1, 1):
            return []
        turns += exchange(asked, answer.texts[0], ANSWERS[marker])
    return turns if len(fields) % 3 == 0 else []


def document(fields: list[Field], where: Where) -> list[Turn]:
    """The parts of a row in any other shape; one text that is learned is a plain document."""
    parts = [Turn("special" if f.special else "text", f.special or " ".join(f.texts), f.weight) for f in fields]
    parts = [part for part in parts if part.text]
    if not any(part.role == "text" for part in parts):
        raise DataError(where, '"fields" without any text', FORMAT, "empty_text")
    if parts[0].text == BOS and parts[0].role == "special":
        parts = parts[1:]
    end = Turn("special", EOS, 1.0)
    parts = parts if parts[-1] == end else [*parts, end]
    return parts[:1] if len(parts) == 2 and parts[0] == Turn("text", parts[0].text, 1.0) else parts
