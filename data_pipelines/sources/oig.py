"""OIG: the Open Instruction Generalist dataset of LAION, together.xyz and Ontocord.

Format. A row is a dialogue in one text; "metadata" may stand beside it:

    {"text": "<human>: Hi!\\n<bot>: Hello.\\n<human>: …\\n<bot>: …", "metadata": {"source": "basic"}}

Origin and licence. laion/OIG on Hugging Face, Apache-2.0 as a whole; the parts have terms of their own.

What Koala did: about 30,000 rows of unified_basic, unified_grade_school_math_instructions,
unified_plot_screenplay_books_dialog and unified_poetry_2_song, and unified_hc3_human as the human half of HC3 (which
we take from HC3 itself). The text was split at the markers, and whole pairs were asserted. We do the same and name
the turn where it does not hold. Text before the first marker is an error: as a question it would lack its speaker.
"""

import re

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, alternate, at, need, row_id, string

FORMAT = '{"text": "<human>: …\\n<bot>: …"}'
ORIGIN = "https://huggingface.co/datasets/laion/OIG, the unified_*.jsonl files named in data_pipelines/sources/oig.py"
LICENCE = "Apache-2.0; the parts have terms of their own"
PATTERNS = ("oig/*.jsonl", "oig/*.jsonl.gz", "oig/*.parquet", "!oig/*unified_hc3_human*")

MARKER = re.compile(r"<(human|bot)>:")
ROLES = {"human": "user", "bot": "assistant"}


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("text",), where, FORMAT)
    before, *parts = MARKER.split(string(row["text"], '"text"', where))
    if before.strip() or not parts:
        raise DataError(where, f"{shown(before)} before the first marker", FORMAT, "no_marker")
    turns = []
    for i, (marker, said) in enumerate(zip(parts[::2], parts[1::2]), start=1):
        said = string(said, f"what the {marker} says", at(where, i)).strip()
        turns.append(Turn(ROLES[marker], said, float(marker == "bot")))
    alternate([turn.role for turn in turns], where, "whole pairs of <human>: and <bot>:")
    return [Conversation("oig", row_id(where), tuple(turns))]
