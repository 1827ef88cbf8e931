"""Problems, variations and made-up arithmetic: what has the right result is kept."""

import json
import random
import re
from collections import Counter

import pytest
from scripted_endpoint import says, scripted, synthesis_config

from data_pipelines.errors import InputError
from data_pipelines.synthesis.exact import evaluate
from data_pipelines.synthesis.maths_route import MathsRoute, Seed, arithmetic, read_seeds
from data_pipelines.synthesize import synthesize

SEEDS = ("What is 1/2 + 1/4?", "#### 3/4"), ("How many legs have 5 dogs?", "5 x 4 = 20, so \\boxed{20}")


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in SEEDS]
    path.write_text("\n".join(map(json.dumps, [*rows, {"question": "Unknown?"}])))
    return str(path)


def maths(script, output, count, arg=None, **others):
    with scripted(lambda body: script(body["messages"][0]["content"])) as server:
        settings = synthesis_config("maths", count=count, **others)
        if arg:
            settings.shares.update(arg)
        return synthesize(settings, server.url, "m", output), server


def boxed(result):
    return says(f"Step by step.\n\\boxed{{{result}}}")


def test_made_up_arithmetic_is_checked_exactly(tmp_path):
    wrong = (3, 7)
    route = MathsRoute(synthesis_config("maths").to_dict(), ())
    numbers = {route.prompt(i): i for i in range(20)}

    def script(prompt):
        i = numbers[prompt]
        result = route.arithmetic(i)[1] + (i in wrong)
        return says(f"It is {result}") if i == 11 else boxed(result)

    result, _ = maths(script, tmp_path, 20)
    assert result["dropped"] == {"no_result": 1, "wrong_answer": 2} and result["checked"] == {"value": 17}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"maths:{i}" for i in range(20) if i not in (3, 7, 11)]
    for row in rows:
        question = row["messages"][0]["content"]
        said = re.search(r"\\boxed\{(.*)\}", row["messages"][1]["content"])[1]
        assert str(evaluate(question.removeprefix("Compute ").removesuffix("."))) == said


def test_expressions_vary():
    made = [arithmetic(random.Random(i))[0] for i in range(500)]
    assert len(set(made)) > 450
    assert all(any(sign in text for text in made) for sign in ("+", "-", "*", "/", "(", "."))


def test_seeds_are_checked_against_their_answers(seeds, tmp_path):
    assert read_seeds(seeds) == [Seed(SEEDS[0][0], "3/4"), Seed(SEEDS[1][0], "20"), Seed("Unknown?", None)]
    said = {SEEDS[0][0]: ["0.75", "\\frac{3}{4}", "0.7500001"], SEEDS[1][0]: ["19", "20", "20.0"]}
    said["Unknown?"] = ["7"] * 9
    spoken = Counter()

    def script(prompt):
        question = prompt.split("\n")[0]
        spoken[question] += 1
        return boxed(said[question][spoken[question] - 1])

    result, _ = maths(script, tmp_path / "out", 9, {"seed": 1, "arithmetic": 0}, seeds=seeds, endpoint__concurrency=1)
    assert result["dropped"] == {"duplicate": 2, "wrong_answer": 2}
    assert result["checked"] == {"answer": 4, "majority": 1}
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["id"][6:], row["verified"]) for row in rows] == [
        ("0", True), ("2", False), ("3", True), ("4", True), ("7", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("results", "end", "requests"),
    (
        (("6", "6.0", "6"), "kept", 3),
        (("5", "6", "6", "12/2"), "kept", 4),
        (("5", "6", "5", "6", "6"), "kept", 5),
        (("5", "6", "5", "6", "7"), "no_majority", 5),
        (("1", "2", "3", "4"), "no_majority", 4),  # one more could not make it three of a kind
        (("6", "six"), "not_a_number", 2),
        (("6", None), "no_result", 2),
    ),
)
def test_variations_are_kept_by_majority(results, end, requests, seeds, tmp_path):
    said = iter(results)

    def script(prompt):
        if prompt.startswith("Here is a problem"):
            return says("**Problem:** What is 2 x 3?")
        assert prompt.startswith("What is 2 x 3?\n")
        result = next(said)
        return says("I do not know.") if result is None else boxed(result)

    result, server = maths(script, tmp_path / "out", 1, {"variation": 1, "arithmetic": 0}, seeds=seeds)
    assert len(server.requests) == 1 + requests
    if end == "kept":
        assert result["checked"] == {"majority": 1}
        (row,) = map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines())
        first = next(r for r in results if evaluate(r) == 6)
        assert row["messages"][1]["content"].endswith(f"\\boxed{{{first}}}") and not row["verified"]
    else:
        assert result["dropped"] == {end: 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    (
        ("What is 2 x 3?", "missing_problem"),
        ("Problem:", "missing_problem"),
        ("Problem: " + "x" * 5000, "too_long"),
        ("Problem: what  IS 1/2 + 1/4?", "copied"),
    ),
)
def test_variations_that_are_none(text, reason, seeds, tmp_path):
    result, _ = maths(lambda _: says(text), tmp_path / "out", 1, {"variation": 1, "arithmetic": 0}, seeds=seeds)
    assert result["dropped"] == {reason: 1}


def test_kinds_take_turns(seeds):
    settings = synthesis_config("maths").to_dict() | {"shares": {"seed": 2, "variation": 1, "arithmetic": 1}}
    route = MathsRoute(settings, read_seeds(seeds))
    kinds = [route.problem(i) for i in range(8)]
    assert [kind for kind, _ in kinds] == ["seed", "seed", "variation", "arithmetic"] * 2
    order = [route.seeds.index(seed) for kind, seed in kinds if kind == "seed"]
    assert order == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"shares": {"jokes": 1}}, "config.shares: found 'jokes'"),
        ({"shares": {"seed": 1}}, "config.seeds: found no problems"),
        ({"shares": {}}, "config.shares: found none"),
        ({"agree": 2}, "config.agree: found 2; expected more than half of answers .5."),
        ({"seeds": "/no/such.jsonl"}, "config.seeds: .*No such file"),
    ),
)
def test_configurations_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        synthesize(synthesis_config("maths", **changes), "http://127.0.0.1:9/v1", "m", tmp_path)
