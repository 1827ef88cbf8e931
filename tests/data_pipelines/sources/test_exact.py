"""Exact tasks: right answers, disjoint splits, and a control that is really shuffled."""

import datetime
import hashlib
import importlib.util
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from data_pipelines.conversation import Conversation
from data_pipelines.sources import exact

Placed = tuple[str, Conversation]

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
UNITS = {  # length in millimetres, mass in grams, volume in millilitres, time in minutes
    "kilometres": 1_000_000,
    "metres": 1000,
    "centimetres": 10,
    "millimetres": 1,
    "kilograms": 1000,
    "grams": 1,
    "litres": 1000,
    "millilitres": 1,
    "days": 1440,
    "hours": 60,
    "minutes": 1,
}


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def solve_conversion(question: str) -> str:
    known, *_ = numbers(question)
    first, second = re.findall(r"\b(?:{})\b".format("|".join(UNITS)), question)
    source, target = (second, first) if question.startswith("How many") else (first, second)
    value, rest = divmod(known * UNITS[source], UNITS[target])
    assert rest == 0
    return f"{value} {target}"


def solve_date(question: str) -> str:
    days = int(re.search(r"(\d+) days", question)[1])
    day, month, year = re.search(r"(\d+) ([A-Z][a-z]+) (\d{4})", question).groups()
    shifted = datetime.date(int(year), MONTHS.index(month) + 1, int(day)).toordinal() + days
    day = datetime.date.fromordinal(shifted)
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def solve_counting(question: str) -> str:
    first, last = numbers(question)
    return " ".join(str(number) for number in range(first, last + 1))


SOLVERS: dict[str, Callable[[str], str]] = {
    "reversal": lambda question: question.partition(": ")[2][::-1],
    "conversion": solve_conversion,
    "sorting": lambda question: " ".join(map(str, sorted(numbers(question)))),
    "addition": lambda question: str(sum(numbers(question))),
    "date": solve_date,
    "counting": solve_counting,
    "maximum": lambda question: str(max(numbers(question))),
}


def fact(conversation: Conversation) -> tuple:
    """What a question asks, whatever its phrasing, worked out from its text and not from its id."""
    task, question = exact.task_of(conversation), conversation.turns[0].text
    if task == "reversal":
        letters = question.partition(": ")[2]
        return task, min(letters, letters[::-1])
    if task == "conversion":
        return task, *sorted([" ".join(re.search(r"(\d+) (\w+)", question).groups()), SOLVERS[task](question)])
    if task == "date":
        return task, re.search(r"(\d+) days", question)[1], re.search(r"\d+ [A-Z][a-z]+ \d{4}", question)[0]
    return task, *sorted(numbers(question))


def leaked(placed: Iterable[Placed]) -> set[tuple]:
    """Facts that are both trained on and held out."""
    facts = defaultdict(set)
    for split, conversation in placed:
        facts[split].add(fact(conversation))
    assert set(facts) == {"train", "heldout"}
    return facts["train"] & facts["heldout"]


@pytest.fixture(scope="module")
def placed() -> list[Placed]:
    return list(exact.generate(train=1000, heldout=200))


def test_every_task_is_solved_independently():
    assert set(SOLVERS) == set(exact.TASKS)


def test_every_answer_is_right(placed):
    for _, conversation in placed:
        question, answer = conversation.turns
        assert SOLVERS[exact.task_of(conversation)](question.text) == answer.text, question.text


def test_records(placed):
    assert Counter((split, exact.task_of(c)) for split, c in placed) == {
        (split, task): count for task in exact.TASKS for split, count in (("train", 1000), ("heldout", 200))
    }
    assert len({conversation.id for _, conversation in placed}) == len(placed)
    for _, conversation in placed:
        assert [(turn.role, turn.weight) for turn in conversation.turns] == [("user", 0.0), ("assistant", 1.0)]
        assert all(turn.text == turn.text.strip() != "" and turn.helpful for turn in conversation.turns)


def test_held_out_facts_are_never_trained_on(placed):
    assert not leaked(placed)


def test_held_out_facts_are_not_trained_on_with_another_seed(placed):
    held_out = [row for row in placed if row[0] == "heldout"]
    other = [row for row in exact.generate(seed=1, train=1000, heldout=200) if row[0] == "train"]
    assert not leaked([*held_out, *other])


def test_the_check_catches_an_overlap(monkeypatch):
    """The control: with a side that is drawn and not derived from the key, the same check finds leaks."""
    coin = random.Random(0)
    monkeypatch.setattr(exact, "side_of", lambda task, key: coin.choice(("train", "heldout")))
    assert leaked(exact.generate(train=1000, heldout=500, tasks=["conversion"]))


def test_the_check_sees_through_the_order_of_operands():
    def asked(split: str, question: str) -> Placed:
        return split, Conversation("exact", "addition:x", (exact.Turn("user", question, 0.0),))

    assert leaked([asked("train", "What is 34 + 12?"), asked("heldout", "Add 12 and 34.")])


@pytest.mark.parametrize("task", exact.TASKS)
def test_no_answer_can_be_guessed(task):
    """Whoever always gives the most frequent answer, or any fixed one, is right in less than 2 of 100."""
    answers = Counter(c.turns[1].text for _, c in exact.generate(train=3000, heldout=200, tasks=[task]))
    assert max(answers.values()) / answers.total() < 0.02


def test_the_same_everywhere():
    """The hash of all bytes is that of Python 3.11 and 3.13, in processes with different string hashes."""
    lines = (f"{split} {c.to_json()}\n" for split, c in exact.generate(seed=7, train=100, heldout=30))
    assert hashlib.sha256("".join(lines).encode()).hexdigest()[:16] == "bdd15b084a77c32a"


def test_seeds_differ():
    first, second = ([c.id for _, c in exact.generate(seed=seed, train=50, heldout=20)] for seed in (0, 1))
    assert len(set(first) & set(second)) < len(first) / 4


def test_held_out_does_not_depend_on_the_training_share(placed):
    held_out = [c for split, c in placed if split == "heldout"]
    assert [c for split, c in exact.generate(train=10, heldout=200) if split == "heldout"] == held_out


def test_shuffled_answers(placed):
    shuffled = list(exact.generate(train=1000, heldout=200, shuffle_answers=True))
    assert [row for row in shuffled if row[0] == "heldout"] == [row for row in placed if row[0] == "heldout"]
    for task in exact.TASKS:
        right, dealt = (
            [c for split, c in rows if split == "train" and exact.task_of(c) == task] for rows in (placed, shuffled)
        )
        assert [(c.id, c.turns[0]) for c in dealt] == [(c.id, c.turns[0]) for c in right]
        assert Counter(c.turns[1] for c in dealt) == Counter(c.turns[1] for c in right)
        assert sum(a == b for a, b in zip(dealt, right)) < 30  # in 1000, by equal answers to different questions


def test_too_many_instances():
    with pytest.raises(ValueError, match=r"task 'counting': found \d+ distinct heldout instances .*; expected 900"):
        list(exact.generate(train=0, heldout=900, tasks=["counting"]))


def test_unknown_task():
    with pytest.raises(ValueError, match=r"tasks: found \['sort'\]; expected some of \['addition', "):
        list(exact.generate(tasks=["sort", "date"]))


def embedded():
    path = Path(__file__).parents[3] / "configs" / "data" / "embedded.py"
    spec = importlib.util.spec_from_file_location("embedded", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_has_every_task():
    config = embedded().get_config()
    assert set(config.sources) == {*exact.TASKS, "pydoc"}
    for task in exact.TASKS:
        options = {k: v for k, v in config.sources[task].items() if k not in ("kind", "weight")}
        made = list(exact.generate(**options))
        assert {exact.task_of(c) for _, c in made} == {task}
        assert Counter(split for split, _ in made) == {"train": options["train"], "heldout": 200}


def test_config_of_the_control():
    module = embedded()
    assert all(module.get_config("shuffle_answers=true").sources[task].shuffle_answers for task in exact.TASKS)
    assert module.get_config("shuffle_answers=false").sources.date.shuffle_answers is False
    with pytest.raises(ValueError, match="found the key 'shufle'; did you mean 'shuffle_answers'"):
        module.get_config("shufle=true")
    with pytest.raises(ValueError, match="shuffle_answers: found 'yes'; expected one of true, false"):
        module.get_config("shuffle_answers=yes")
