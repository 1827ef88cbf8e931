"""Trees become the path that people liked best, or all paths with every answer learned once."""

import gzip
import json

import pytest
from tiny_tokenizers import REAL, real_data

from data_pipelines import sources
from data_pipelines.conversation import DataError, Where
from data_pipelines.files.records import read_rows
from data_pipelines.sources import Filtered, oasst

WHERE = Where("folder/file.jsonl", 7)


def message(text, *replies, **fields):
    """Questions are in capitals."""
    role = "prompter" if text.isupper() else "assistant"
    return {"text": text, "role": role, "lang": "en", "replies": list(replies), **fields}


def tree(*replies, **fields):
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": message("Q", *replies), **fields}


def paths(row, **options):
    """Each conversation as its texts; what is learned has a star."""
    found = oasst.convert(row, WHERE, **options)
    return [" ".join(turn.text + "*" * bool(turn.weight) for turn in conversation.turns) for conversation in found]


FOLLOWED = tree(
    message("worse", message("R", message("far")), rank=1),
    message("best", message("S", message("x", rank=1), message("y", rank=0)), message("T", message("z")), rank=0),
    message("unranked"),
)


def test_best_and_all_paths():
    assert paths(FOLLOWED) == ["Q best* S y*"]
    assert paths(FOLLOWED, paths="all") == [
        "Q best* S y*",
        "Q best S x*",
        "Q best T z*",
        "Q worse* R far*",
        "Q unranked*",
    ]
    ids = [conversation.id for conversation in oasst.convert(FOLLOWED, WHERE, paths="all")]
    assert ids == [f"folder/file:7:{i}" for i in range(1, 6)]
    assert [c.id for c in oasst.convert(FOLLOWED, WHERE)] == ["folder/file:7"]


def test_what_is_not_followed():
    assert paths(tree(message("a", message("R"), rank=0), message("b", rank=1))) == ["Q a*"]  # R has no answer
    assert paths(tree(message("a", message("R"), message("S", message("c")))), paths="all") == ["Q a* S c*"]
    assert paths(tree(message("a", rank=0, deleted=True), message("b", rank=1))) == ["Q b*"]
    assert paths(tree(message("a", rank=0, review_result=False), message("b", review_result=None))) == ["Q b*"]
    assert paths(tree(message("a", rank=None), message("b", rank=5), message("c"))) == ["Q b*"]
    assert paths(tree({**message("a"), "replies": None})) == ["Q a*"]


def test_filters_and_options():
    for row, options, reason in (
        (tree(message("a"), tree_state="aborted_low_grade"), {}, "tree_state"),
        (tree(message("a")), {"languages": ("de", "fr")}, "language"),
    ):
        with pytest.raises(Filtered) as caught:
            oasst.convert(row, WHERE, **options)
        assert caught.value.reason == reason
    assert paths(tree(message("a")), languages=("de", "en")) == ["Q a*"]
    with pytest.raises(ValueError, match="paths: found 'some'; expected best or all"):
        oasst.convert(tree(message("a")), WHERE, paths="some")


@pytest.mark.parametrize("how", ["best", "all"])
@pytest.mark.parametrize(
    "row, reason",
    [
        ({"message_tree_id": "t"}, "wrong_keys"),
        ({"message_tree_id": "t", "prompt": "Q"}, "wrong_keys"),
        ({"message_tree_id": "t", "prompt": {"role": "system", "text": "x"}}, "wrong_keys"),
        (tree(), "no_exchange"),
        (tree(message("R", message("a"))), "not_alternating"),
        (tree(message("a", message("b"))), "not_alternating"),
        (tree({**message("a"), "text": 3}), "wrong_type"),
        (tree({**message("a"), "text": " "}), "empty_text"),
        (tree({**message("a"), "replies": "none"}), "wrong_type"),
        (tree({**message("a"), "replies": ["none"]}), "wrong_keys"),
        ({"message_tree_id": "t", "prompt": message("a", message("Q", message("b")))}, "starts_with_assistant"),
    ],
)
def test_broken(row, reason, how):
    with pytest.raises(DataError) as caught:
        oasst.convert(row, WHERE, paths=how)
    assert caught.value.reason == reason


def test_a_tree_of_too_many_paths():
    wide = tree(*(message("a", rank=i) for i in range(oasst.MOST_PATHS + 1)))
    with pytest.raises(DataError, match="more than 1,000 paths"):
        oasst.convert(wide, WHERE, paths="all")
    assert paths(wide) == ["Q a*"]


class TestRealFiles:
    pytestmark = real_data
    folder = REAL / "koala" / "sharegpt"

    def test_the_best_paths_are_those_that_were_derived_elsewhere(self):
        with gzip.open(self.folder / "derived_oasst_en_best_path_sharegpt.json.gz", "rt") as file:
            derived = [[turn["value"] for turn in row["conversations"]] for row in json.load(file)]
        rows = list(read_rows(self.folder / "oasst_en_100_tree.jsonl.gz"))
        found = [[turn.text for turn in oasst.convert(row, where)[0].turns] for where, row in rows]
        assert found == derived and len(found) == 100

    def test_all_paths_learn_every_answer_once(self):
        learned, conversations = 0, 0
        for where, row in read_rows(self.folder / "oasst_en_100_tree.jsonl.gz"):
            for conversation in oasst.convert(row, where, paths="all"):
                sources.check(conversation, where, 200_000)
                conversations += 1
                learned += sum(turn.weight for turn in conversation.turns)
        assert (conversations, learned) == (546, 687)  # of 687 answers in the file
