"""WebGPT comparisons: two answers with web quotes to one question, and which one people preferred.

Format. A row is an object; the scores lie in [-1, 1] and add up to 0, the better answer has the higher one:

    {"question": {"id": …, "full_text": …}, "answer_0": …, "score_0": 0.5, "quotes_0": {"title": […], "extract": […]},
     "answer_1": …, "score_1": -0.5, "quotes_1": {…}}

Origin and licence. openai/webgpt_comparisons on Hugging Face, 19,578 comparisons, no licence stated by OpenAI
beyond the card; the questions are mostly those of ELI5.

What Koala did, and we do: ties are left out (counted as "tie"); the question is followed by a task phrase and the
quotes of the answer, as "[1] title: T content: E [2] …"; the better answer is helpful, the other one is not. Where we
depart: the phrases are worded anew, and a hash of the question's id picks one, so that a second run gives the same
data; an answer without quotes gets no phrase.
"""

from collections.abc import Mapping
from typing import Any

from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Filtered, Row, comparison, exchange, items, need, number, row_id, stable_hash, string

FORMAT = '{"question": {"full_text": …}, "answer_0": …, "score_0": …, "quotes_0": …, "answer_1": …, …}'
ORIGIN = "https://huggingface.co/datasets/openai/webgpt_comparisons, comparisons.jsonl"
LICENCE = "none stated"
PATTERNS = ("webgpt/*.json", "webgpt/*.json.gz", "webgpt/*.jsonl", "webgpt/*.jsonl.gz", "webgpt/*.parquet")

PHRASES = (
    "Base your answer on these sources:",
    "Answer with the help of the following excerpts:",
    "Here are some sources to answer from:",
    "Rely on the quotes below:",
    "Refer to these web pages in your answer:",
)


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("question", "answer_0", "score_0", "answer_1", "score_1"), where, FORMAT)
    question = row["question"]
    if not isinstance(question, Mapping) or "full_text" not in question:
        raise DataError(where, f'"question" is {shown(question)}', '{"full_text": …}', "wrong_keys")
    scores = [number(row[f"score_{i}"], f'"score_{i}"', where) for i in (0, 1)]
    if scores[0] == scores[1]:
        raise Filtered(where, f"the score {scores[0]:g} twice", "a better and a worse answer", "tie")
    asked = string(question["full_text"], '"full_text" of the question', where)
    phrase = PHRASES[stable_hash(str(question.get("id") or row_id(where))) % len(PHRASES)]
    pairs = []
    for i in (0, 1):
        quotes = rendered(row.get(f"quotes_{i}"), f"quotes_{i}", where)
        answer = string(row[f"answer_{i}"], f'"answer_{i}"', where).strip()
        pairs.append(exchange(f"{asked} {phrase} {quotes}" if quotes else asked, answer))
    better = 0 if scores[0] > scores[1] else 1
    return comparison("webgpt", where, pairs[better], pairs[1 - better])


def rendered(quotes: Any, name: str, where: Where) -> str:
    """`[1] title: T content: E [2] …`, or nothing where there are no quotes."""
    if quotes is None:
        return ""
    if not isinstance(quotes, Mapping) or "title" not in quotes or "extract" not in quotes:
        raise DataError(where, f'"{name}" is {shown(quotes)}', '{"title": […], "extract": […]}', "wrong_keys")
    titles, extracts = (items(quotes[key], f'"{key}" of "{name}"', where) for key in ("title", "extract"))
    if len(titles) != len(extracts):
        found = f'{len(titles)} titles and {len(extracts)} extracts in "{name}"'
        raise DataError(where, found, "as many of the one as of the other", "wrong_quotes")
    return " ".join(
        f"[{k}] title: {string(title, 'a title', where, empty=None)} content: {string(extract, 'an extract', where)}"
        for k, (title, extract) in enumerate(zip(titles, extracts), start=1)
    )
