"""Examples that are token ids already, as programs for training keep them.

Format. A row has a list of ids, and may have a list as long that says what of it is learned:

    {"input_ids": [1, 523, 10, 2], "labels": [-100, -100, 10, 2]}          Hugging Face's
    {"tokens": [1, 523, 10, 2], "loss_weights": [0, 0, 1, 0.5]}
    a tf.train.Example with the features "inputs" and "targets"            .array_record: MaxText's, grain's

The ids stand under the first of input_ids, tokens, inputs and targets that is there, or under the key that the option
`ids` names. Where several of the four are there they must be equal, unless the option says which one is meant: a
question under "inputs" and its answer under "targets" are not one example each.

How much each id is learned stands under the first of loss_weights, assistant_masks, loss_mask (numbers, 0 or more) and
labels (the ids again, -100 where nothing is learned) that is there; without any of them all ids are learned. The
number at a place is about predicting the id at that same place, so a mask that was shifted by one is not the one that
is wanted here. The first id has nothing before it that predicts it.

What comes of it. Every template lays an example out as these ids: no bos, no eos, nothing before or after them. Ids
mean nothing without the tokenizer that made them, which is the one to train with; an id that it does not have is an
error, but ids of another one of that size cannot be told. The stages that read words leave ids alone. A 0 under
attention_mask is padding, and its row is left out: rows are packed later, and padding would be part of an example.
max_turn_chars counts an id as one character.

Origin and licence: yours. A source cannot be called "tokens", where stored tokens lie; say kind="tokens".
"""

from collections.abc import Sequence

from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import InputError, shown
from data_pipelines.sources import Row, items, need, number, row_id
from data_pipelines.token_ids import LARGEST, ids_turns

FORMAT = '{"input_ids": [id, …], "labels": [id or -100, …]}, or a tf.train.Example with such features'
ORIGIN = "your own tokenised rows, .jsonl or .array_record"
LICENCE = "yours"
PATTERNS = tuple(
    f"tokens/*.{end}" for end in ("array_record", "array_record-*", "jsonl", "jsonl.gz", "json", "json.gz")
)

IDS = ("input_ids", "tokens", "inputs", "targets")
WEIGHTS, LABELS = ("loss_weights", "assistant_masks", "loss_mask"), "labels"
IGNORED = -100  # PyTorch's label of what is not learned
PADDING = "attention_mask"
HEAVIEST = float.fromhex("0x1.fffffep+127")  # what float32 holds


def convert(row: Row, where: Where, *, ids: str = "") -> list[Conversation]:
    if not isinstance(ids, str):
        raise InputError(f"ids: found {ids!r}; expected the key of the ids as text")
    name = named(row, ids, where)
    found = token_ids(row[name], f'"{name}"', where)
    if row.get(PADDING) is not None and 0 in items(row[PADDING], f'"{PADDING}"', where):
        raise DataError(where, f'"{PADDING}" with a 0', "ids without padding", "padding")
    weights = learned(row, found, where)
    if not any(weights[1:]):
        raise DataError(where, "no weight above 0 after the first id", "something to learn", "nothing_to_learn")
    return [Conversation("tokens", row_id(where), ids_turns(found, weights))]


def named(row: Row, wanted: str, where: Where) -> str:
    """The key of the ids."""
    name, *others = [wanted] if wanted else [key for key in IDS if key in row] or IDS[:1]
    need(row, (name,), where, FORMAT)
    for other in others:
        if row[other] != row[name]:
            expected = "equal ones, or the option ids to say which are meant"
            raise DataError(where, f'different ids under "{name}" and "{other}"', expected, "ambiguous_ids")
    return name


def token_ids(value: object, name: str, where: Where) -> list[int]:
    ids = whole_numbers(value, name, where)
    if not ids:
        raise DataError(where, f"{name} is an empty list", "a token id or more", "empty_ids")
    if (least := min(ids)) < 0 or max(ids) > LARGEST:
        found = f"{name} with {shown(least if least < 0 else max(ids))}"
        raise DataError(where, found, f"token ids from 0 to {LARGEST:,}", "wrong_ids")
    return ids


def learned(row: Row, ids: Sequence[int], where: Where) -> list[float]:
    """The loss weight of each id."""
    name = next((key for key in (*WEIGHTS, LABELS) if key in row), None)
    if name is None:
        return [1.0] * len(ids)
    read = labels if name == LABELS else loss_weights
    if len(given := items(row[name], f'"{name}"', where)) != len(ids):
        found = f'{len(given):,} entries under "{name}" for {len(ids):,} ids'
        raise DataError(where, found, "as many as ids", "wrong_length")
    return read(given, ids, f'"{name}"', where)


def labels(given: Sequence[object], ids: Sequence[int], name: str, where: Where) -> list[float]:
    for place, (label, token_id) in enumerate(zip(whole_numbers(given, name, where), ids), start=1):
        if label not in (token_id, IGNORED):
            found = f"{name} with {shown(label)} for the id {token_id} at place {place}"
            raise DataError(where, found, f"the same id, or {IGNORED} for what is not learned", "wrong_labels")
    return [float(label != IGNORED) for label in given]


def loss_weights(given: Sequence[object], ids: Sequence[int], name: str, where: Where) -> list[float]:
    weights = [number(value, f"an entry of {name}", where) for value in given]
    if wrong := [weight for weight in weights if not 0 <= weight <= HEAVIEST]:
        raise DataError(where, f"{name} with {wrong[0]:g}", "0 or more, as far as float32 goes", "wrong_weight")
    return weights


def whole_numbers(value: object, name: str, where: Where) -> list[int]:
    """A list of integers; a boolean is none."""
    found = items(value, name, where)
    if not {*map(type, found)} <= {int}:
        place, wrong = next((place, each) for place, each in enumerate(found, start=1) if type(each) is not int)
        raise DataError(where, f"{name} with {shown(wrong)} at place {place}", "whole numbers", "wrong_type")
    return found
