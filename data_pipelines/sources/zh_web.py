"""Chinese web text, in the form of SkyPile-150B: a page is an object, and a conversation of one turn, all learned.

Format. .jsonl; whatever stands beside "text" is not kept:

    {"text": "近日，…"}
    {"text": "…", "title": "…", "date": "2023-09-01", "url": "https://…"}

Origin and licence. Skywork/SkyPile-150B on Hugging Face: 233 million pages, 620 GB, about 150 billion tokens, the
public part of what Skywork-13B was trained on (T. Wei et al., arXiv 2310.19341), under the Skywork Community License,
which allows commercial use on its terms. ChineseWebText (CASIA-LM) and WanJuan have rows of the same shape. The title
is left out because SkyPile has none, and elsewhere it is mostly the first line of the text again.

What is filtered. SkyPile comes deduplicated, filtered by rules and by fastText and BERT classifiers, and, as its card
says, may still hold addresses and phone numbers. Raw pages need the stages: see configs/data/skypile.py for normalise,
filter (language, script, boilerplate, repetition) and redact.
"""

from data_pipelines.conversation import Conversation, Turn, Where
from data_pipelines.sources import Row, need, row_id, string

FORMAT = '{"text": "a page of Chinese text"}'
ORIGIN = "https://huggingface.co/datasets/Skywork/SkyPile-150B, data/*.jsonl"
PATTERNS = ("zh_web/*.jsonl", "zh_web/*.jsonl.gz", "zh_web/*.parquet")


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("text",), where, FORMAT)
    return [Conversation("zh_web", row_id(where), (Turn("text", string(row["text"], '"text"', where), 1.0),))]
