"""Pairs and verdicts: what is learned of each, which half it is, and what does not fit."""

import json

import pytest
from tiny_tokenizers import REAL, real_data

from data_pipelines import sources
from data_pipelines.conversation import DataError, Where
from data_pipelines.files.records import read_rows
from data_pipelines.sources import preference
from data_pipelines.stages.chunk import Sample

WHERE = Where("folder/file.json", 7)
HUMAN, GPT, SYSTEM = ({"from": who, "value": f"{who} says"} for who in ("human", "gpt", "system"))
GOOD, BAD = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}


def brief(conversation):
    letters = {"system": "S", "user": "U", "assistant": "A", "call": "C", "tool": "T"}
    return " ".join(f"{letters[t.role] if t.helpful else 'B'}{t.weight:g}" for t in conversation.turns)


PAIRS = [  # row, what is learned of the better and the worse one
    ({"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD}, "U0 A1", "U0 B1"),
    ({"conversations": [SYSTEM, HUMAN, GPT, HUMAN], "chosen": GOOD, "rejected": BAD},
     "S0 U0 A1 U0 A1", "S0 U0 A0 U0 B1"),
    ({"conversations": [HUMAN], "system": "s", "chosen": "good", "rejected": "bad"}, "S0 U0 A1", "S0 U0 B1"),
    ({"messages": [{"role": "user", "content": "x"}], "chosen": {"role": "assistant", "content": "good"},
      "rejected": {"role": "assistant", "content": "bad"}}, "U0 A1", "U0 B1"),
    ({"instruction": "x", "input": "y", "chosen": "good", "rejected": "bad"}, "U0 A1", "U0 B1"),
    ({"instruction": "x", "output": ["good", "bad"], "history": [["a", "b"]]}, "U0 A1 U0 A1", "U0 A0 U0 B1"),
    ({"prompt": "x", "chosen": "good", "rejected": "bad"}, "U0 A1", "U0 B1"),
]  # fmt: skip


@pytest.mark.parametrize("row, better, worse", PAIRS)
def test_a_pair(row, better, worse):
    chosen, rejected = preference.convert(row, WHERE)
    assert (chosen.id, rejected.id) == ("folder/file:7:chosen", "folder/file:7:rejected")
    assert (brief(chosen), brief(rejected)) == (better, worse)
    assert (chosen.turns[-1].text, rejected.turns[-1].text) == ("good", "bad")
    assert Sample("folder/file:7", (chosen, rejected)).pair
    for conversation in (chosen, rejected):
        sources.check(conversation, WHERE, 1000)


@pytest.mark.parametrize("label, half, learned", [(True, "chosen", "U0 A1 U0 A1"), (False, "rejected", "U0 A0 U0 B1")])
def test_a_verdict(label, half, learned):
    (conversation,) = preference.convert({"conversations": [HUMAN, GPT, HUMAN, GOOD], "label": label}, WHERE)
    assert (conversation.id, brief(conversation)) == (f"folder/file:7:{half}", learned)


def test_calls_and_tools_are_kept():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    tools = json.dumps([{"name": "f"}])
    row = {"conversations": [HUMAN, call, {"from": "observation", "value": "1"}], "chosen": GOOD, "rejected": BAD}
    chosen, rejected = preference.convert({**row, "tools": tools}, WHERE)
    assert (brief(chosen), brief(rejected)) == ("U0 C1 T0 A1", "U0 C0 T0 B1")
    assert chosen.tools == rejected.tools and "f" in chosen.tools
    chosen, rejected = preference.convert({**row, "conversations": [HUMAN], "chosen": call}, WHERE)
    assert (brief(chosen), brief(rejected)) == ("U0 C1", "U0 B1")


@pytest.mark.parametrize(
    "row, reason, part",
    [
        ({"conversations": [HUMAN]}, "wrong_keys", 'keys "conversations"'),
        ({"conversations": [HUMAN], "chosen": GOOD}, "wrong_keys", 'keys "conversations", "chosen"'),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": GOOD}, "identical_pair", "the same text"),
        ({"conversations": [HUMAN, GPT], "chosen": GOOD, "rejected": BAD}, "not_alternating", "turn 3: found"),
        ({"conversations": [HUMAN], "chosen": [GOOD], "rejected": BAD}, "wrong_type", '"chosen" is a list of 1'),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": HUMAN}, "not_alternating", "turn 2"),
        ({"conversations": [HUMAN], "chosen": GOOD, "rejected": {"from": "gpt", "value": " "}}, "empty_text", "turn 2"),
        ({"conversations": [HUMAN, GOOD], "label": "good"}, "wrong_label", "\"label\" is the text 'good'"),
        ({"conversations": [HUMAN], "label": True}, "no_exchange", "only turns of user"),
        ({"label": True}, "wrong_keys", 'keys "label"'),
        ({"instruction": "x", "output": ["a", "b", "c"]}, "wrong_outputs", "3 outputs; expected two"),
        ({"instruction": "x", "output": "a"}, "wrong_type", "as a list"),
        ({"chosen": "a", "rejected": "b"}, "wrong_keys", 'without "instruction"'),
        ({"prompt": ["x"], "chosen": "a", "rejected": "b"}, "wrong_type", '"prompt" is a list of 1'),
    ],
)
def test_broken(row, reason, part):
    with pytest.raises(DataError) as caught:
        preference.convert(row, WHERE)
    assert caught.value.reason == reason and part in str(caught.value)


class TestRealFiles:
    pytestmark = real_data

    @pytest.mark.parametrize(
        "name, rows, conversations, rejected",
        [
            ("preference/dpo_en_demo", 300, 600, {}),
            ("preference/dpo_zh_demo", 300, 600, {}),
            ("preference/kto_en_demo", 300, 300, {}),
            ("sharegpt/oasst_rm_zh", 431, 862, {"wrong_outputs": 341, "identical_pair": 3}),
        ],
    )
    def test_demonstration_files(self, name, rows, conversations, rejected):
        kept, given, reasons = 0, 0, {}
        for where, row in read_rows(REAL / "koala" / f"{name}.json.gz"):
            try:
                found = preference.convert(row, where)
            except DataError as error:
                reasons[error.reason] = reasons.get(error.reason, 0) + 1
                continue
            kept, given = kept + 1, given + len(found)
            for conversation in found:
                sources.check(conversation, where, 200_000)
                worse = conversation.id.endswith(":rejected")
                assert conversation.turns[-1].helpful != worse and conversation.turns[-1].weight == 1
                assert not worse or not any(turn.weight for turn in conversation.turns[:-1])
        assert (kept, given, reasons) == (rows, conversations, rejected)

    def test_weights_of_turns(self):
        rows = list(read_rows(REAL / "koala" / "preference" / "v1_sft_demo.jsonl.gz"))
        found = [sources.load("sharegpt").convert(row, where)[0] for where, row in rows]
        given = [[message["loss_weight"] for message in row["messages"]] for _, row in rows]
        assert [[turn.weight for turn in conversation.turns] for conversation in found] == given and len(given) == 500
