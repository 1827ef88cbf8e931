"""Problems -> worked answers -> what has the right result.

Three kinds of problems, taken in turns by the `shares` of the configuration:

    seed         a problem of the seed file; the result must be the file's. Yuan 2.0 kept GPT-3.5's worked answers to
                 the questions of several sets this way.
    variation    a new problem that the model makes of a seed. Nobody knows its result: `answers` independent answers
                 are asked for, and the first with the result that `agree` of them share is kept (self-consistency,
                 Wang et al. 2022). This is weaker than a check, since a model can be wrong the same way each time, and
                 the rows say "checked": "majority", "verified": false. The same goes for seeds without an answer.
    arithmetic   an expression that is made up here, whose exact value is known (Yuan 2.0 had 247,000).

Results are compared exactly (`exact`). Only the result is checked, not the steps that lead to it.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import InputError
from data_pipelines.files.records import read_rows
from data_pipelines.sources import string
from data_pipelines.synthesis.candidate import Rejected
from data_pipelines.synthesis.code_route import Ask, Row
from data_pipelines.synthesis.exact import NotANumber, canonical, evaluate, final_answer, same, value

KINDS = ("seed", "variation", "arithmetic")
LONGEST = 4000  # characters of a problem
LABEL = re.compile(r"^[#*\s]*problem\b[:*\s]*", re.IGNORECASE)

VARY = """\
Here is a problem:

{question}

Write one new problem of the same kind: another situation, other numbers, about as hard. It must say everything that \
is needed to solve it, and its result must be one number. Answer with the problem alone, after the word "Problem:". Do \
not solve it.
"""
SOLVE = """\
{question}

Solve this step by step. End with the result alone in \\boxed{{}}, as an exact number without a unit.
"""
OPERATORS = ("+", "-", "*", "/")


class Seed(NamedTuple):
    """A problem, and its result if it is known."""

    question: str
    result: str | None


def read_seeds(path: Path | str) -> list[Seed]:
    """The rows {"question": …, "answer": …} of a file; the answer may be missing, and may end with its result as
    `final_answer` reads it. Raises DataError for a row that does not fit, and OSError."""
    seeds = []
    for where, row in read_rows(path):
        question = string(row.get("question"), '"question"', where)
        answer = string(row["answer"], '"answer"', where) if row.get("answer") is not None else None
        seeds.append(Seed(question, answer and (final_answer(answer) or answer).strip()))
    return seeds


def expression(rng: random.Random, depth: int) -> str:
    """Two to five numbers, with brackets where the tree has them; decimals now and then."""
    if depth == 0 or rng.random() < 0.2:
        return f"{rng.randint(1, 999) / 10:.1f}" if rng.random() < 0.15 else str(rng.randint(1, 999))
    left, right = (expression(rng, depth - 1) for _ in range(2))
    operator = rng.choice(OPERATORS)
    parts = [f"({side})" if " " in side else side for side in (left, right)]
    return f"{parts[0]} {operator} {parts[1]}"


def arithmetic(rng: random.Random) -> tuple[str, Fraction]:
    """An expression with an operator in it, and its value."""
    while True:
        text = expression(rng, rng.randint(1, 2))
        try:
            if " " in text:
                return text, evaluate(text)
        except NotANumber:  # a division by zero
            continue


class MathsRoute:
    """The work on one prompt; a function of its number and of the answers. May be used by several threads at once."""

    def __init__(self, settings: Mapping[str, Any], seeds: Sequence[Seed]):
        """`settings`: the configuration. Raises InputError for what does not fit."""
        self.seed, self.seeds = settings["seed"], seeds
        self.answers, self.agree = settings["answers"], settings["agree"]
        shares = dict(settings["shares"])
        if unknown := sorted(set(shares) - set(KINDS)):
            raise InputError(f"config.shares: found {unknown[0]!r}; expected some of {', '.join(KINDS)}")
        self.turns = [kind for kind in KINDS for _ in range(shares.get(kind, 0))]
        if not self.turns:
            raise InputError("config.shares: found none; expected a whole number of turns for one kind or more")
        if not seeds and {"seed", "variation"} & set(self.turns):
            raise InputError("config.seeds: found no problems; expected a file of them, or shares of arithmetic alone")
        if not self.answers / 2 < self.agree <= self.answers:
            raise InputError(f"config.agree: found {self.agree}; expected more than half of answers ({self.answers})")

    def problem(self, index: int) -> tuple[str, Seed | None]:
        """The kind of a prompt, and the seed that it starts from."""
        kind = self.turns[index % len(self.turns)]
        if kind == "arithmetic":
            return kind, None
        number = index // len(self.turns) * self.turns.count(kind) + self.turns[: index % len(self.turns)].count(kind)
        return kind, self.seeds[number % len(self.seeds)]

    def prompt(self, index: int) -> str:
        """The first thing that is asked."""
        kind, seed = self.problem(index)
        if seed is None:
            return SOLVE.format(question=self.arithmetic(index)[0])
        return (VARY if kind == "variation" else SOLVE).format(question=seed.question)

    def arithmetic(self, index: int) -> tuple[str, Fraction]:
        text, result = arithmetic(random.Random(f"{self.seed}/arithmetic/{index}"))
        return f"Compute {text}.", result

    def work(self, index: int, ask: Ask) -> Row:
        """Asks and checks. Raises Rejected for what is not kept, and what `ask` raises."""
        kind, seed = self.problem(index)
        if seed is None:
            question, result = self.arithmetic(index)
            return self.checked(index, question, str(result), "value", ask)
        if kind == "variation":
            question = varied(seed.question, ask([user(VARY.format(question=seed.question))]))
            return self.majority(index, question, ask)
        if seed.result is None:
            return self.majority(index, seed.question, ask)
        return self.checked(index, seed.question, seed.result, "answer", ask)

    def checked(self, index: int, question: str, expected: str, how: str, ask: Ask) -> Row:
        text, result = solved(question, ask)
        if not same(result, expected):
            raise Rejected("wrong_answer", f"{result}; expected {expected}")
        return row(index, question, text, how)

    def majority(self, index: int, question: str, ask: Ask) -> Row:
        """Asks until `agree` answers have one result, or too few are left for that."""
        first: dict[str, str] = {}
        votes: Counter[str] = Counter()
        for left in range(self.answers - 1, -1, -1):
            text, result = solved(question, ask)
            try:
                value(result)
            except NotANumber as error:
                raise Rejected("not_a_number", str(error)) from None
            key = canonical(result)
            first.setdefault(key, text)
            votes[key] += 1
            if votes[key] == self.agree:
                return row(index, question, first[key], "majority")
            if max(votes.values()) + left < self.agree:
                break
        raise Rejected("no_majority", ", ".join(f"{count} x {key}" for key, count in votes.most_common()))


def varied(original: str, text: str) -> str:
    """The new problem of an answer. Raises Rejected where there is none."""
    label = LABEL.match(text)
    question = text[label.end() :].strip() if label else ""
    if not question:
        raise Rejected("missing_problem", 'no text after "Problem:"')
    if len(question) > LONGEST:
        raise Rejected("too_long", f"a problem of {len(question):,} characters; expected {LONGEST:,} at most")
    if plain(question) == plain(original):
        raise Rejected("copied", "the problem is the one it was made of")
    return question


def solved(question: str, ask: Ask) -> tuple[str, str]:
    """An answer and its result. Raises Rejected where it names none."""
    text = ask([user(SOLVE.format(question=question))]).strip()
    result = final_answer(text)
    if not result:
        raise Rejected("no_result", "an answer that does not say what its result is")
    return text, result


def row(index: int, question: str, answer: str, how: str) -> Row:
    messages = [user(question), {"role": "assistant", "content": answer}]
    record = {"messages": messages, "id": f"maths:{index}", "verified": how != "majority", "checked": how}
    text = plain(question) if how != "answer" else f"{plain(question)}\n{plain(answer)}"
    return Row(record, hashlib.sha256(text.encode()).digest()[:16])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def plain(text: str) -> str:
    """The same for texts that differ in spaces and capitals alone."""
    return " ".join(text.split()).casefold()
