"""Examples that are token ids already, as programs for training keep them.

Format. A row has a list of ids, and may have a list as long that says what of it is learned:

    {"input_ids": [1, 523, 10, 2], "labels": [-100, -100, 10, 2]}          Hugging Face's
    {"tokens": [1, 523, 10, 2], "loss_weights": [0, 0, 1, 0.5]}
    a tf.train.Example with the features "inputs" and "targets"            .array_record: MaxText's, grain's

The ids stand under the first of input_ids, tokens, inputs and targets that is there, or under the key that the option
`ids` names. Where several of the four are there they must be equal, unless the option says which one is meant: a
question under "inputs" and its answer under "targets" are not one example each.

How much each id is learned stands under the first of loss_weights, assistant_masks, completion_mask, loss_mask
(numbers, 0 or more; masks also as true and false) and labels (the ids again, -100 where nothing is learned) that is
there; without any of them all ids are learned. Of assistant_masks and completion_mask together an id is learned where
both say so, as TRL has it. The number at a place is about predicting the id at that same place, so a mask that was
shifted by one is not the one that is wanted here. The first id has nothing before it that predicts it. A key whose
value is null is as if it were not there.

A row is one example without padding, since rows are packed later. Rows that say something else of themselves are left
out: as padding for a 0 under attention_mask, segment_ids or a key that ends in _segmentation (MaxText's, grain's); as
packed for several numbers there, for position_ids, inputs_position or targets_position that start again, or for several
seq_lengths (TRL's). Rows that were packed without saying so cannot be told.

What comes of it. Every template lays an example out as these ids: no bos, no eos, nothing before or after them. Ids
mean nothing without the tokenizer that made them, which is the one to train with; an id that it does not have is an
error, but ids of another one of that size cannot be told. The stages that read words leave ids alone. max_turn_chars
counts an id as one character.

Origin and licence: yours. A source cannot be called "tokens", where stored tokens lie; say kind="tokens".
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import InputError, shown
from data_pipelines.sources import HEAVIEST, Row, items, need, number, row_id
from data_pipelines.token_ids import LARGEST, ids_turns

FORMAT = '{"input_ids": [id, …], "labels": [id or -100, …]}, or a tf.train.Example with such features'
ORIGIN = "your own tokenised rows, .jsonl, .parquet or .array_record"
LICENCE = "yours"
PATTERNS = tuple(
    f"tokens/*.{end}" for end in ("array_record", "array_record-*", "jsonl", "jsonl.gz", "json", "json.gz", "parquet")
)

IDS = ("input_ids", "tokens", "inputs", "targets")
WEIGHTS, LABELS = "loss_weights", "labels"
MASKS = ("assistant_masks", "completion_mask", "loss_mask")
BOTH = MASKS[:2]  # what is learned is what both of them say
IGNORED = -100  # PyTorch's label of what is not learned
SEGMENTS, SEGMENTATION = ("attention_mask", "segment_ids"), "_segmentation"  # 0 for padding; a number for each example
POSITIONS = ("position_ids", "inputs_position", "targets_position")
LENGTHS = "seq_lengths"


def convert(row: Row, where: Where, *, ids: str = "") -> list[Conversation]:
    if not isinstance(ids, str):
        raise InputError(f"ids: found {ids!r}; expected the key of the ids as text")
    row = {key: value for key, value in row.items() if value is not None}
    name = named(row, ids, where)
    found = token_ids(row[name], f'"{name}"', where)
    one_example(row, where)
    weights = learned(row, found, where)
    if not any(weights[1:]):
        raise DataError(where, "no weight above 0 after the first id", "something to learn", "nothing_to_learn")
    return [Conversation("tokens", row_id(where), ids_turns(found, weights))]


def one_example(row: Row, where: Where) -> None:
    """Refuses rows that say of themselves that they are padded, or several examples in one."""
    for key in row:
        if key in SEGMENTS or key.endswith(SEGMENTATION):
            numbers = mask(row[key], f'"{key}"', where)
            if 0 in numbers:
                raise DataError(where, f'"{key}" with a 0', "ids without padding", "padding")
            if any(number != numbers[0] for number in numbers):
                raise packed(f'"{key}" with several numbers', where)
    for key in POSITIONS:
        positions = whole_numbers(row.get(key, []), f'"{key}"', where)
        if any(after <= before for before, after in itertools.pairwise(positions)):
            raise packed(f'"{key}" that starts again', where)
    if len(items(row.get(LENGTHS, []), f'"{LENGTHS}"', where)) > 1:
        raise packed(f'several "{LENGTHS}"', where)


def packed(found: str, where: Where) -> DataError:
    return DataError(where, found, "one example a row: rows are packed later", "packed")


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
    names = [key for key in (WEIGHTS, *MASKS, LABELS) if key in row]
    if not names:
        return [1.0] * len(ids)
    taken = names[:2] if names[:2] == [*BOTH] else names[:1]
    return [math.prod(each) for each in zip(*[weights_under(name, row, ids, where) for name in taken])]


def weights_under(name: str, row: Row, ids: Sequence[int], where: Where) -> list[float]:
    read = labels if name == LABELS else loss_weights
    given = (mask if name in MASKS else items)(row[name], f'"{name}"', where)
    if len(given) != len(ids):
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


def mask(value: object, name: str, where: Where) -> list[Any]:
    """A list in which all of true and false are 1 and 0, or none is there."""
    found = items(value, name, where)
    if bool not in (kinds := {*map(type, found)}):
        return found
    if len(kinds) > 1:
        raise DataError(where, f"{name} with booleans among others", "numbers, or booleans alone", "wrong_type")
    return [int(each) for each in found]


def whole_numbers(value: object, name: str, where: Where) -> list[int]:
    """A list of integers; a boolean is none."""
    found = items(value, name, where)
    if not {*map(type, found)} <= {int}:
        place, wrong = next((place, each) for place, each in enumerate(found, start=1) if type(each) is not int)
        raise DataError(where, f"{name} with {shown(wrong)} at place {place}", "whole numbers", "wrong_type")
    return found
