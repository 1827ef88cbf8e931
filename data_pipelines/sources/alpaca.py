"""Alpaca: instructions written by text-davinci-003 after 175 seed tasks, with its answers.

Format. A row is one exchange; copies in the same format may have the earlier exchanges of a chat under "history":

    {"instruction": "Sort these numbers.", "input": "3 1 2", "output": "1 2 3"}
    {"instruction": "…", "input": "", "output": "…", "history": [["first question", "first answer"]]}

Origin and licence. github.com/tatsu-lab/stanford_alpaca, alpaca_data.json, 52,002 rows, CC-BY-NC 4.0.

What Koala did, and we do: the question is instruction + " " + input, or the instruction alone if there is no input.
(The prompt of Alpaca itself, "Below is an instruction …", is not used.) Some rows have an empty output: these are
rejected. Rows with a list of ranked outputs are another format and do not fit.
"""

from data_pipelines.conversation import Conversation, DataError, Turn, Where
from data_pipelines.errors import shown
from data_pipelines.sources import Row, at, exchange, items, need, row_id, string

FORMAT = '{"instruction": …, "input": … or "", "output": …}'
ORIGIN = "https://github.com/tatsu-lab/stanford_alpaca, alpaca_data.json"
LICENCE = "CC-BY-NC-4.0"
PATTERNS = ("alpaca/*.json", "alpaca/*.json.gz", "alpaca/*.jsonl", "alpaca/*.jsonl.gz", "alpaca/*.parquet")


def convert(row: Row, where: Where) -> list[Conversation]:
    need(row, ("instruction", "output"), where, FORMAT)
    turns: list[Turn] = []
    history = row.get("history")
    for i, pair in enumerate(items([] if history is None else history, '"history"', where)):
        turns += earlier(pair, at(where, 2 * i + 1))
    question = string(row["instruction"], '"instruction"', where)
    given = row.get("input")
    given = string("" if given is None else given, '"input"', where, empty=None)
    turns += exchange(f"{question} {given}" if given else question, string(row["output"], '"output"', where))
    return [Conversation("alpaca", row_id(where), tuple(turns))]


def earlier(pair: object, where: Where) -> tuple[Turn, Turn]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise DataError(where, f'{shown(pair)} in "history"', "pairs of a question and an answer", "wrong_type")
    return exchange(string(pair[0], "an earlier question", where), string(pair[1], "an earlier answer", where))
