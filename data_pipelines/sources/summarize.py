"""Summarize from feedback: two summaries of one post or article, and which one people preferred.

Format. A row is an object; the files of OpenAI are called .json and hold one row per line:

    {"info": {"id": …, "post": … or null, "article": … or null}, "summaries": [{"text": …}, {"text": …}], "choice": 0}

Origin and licence. OpenAI's "Learning to summarize from human feedback", openai/summarize_from_feedback on Hugging
Face, configuration "comparisons"; about 93,000 comparisons for training. Reddit posts (TL;DR), and in the cnndm
batches news articles, both of which belong to their authors.

What Koala did, and we do: a task phrase and the post make the question, the chosen summary is helpful, the other one
is not. Where we depart: the phrases are worded anew and picked by a hash of the id, so that a second run gives the
same data; Koala's code wrote the word "None" for rows whose post is null: we take the article there, and reject a row
that has neither.
"""

from collections.abc import Mapping

from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, comparison, exchange, items, need, row_id, stable_hash, string

FORMAT = '{"info": {"post": … or "article": …}, "summaries": [{"text": …}, {"text": …}], "choice": 0 or 1}'
ORIGIN = "https://huggingface.co/datasets/openai/summarize_from_feedback, comparisons/*.json"
LICENCE = "none stated"
FOLDERS = ("summarize", "summarize_from_feedback")
PATTERNS = tuple(
    f"{folder}/*.{end}" for folder in FOLDERS for end in ("json", "json.gz", "jsonl", "jsonl.gz", "parquet")
)

PHRASES = (
    "Summarize this text:",
    "Write a short summary of the following:",
    "Give a brief overview of this passage:",
    "What is the gist of the text below?",
    "Sum up what follows in a few sentences:",
    "Condense this into its main points:",
    "Tell me in short what this says:",
    "Shorten the following to what matters:",
)


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("info", "summaries", "choice"), where, FORMAT)
    info, choice = row["info"], row["choice"]
    if not isinstance(info, Mapping):
        raise DataError(where, f'"info" is {shown(info)}', '{"post": … or "article": …}', "wrong_type")
    post = next((info[key] for key in ("post", "article") if info.get(key) is not None), None)
    if post is None:
        raise DataError(where, "neither a post nor an article", FORMAT, "null_post")
    summaries = items(row["summaries"], '"summaries"', where)
    if len(summaries) != 2 or not all(isinstance(each, Mapping) and "text" in each for each in summaries):
        raise DataError(where, f'"summaries" is {shown(summaries)}', "two objects with a text", "wrong_summaries")
    if not isinstance(choice, int) or isinstance(choice, bool) or choice not in (0, 1):
        raise DataError(where, f'"choice" is {shown(choice)}', "0 or 1", "wrong_choice")
    phrase = PHRASES[stable_hash(str(info.get("id") or row_id(where))) % len(PHRASES)]
    question = f"{phrase} {string(post, 'the post', where).strip()}"
    answers = [string(each["text"], f"summary {i}", where).strip() for i, each in enumerate(summaries)]
    return comparison("summarize", where, exchange(question, answers[choice]), exchange(question, answers[1 - choice]))
