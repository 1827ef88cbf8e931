"""Rows of token ids become runs of ids that weigh the same; what does not fit is named."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tf_examples import array_record, example

from data_pipelines import sources
from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import InputError
from data_pipelines.files.folder import Folder
from data_pipelines.files.tf_example import read_example
from data_pipelines.sources import tokens
from data_pipelines.stages.source import own_options
from data_pipelines.token_ids import LARGEST, all_ids, ids_turns, read_ids

WHERE = Where("folder/file.jsonl", 7)
FOUR = [1, 523, 10, 2]


def runs(row, **options):
    """The turns as "ids weight"."""
    (conversation,) = tokens.convert(row, WHERE, **options)
    assert (conversation.source, conversation.id) == ("tokens", "folder/file:7")
    assert Conversation.from_json(conversation.to_json()) == conversation
    sources.check(conversation, WHERE, 100)
    assert {(turn.role, turn.helpful, type(turn.weight)) for turn in conversation.turns} == {("ids", True, float)}
    return [f"{turn.text} {turn.weight:g}" for turn in conversation.turns]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"input_ids": FOUR}, ["1 523 10 2 1"]),
        ({"tokens": FOUR, "text": "read"}, ["1 523 10 2 1"]),
        ({"inputs": FOUR, "targets": FOUR}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "labels": [-100, -100, 10, 2]}, ["1 523 0", "10 2 1"]),
        ({"input_ids": FOUR, "labels": FOUR}, ["1 523 10 2 1"]),
        ({"targets": FOUR, "loss_mask": [0, 1, 0, 1]}, ["1 0", "523 1", "10 0", "2 1"]),
        ({"input_ids": FOUR, "assistant_masks": [0, 0, 1, 1]}, ["1 523 0", "10 2 1"]),
        ({"tokens": FOUR, "loss_weights": [0, 0.5, 0.5, 2]}, ["1 0", "523 10 0.5", "2 2"]),
        ({"tokens": FOUR, "loss_weights": [0, 0, 0, 1], "labels": [7] * 4}, ["1 523 10 0", "2 1"]),  # the first counts
        ({"input_ids": FOUR, "attention_mask": [1] * 4, "token_type_ids": [0] * 4}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "attention_mask": None}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "labels": None, "assistant_masks": None}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "assistant_masks": None, "labels": [-100, -100, 10, 2]}, ["1 523 0", "10 2 1"]),
        ({"input_ids": None, "tokens": FOUR}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "completion_mask": [0, 0, 1, 1]}, ["1 523 0", "10 2 1"]),
        (
            {"input_ids": FOUR, "assistant_masks": [0, 1, 1, 0], "completion_mask": [0, 0, 1, 1]},
            ["1 523 0", "10 1", "2 0"],
        ),
        ({"input_ids": FOUR, "completion_mask": [0, 0, 1, 1], "loss_mask": [1] * 4}, ["1 523 0", "10 2 1"]),
        ({"input_ids": FOUR, "assistant_masks": [False, False, True, True]}, ["1 523 0", "10 2 1"]),
        ({"input_ids": FOUR, "loss_mask": [True] * 4, "attention_mask": [True] * 4}, ["1 523 10 2 1"]),
        ({"inputs": FOUR, "inputs_segmentation": [1] * 4, "inputs_position": [0, 1, 2, 3]}, ["1 523 10 2 1"]),
        ({"targets": FOUR, "targets_segmentation": [2] * 4, "targets_position": [5, 6, 8, 9]}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "position_ids": [0, 1, 2, 3], "seq_lengths": [4]}, ["1 523 10 2 1"]),
        ({"input_ids": FOUR, "segment_ids": None, "seq_lengths": None, "position_ids": None}, ["1 523 10 2 1"]),
        ({"input_ids": [0, LARGEST]}, [f"0 {LARGEST} 1"]),
    ],
)
def test_rows(row, expected):
    assert runs(row) == expected


def test_the_option_names_the_ids():
    row = {"inputs": [7, 8], "targets": FOUR, "mine": [3, 4]}
    assert runs(row, ids="targets") == ["1 523 10 2 1"] and runs(row, ids="mine") == ["3 4 1"]
    assert own_options(tokens) == ["ids"]
    with pytest.raises(InputError, match=r"ids: found \['a'\]; expected the key of the ids as text"):
        tokens.convert(row, WHERE, ids=["a"])
    with pytest.raises(DataError, match='without "yours"'):
        tokens.convert(row, WHERE, ids="yours")
    with pytest.raises(DataError, match='different ids under "inputs" and "targets"; expected equal ones, or the opt'):
        tokens.convert(row, WHERE)


@pytest.mark.parametrize(
    "row, told",
    [
        ({"text": "x"}, 'an object with the keys "text", without "input_ids"; expected {"input_ids"'),
        ({"input_ids": [1, True, 2]}, '"input_ids" with bool True at place 2; expected whole numbers'),
        ({"input_ids": [1, 2.0]}, '"input_ids" with float 2.0 at place 2; expected whole numbers'),
        ({"input_ids": "1 2"}, '"input_ids" is the text \'1 2\'; expected "input_ids" as a list'),
        ({"input_ids": [1, -1]}, '"input_ids" with int -1; expected token ids from 0 to 2,147,483,647'),
        ({"input_ids": [LARGEST + 1, 1]}, '"input_ids" with int 2147483648; expected token ids from 0'),
        ({"input_ids": []}, '"input_ids" is an empty list; expected a token id or more'),
        ({"input_ids": FOUR, "labels": FOUR[1:]}, '3 entries under "labels" for 4 ids; expected as many as ids'),
        (
            {"input_ids": FOUR, "labels": [-100, 523, 11, 2]},
            '"labels" with int 11 for the id 10 at place 3; expected the',
        ),
        ({"input_ids": FOUR, "labels": [1, True, 10, 2]}, '"labels" with bool True at place 2'),
        ({"input_ids": FOUR, "loss_weights": [0, 1, -2, 1]}, '"loss_weights" with -2; expected 0 or more'),
        (
            {"input_ids": FOUR, "attention_mask": [0, 1, 1, 1]},
            '"attention_mask" with a 0; expected ids without padding',
        ),
        (
            {"input_ids": FOUR, "attention_mask": [True, True, True, False]},
            '"attention_mask" with a 0; expected ids without padding',
        ),
        (
            {"inputs": FOUR, "inputs_segmentation": [1, 1, 2, 0]},
            '"inputs_segmentation" with a 0; expected ids without padding',
        ),
        (
            {"inputs": FOUR, "inputs_segmentation": [1, 1, 2, 2]},
            '"inputs_segmentation" with several numbers; expected one example a row',
        ),
        ({"input_ids": FOUR, "mine_segmentation": [1, 1, 2, 2]}, '"mine_segmentation" with several numbers'),
        ({"input_ids": FOUR, "segment_ids": [1, 1, 2, 2]}, '"segment_ids" with several numbers'),
        ({"input_ids": FOUR, "attention_mask": [1, 1, 2, 2]}, '"attention_mask" with several numbers'),
        ({"input_ids": FOUR, "position_ids": [0, 1, 0, 1]}, '"position_ids" that starts again; expected one example'),
        ({"input_ids": FOUR, "position_ids": [0, 0, 1, 2]}, '"position_ids" that starts again'),
        ({"inputs": FOUR, "inputs_position": [0, 1, 2, 0]}, '"inputs_position" that starts again'),
        ({"targets": FOUR, "targets_position": [0, 1, 2, 0]}, '"targets_position" that starts again'),
        ({"input_ids": FOUR, "seq_lengths": [2, 2]}, 'several "seq_lengths"; expected one example a row'),
        ({"input_ids": FOUR, "seq_lengths": 4}, '"seq_lengths" is int 4; expected "seq_lengths" as a list'),
        ({"input_ids": FOUR, "loss_mask": [0, True, 1, 1]}, '"loss_mask" with booleans among others; expected numbers'),
        ({"input_ids": FOUR, "attention_mask": [1, True, 1, 1]}, '"attention_mask" with booleans among others'),
        ({"input_ids": FOUR, "loss_weights": [True] * 4}, 'an entry of "loss_weights" is bool True'),
        ({"input_ids": FOUR, "assistant_masks": [1] * 4, "completion_mask": [1]}, '1 entries under "completion_mask"'),
        ({"input_ids": FOUR, "assistant_masks": [1, 1, 0, 0], "completion_mask": [0, 0, 1, 1]}, "no weight above 0"),
        ({"input_ids": None}, 'an empty object, without "input_ids"'),
        ({"input_ids": [5]}, "no weight above 0 after the first id; expected something to learn"),
    ],
)
def test_what_does_not_fit_is_told(row, told):
    with pytest.raises(DataError) as caught:
        tokens.convert(row, WHERE)
    assert f"folder/file.jsonl, row 7: found {told}" in str(caught.value)


IDS = st.lists(st.integers(0, LARGEST), min_size=2, max_size=20)


@given(IDS, st.data())
def test_runs_lose_nothing(ids, data):
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=len(ids), max_size=len(ids)))
    turns = ids_turns(ids, weights)
    read = [read_ids(turn.text) for turn in turns]
    assert [i for run in read for i in run.tolist()] == ids == [int(i) for i in all_ids(turns).split()]
    assert [turn.weight for turn, run in zip(turns, read) for _ in run] == weights
    assert all(one.weight != other.weight for one, other in itertools.pairwise(turns))
    assert {run.dtype.name for run in read} == {"int32"}


@pytest.mark.parametrize(
    "text",
    ("", " ", "x", "1,2", "1 2 ", " 1", "1  2", "1\n2", "1\t2", "1\n", "-1", "+1", "1.0", "1e3", "01", "00", "1_0",
     "0x1", "١", "2147483648", "99999999999", "1 99999999999 2", "9" * 5000),
)  # fmt: skip
def test_text_that_is_no_ids(text):
    assert read_ids("0 2147483647 10").tolist() == [0, LARGEST, 10]
    with pytest.raises(
        InputError, match=r"found .*; expected whole numbers from 0 to 2,147,483,647 with single spaces"
    ):
        read_ids(text)


def test_a_turn_may_have_as_many_ids_as_characters():
    """Ids of several digits do not use up the limit."""
    (conversation,) = tokens.convert({"input_ids": [100_000] * 50}, WHERE)
    assert len(conversation.turns[0].text) == 349
    sources.check(conversation, WHERE, 50)
    with pytest.raises(DataError, match="turn 1: found a turn of 50 token ids; expected max_turn_chars=49 or fewer"):
        sources.check(conversation, WHERE, 49)


def test_files_that_are_found(tmp_path):
    (tmp_path / "tokens").mkdir()
    names = ["a.jsonl", "b.json.gz", "c.array_record", "d.array_record-00000-of-00002", "d.array_record-00001-of-00002"]
    names.append("e.parquet")
    for name in [*names, "f.txt"]:
        (tmp_path / "tokens" / name).write_bytes(b"")
    found = Folder(str(tmp_path)).glob(tokens.PATTERNS)
    assert found == [f"tokens/{name}" for name in names]
    stems = ["tokens/a", "tokens/b", "tokens/c", "tokens/d-00000-of-00002", "tokens/d-00001-of-00002"]
    stems.append("tokens/e")
    assert [sources.stem(name) for name in found] == stems
    assert sources.stem("tokens/.array_record") == "tokens/.array_record"


def test_rows_of_json_and_of_examples_are_the_same():
    row = {"tokens": FOUR, "loss_weights": [0.0, 0.0, 1.0, 0.25]}
    assert runs(read_example(example(row))) == runs(row) == ["1 523 0", "10 1", "2 0.25"]
    assert array_record(example(row)) != array_record(example({**row, "tokens": [9, *FOUR[1:]]}))
