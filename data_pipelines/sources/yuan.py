"""Files in the form that Yuan 2.0's preprocessing reads: one example a line, line breaks spelled "<n>".

    写一首诗<n>关于月亮<sep>床前明月光，<n>疑是地上霜。
    a document of the pre-training, without <sep>

Format. .txt files in UTF-8. "<n>" is a line break, "[SEP]" another spelling of "<sep>", and "▃" is dropped, as in
tools/preprocess_data_yuan.py of IEIT-Yuan/Yuan-2.0. What stands before <sep> is the question, what follows it the
answer; a line without <sep> is a document, all of which is learned. An <eod> at the end of a line is the template's to
write, and is dropped. The template `yuan` makes of them what the released code trains on.

Origin and licence: yours. Yuan's own data was never published.
"""

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.sources import Row, exchange, need, row_id, string

FORMAT = 'a line "question<sep>answer" or a document, with <n> for line breaks'
ORIGIN = "any .txt files in the form of Yuan's tools/preprocess_data_yuan.py"
LICENCE = "yours"
PATTERNS = ("yuan/*.txt", "yuan/*.txt.gz")
SEPARATOR = "\n"


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("text",), where, FORMAT)
    line = string(row["text"], '"text"', where).removesuffix("<eod>").removeprefix("<n>").strip()
    parts = line.replace("<n>", "\n").replace("▃", "").replace("[SEP]", "<sep>").split("<sep>")
    if len(parts) > 2:
        raise DataError(where, f"{len(parts) - 1} times <sep>", FORMAT, "several_sep")
    for name, part in zip(("the question", "the answer") if len(parts) == 2 else ("the document",), parts):
        string(part, name, where)
    turns = exchange(parts[0], parts[1]) if len(parts) == 2 else (Turn("text", parts[0], 1.0),)
    return [Conversation("yuan", row_id(where), turns)]
