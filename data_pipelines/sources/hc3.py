"""HC3: questions with answers of people and of ChatGPT.

Format. A row is a question with all its answers, or, in flattened CSV copies, one answer:

    {"question": "Why …?", "human_answers": ["…", "…"], "chatgpt_answers": ["…"], "source": "reddit_eli5"}
    text,source,question,label                  label: human, or ai or chatgpt

Origin and licence. Hello-SimpleAI/HC3 on Hugging Face, CC-BY-SA 4.0 (some of what it was collected from is stricter):
24,322 English questions in all.jsonl, from reddit_eli5, open_qa, wiki_csai, medicine and finance. The files per domain
hold the same rows again: take all.jsonl alone.

What Koala did: both kinds of answers were trained on as good answers, about 60,000 of people and 27,000 of ChatGPT.
We make one conversation per answer, as Koala did. Koala took the human half from a copy in OIG (unified_hc3_human);
here both come from the original, and that copy is left out of `oig`. Some rows of the original have empty answers
among good ones: they are dropped and counted (`REPAIRS`). HC3 has spaces before punctuation; cleaning that is a stage
of its own.
"""

from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, exchange, items, need, row_id, string

FORMAT = '{"question": …, "human_answers": […], "chatgpt_answers": […]}, or columns text, source, question, label'
ORIGIN = "https://huggingface.co/datasets/Hello-SimpleAI/HC3, all.jsonl"
LICENCE = "CC-BY-SA-4.0; parts of it are stricter"
PATTERNS = ("hc3/*.jsonl", "hc3/*.jsonl.gz", "hc3/*.csv", "hc3/*.csv.gz", "hc3/*.parquet")

AUTHORS = {"human_answers": "human", "chatgpt_answers": "chatgpt"}
LABELS = ("human", "ai", "chatgpt")


def convert(row: Row, where: Where) -> list[Conversation]:
    if "label" in row:
        return [flat(row, where)]
    need(row, ("question", *AUTHORS), where, FORMAT)
    question = string(row["question"], '"question"', where)
    conversations = []
    for key, author in AUTHORS.items():
        for i, answer in enumerate(items(row[key], f'"{key}"', where), start=1):
            turns = exchange(question, string(answer, f'answer {i} of "{key}"', where, empty="empty_answer"))
            conversations.append(Conversation("hc3", f"{row_id(where)}:{author}:{i}", turns))
    if not conversations:
        raise DataError(where, "a question without answers", "an answer or more", "no_answers")
    return conversations


def flat(row: Row, where: Where) -> Conversation:
    need(row, ("text", "question"), where, FORMAT)
    if row["label"] not in LABELS:
        raise DataError(where, f'"label" is {shown(row["label"])}', f"one of {', '.join(LABELS)}", "wrong_label")
    turns = exchange(string(row["question"], '"question"', where), string(row["text"], '"text"', where))
    return Conversation("hc3", row_id(where), turns)


def without_empty_answers(row: Row) -> Row:
    """Only the empty ones go: whatever else is wrong with the lists is left for `convert` to report."""
    lists = {key: row[key] for key in AUTHORS if isinstance(row[key], list)}
    kept = {key: [a for a in answers if not isinstance(a, str) or a.strip()] for key, answers in lists.items()}
    return {**row, **kept}


REPAIRS = {"empty_answer": without_empty_answers}
