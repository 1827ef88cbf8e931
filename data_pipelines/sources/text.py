"""Plain text: every document is a conversation of one turn with the role "text", all of which is learned.

Format. Text files in UTF-8. The option `separator` says where a document ends: a number n means a run of n empty
lines or more (1: every paragraph is a document), a string is a mark such as "<|endoftext|>". A file without
separators is one document, which then has to fit `max_turn_chars`.

Origin and licence: yours. Koala trained on no plain text; this is for pre-training and for measuring perplexity.
"""

from data_pipelines.conversation import Conversation, Turn, Where
from data_pipelines.sources import Row, need, row_id, string

FORMAT = 'a text file in UTF-8, or {"text": …}'
ORIGIN = "any text files, .txt or .txt.gz"
LICENCE = "yours"
PATTERNS = ("text/*.txt", "text/*.txt.gz")


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("text",), where, FORMAT)
    return [Conversation("text", row_id(where), (Turn("text", string(row["text"], '"text"', where), 1.0),))]
