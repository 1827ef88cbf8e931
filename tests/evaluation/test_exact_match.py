"""Exact match counts letters, not likeness."""

import pytest

from data_pipelines.conversation import Conversation, Turn
from easylm_plus.evaluation.exact_match import Answer, answers, exact_match


class Chatter:
    """Answers with what a table says, and remembers what it was asked."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def reply(self, conversations, max_new_tokens):
        self.asked += conversations
        return [self.table[c.turns[-1].text][:max_new_tokens] for c in conversations]


def conversation(question, answer):
    turns = (Turn("system", "be brief", 0.0), Turn("user", question, 0.0), Turn("assistant", answer, 1.0))
    return Conversation("sums", question, turns)


TABLE = {"1 + 1": "2", "2 + 2": "4", "3 + 3": "5", "4 + 4": "8."}
ASKED = [
    conversation("1 + 1", "2"),
    conversation("2 + 2", " 4\n"),
    conversation("3 + 3", "6"),
    conversation("4 + 4", "8"),
]


def test_answers_stand_beside_what_was_right():
    chatter = Chatter(TABLE)
    found = answers(chatter, ASKED, 8)
    assert found == [
        Answer("1 + 1", "2", "2"),
        Answer("2 + 2", "4", "4"),
        Answer("3 + 3", "5", "6"),
        Answer("4 + 4", "8.", "8"),
    ]
    assert [a.correct for a in found] == [True, True, False, False]
    assert all(c.turns == full.turns[:-1] for c, full in zip(chatter.asked, ASKED)), "the answer is never shown"


def test_the_share_of_right_answers():
    found = answers(Chatter(TABLE), ASKED, 8)
    assert exact_match({"sums": found, "none": []}) == {"sums": 0.5}


def test_shuffled_answers_score_nothing():
    questions = list(TABLE)
    shuffled = {q: TABLE[other] for q, other in zip(questions, questions[1:] + questions[:1])}
    assert exact_match({"sums": answers(Chatter(shuffled), ASKED, 8)}) == {"sums": 0.0}


@pytest.mark.parametrize("given", ["2 ", "two", "", "22", "２"])
def test_almost_right_is_wrong(given):
    assert not Answer("1 + 1", given, "2").correct
