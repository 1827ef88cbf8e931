"""What an answer of the code route has to look like, and what is made of it.

    Task: what the function is to do, in a sentence or several.

    ```python
    def name(arguments):
        \"\"\"What it does.\"\"\"
        …
    ```

    ```python
    assert name(…) == …
    …
    ```

The first fenced block is the code, the second its tests, in the language of `unit_tests`; what follows is ignored. The
function that is asked for is the first one that the tests call. Text is parsed here, never run.
"""

import ast
import dataclasses
import hashlib
import re
import tokenize
from collections.abc import Sequence
from io import BytesIO

from data_pipelines.synthesis.unit_tests import NotATest, parse, split_tests, unparse

FENCE = "```"
PYTHON = ("", "python", "python3", "py")
LABEL = re.compile(r"^[#*\s]*(?:task|problem)\b[:*\s]*", re.IGNORECASE)
SHORTER = 3  # lines: code of fewer is short


class Rejected(Exception):
    """An answer that leaves here: a short reason such as "missing_tests", and what was found, for a person."""

    def __init__(self, reason: str, found: str):
        super().__init__(f"{reason}: {found}")
        self.reason, self.found = reason, found


class Failed(Rejected):
    """Code that does not do what it should, and may be repaired."""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """An answer in the right form. `functions`: the names that the code defines; `name`: the one that is tested."""

    task: str
    code: str
    tests: tuple[str, ...]
    functions: tuple[str, ...]
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The three parts of an answer as text."""

    task: str
    code: str
    tests: str


def read_answer(text: str) -> Answer:
    """Raises Rejected where a part is missing."""
    blocks = code_blocks(text)
    if not blocks:
        raise Rejected("missing_code", "no fenced block of Python")
    if len(blocks) < 2:
        raise Rejected("missing_tests", "no second fenced block of Python")
    task = LABEL.sub("", text[: text.index(FENCE)]).strip()
    if not task:
        raise Rejected("missing_task", "no text before the code")
    return Answer(task, blocks[0], blocks[1])


def code_blocks(text: str) -> list[str]:
    """What is fenced as Python or as nothing in particular. Line by line, so that no text is slow to read; a block
    that is not closed is none."""
    blocks: list[str] = []
    language: str | None = None
    body: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if language is None:
            if line.startswith(FENCE):
                language, body = line.removeprefix(FENCE).strip().lower(), []
        elif line.rstrip() == FENCE:
            blocks += ["\n".join(body).rstrip()] if language in PYTHON else []
            language = None
        else:
            body.append(line)
    return blocks


def read_candidate(answer: Answer, least: int, most: int) -> Candidate:
    """The candidate with `least` to `most` tests; further ones are left out. Raises Rejected for what is missing, in
    the order of the paper's filters, and Failed for code that cannot be parsed."""
    if not re.search(r"^def\s+\w+", answer.code, re.MULTILINE):
        raise Rejected("missing_name", "no function in the code")
    try:
        tree = parse(answer.code)
        without_comments(answer.code)  # which it is compared and measured by
        encoding = tokenize.detect_encoding(BytesIO(answer.code.encode()).readline)[0]
        if encoding != "utf-8":
            raise SyntaxError(f"found the encoding {encoding}; expected none, or UTF-8")
    except (SyntaxError, UnicodeError) as error:
        raise Failed("does_not_compile", f"SyntaxError: {error}") from None
    documented = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    try:
        tests = split_tests(answer.tests, documented)
    except NotATest as error:
        raise Rejected("missing_tests", str(error)) from None
    if len(tests) < least:
        raise Rejected("missing_tests", f"{len(tests)} tests; expected {least} to {most}")
    tests = tests[:most]
    name = tested(tests, documented)
    if name is None:
        raise Rejected("missing_name", "the tests call no function of the code")
    if not (documented[name] or "").strip():
        raise Rejected("missing_annotation", f"{name} has no docstring")
    return Candidate(answer.task, answer.code, tuple(tests), tuple(documented), name)


def tested(tests: Sequence[str], functions: Sequence[str] | dict[str, str | None]) -> str | None:
    """The first of `functions` that the tests call."""
    for test in tests:
        for node in ast.walk(parse(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                return node.func.id
    return None


def without_comments(code: str) -> str:
    """The code as its syntax tree has it, without docstrings: the same for code that differs in layout alone."""
    tree = parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[:1] = [] if len(node.body) > 1 or isinstance(node, ast.Module) else [ast.Pass()]
    return unparse(tree)


def fingerprint(code: str) -> bytes:
    """The same for code that differs in layout, comments and docstrings alone."""
    return hashlib.sha256(without_comments(code).encode("utf-8", "surrogatepass")).digest()[:16]


def is_short(code: str) -> bool:
    """Whether there are fewer than SHORTER lines, without comments, docstrings and empty lines."""
    return sum(bool(line.strip()) for line in without_comments(code).splitlines()) < SHORTER
