"""Topic words -> a prompt -> a task, a function and its tests -> what passes them.

Prompt i is a function of (seed, i): two words to pre-train on, three to five to fine-tune on, drawn without
replacement. An answer goes through the paper's filters in the paper's order:

    1  task, code, name, annotation (docstring) or tests are missing     missing_…
    2  it does not compile                                               does_not_compile
    3  it does not pass its tests                                        see `judge`; vacuous_tests
    4  what fell by 2 or 3 goes back, with code and error, `repair_rounds` times
    5  of code of one or two lines, a share is dropped                   short

Where we depart: all tests have to pass (`require="any"` is the paper's rule, one of them); tests that test nothing do
not count; and a repair gives new code, not new tests, for tests could be made to fit any code. Yuan's further steps for
fine-tuning (self-instruct and evol-instruct rounds over given tasks) are not here.

Without `execute` nothing is run: code is kept if it can be parsed, and its rows say that they are not verified.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.synthesis.candidate import (
    Answer,
    Candidate,
    Failed,
    Rejected,
    code_blocks,
    fingerprint,
    is_short,
    read_answer,
    read_candidate,
)
from data_pipelines.synthesis.endpoint import Message
from data_pipelines.synthesis.judge import judge
from data_pipelines.synthesis.sandbox import Sandbox

Ask = Callable[[Sequence[Message]], str]

PROMPT = """\
Write one programming task and its solution in Python. The task combines these topics: {topics}.

Answer in exactly this form, with nothing between or after its parts:

Task: what the function is to do, with its arguments, its result and its errors, so that someone who has not seen the \
code can write it.

```python
def name_of_the_function(argument):
    \"\"\"What it does, what it takes, what it returns.\"\"\"
    ...
```

```python
assert name_of_the_function(...) == ...
```

Rules:
- The code is complete, uses the standard library only, and takes and returns plain data: None, numbers, text, lists, \
tuples, dicts and sets. It starts no process or thread, reads no input and uses no network.
- The second block holds {least} to {most} unit tests that differ in what they test: `assert` statements, or functions \
`def test_...():` without arguments. They call the function with literal values and compare its results; an expected \
error is tested with try, except and the name of the error. They import nothing.
"""
REPAIR = """\
That code fails:

{error}

Write the code again so that the tests pass, all of it, in one block ```python. Leave the tests as they are and do not \
repeat them.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What is kept: the record, what its duplicates share, and whether it took a repair."""

    record: Mapping[str, Any]
    key: bytes
    repaired: bool = False


class CodeRoute:
    """The work on one prompt; a function of its number and of the answers. May be used by several threads at once."""

    def __init__(self, settings: Mapping[str, Any], topics: Sequence[str], sandbox: Sandbox | None):
        """`settings`: the configuration. Without a `sandbox` nothing is run. Raises InputError for what does not
        fit."""
        self.settings, self.topics, self.sandbox = settings, topics, sandbox
        self.seed, self.repair_rounds = settings["seed"], settings["repair_rounds"]
        (self.least_words, self.most_words), (self.least, self.most) = (pair(settings, k) for k in ("words", "tests"))
        if settings["require"] not in ("all", "any"):
            raise InputError(f"config.require: found {settings['require']!r}; expected all or any")
        if not 1 <= self.least_words <= self.most_words <= len(topics):
            found = f"{self.least_words} to {self.most_words} of {len(topics)} topics"
            raise InputError(f"config.words: found {found}; expected some, and not more than there are")
        if not 1 <= self.least <= self.most:
            raise InputError(f"config.tests: found {self.least} to {self.most}; expected one or more")

    def chosen(self, index: int) -> list[str]:
        """The topic words of a prompt."""
        rng = random.Random(f"{self.seed}/topics/{index}")
        return rng.sample(self.topics, rng.randint(self.least_words, self.most_words))

    def prompt(self, index: int) -> str:
        return PROMPT.format(topics=", ".join(self.chosen(index)), least=self.least, most=self.most)

    def work(self, index: int, ask: Ask) -> Row:
        """Asks, checks and repairs. Raises Rejected for what is not kept, and what `ask` raises."""
        messages: list[Message] = [{"role": "user", "content": self.prompt(index)}]
        text = ask(messages)
        answer = read_answer(text)
        for left in range(self.repair_rounds, -1, -1):
            try:
                candidate, tests = self.checked(answer)
                break
            except Failed as failed:
                if not left:
                    raise
                messages += [{"role": "assistant", "content": text}]
                messages += [{"role": "user", "content": REPAIR.format(error=failed.found)}]
                text = ask(messages)
                answer = dataclasses.replace(answer, code=repaired(text))
        if (
            is_short(candidate.code)
            and random.Random(f"{self.seed}/short/{index}").random() < self.settings["drop_short"]
        ):
            raise Rejected("short", candidate.code)
        return self.row(index, candidate, tests, len(messages) > 1)

    def checked(self, answer: Answer) -> tuple[Candidate, Sequence[str]]:
        """The candidate, and the tests that it passes. Raises Failed for what a repair may mend, else Rejected."""
        candidate = read_candidate(answer, self.least, self.most)
        if self.sandbox is None:
            return candidate, ()
        verdict = judge(self.sandbox, candidate.code, candidate.tests, candidate.functions)
        if verdict.load:
            raise Failed(verdict.load.reason, verdict.load.found)
        if verdict.passing_stubs or len(verdict.empty) == len(candidate.tests):
            found = f"pass whatever happens: {verdict.passing_stubs or 'all'}"
            raise Rejected("vacuous_tests", found)
        if verdict.failure and (self.settings["require"] == "all" or not verdict.passed):
            raise Failed(verdict.failure.reason, verdict.failure.found)
        passed = [candidate.tests[i] for i in verdict.passed]
        if self.settings["require"] == "all" and len(passed) < self.least:
            raise Rejected("vacuous_tests", f"{len(passed)} tests test something; expected {self.least}")
        return candidate, passed

    def row(self, index: int, candidate: Candidate, tests: Sequence[str], repaired: bool) -> Row:
        messages = [
            {"role": "user", "content": candidate.task},
            {"role": "assistant", "content": f"```python\n{candidate.code}\n```"},
        ]
        record = {
            "messages": messages,
            "id": f"code:{index}",
            "verified": self.sandbox is not None,
            "checked": "parsed" if self.sandbox is None else "tests",
            "topics": self.chosen(index),
            "tests": list(tests or candidate.tests),
        }
        return Row(record, fingerprint(candidate.code), repaired)


def pair(settings: Mapping[str, Any], key: str) -> tuple[int, int]:
    try:
        least, most = map(int, settings[key])
    except (TypeError, ValueError):
        raise InputError(f"config.{key}: found {settings[key]!r}; expected two numbers, such as (3, 5)") from None
    return least, most


def repaired(text: str) -> str:
    """The code of a repair. Raises Rejected if there is none."""
    blocks = code_blocks(text)
    if not blocks:
        raise Rejected("missing_code", "no fenced block of Python in the repair")
    return blocks[0]
