"""The standard library as conversations: what is in them, that nothing is imported, and what happens to bad files."""

import ast
import bisect
import inspect
import json
import logging
import shutil
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.conversation import Conversation
from data_pipelines.sources import pydoc


@pytest.fixture(scope="module")
def read() -> tuple[list[Conversation], set[str]]:
    """All conversations, and the modules that were imported for them."""
    before = set(sys.modules)
    return list(pydoc.generate()), set(sys.modules) - before


@pytest.fixture(scope="module")
def everything(read) -> dict[str, Conversation]:
    return {conversation.id: conversation for conversation in read[0]}


def kind(conversation: Conversation) -> str:
    return conversation.id.partition(":")[0]


def test_some_thousands(read, everything):
    assert len(everything) == len(read[0])
    found = Counter(map(kind, everything.values()))
    assert set(found) == set(pydoc.KINDS)
    least = {"function": 2500, "class": 500, "module": 200, "topic": 300, "code": 2500}  # without tkinter, say
    assert all(found[kind] >= count for kind, count in least.items()), found


def test_turns(everything):
    for conversation in everything.values():
        roles = [turn.role for turn in conversation.turns]
        assert roles in (["text"], ["user", "assistant"], ["user", "assistant"] * 2), conversation.id
        for turn in conversation.turns:
            assert turn.weight == (0.0 if turn.role == "user" else 1.0)
            assert turn.text.strip() == turn.text != ""
            assert len(turn.text) <= pydoc.ANSWER or turn.role == "text"
            assert all(character == "\n" or character.isprintable() for character in turn.text)
    assert sum(len(conversation.turns) == 4 for conversation in everything.values()) > 500


def test_texts_are_distinct(everything):
    texts = Counter(turn.text for c in everything.values() for turn in c.turns if turn.weight)
    assert max(texts.values()) == 1


def test_function(everything):
    *_, asked, told = everything["function:textwrap.fill"].turns
    assert "textwrap.fill" in everything["function:textwrap.fill"].turns[0].text
    documentation, signature = inspect.getdoc(textwrap.fill), f"`textwrap.fill{inspect.signature(textwrap.fill)}`"
    assert documentation.split("\n")[0] in told.text or told.text == signature
    assert asked.role == "user"


def test_signatures_are_those_of_the_running_functions(everything):
    """Parsed, not imported, and still what `inspect` says of the real thing."""
    checked = 0
    for module in (bisect, json, shutil, textwrap):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            conversation = everything.get(f"function:{module.__name__}.{name}")
            text = conversation.turns[-1].text if conversation else ""
            call, opened, rest = text.partition(f"`{module.__name__}.{name}(")
            if opened and not call:
                parameters = ast.parse(f"def f({rest.partition(')`')[0]}): pass").body[0].args
                named = [*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs]
                real = inspect.signature(function).parameters.values()
                assert [p.arg for p in named] == [
                    p.name for p in real if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                ]
                checked += 1
    assert checked > 5


def test_code_parses_and_has_lost_its_docstring(everything):
    documents = [c.turns[0].text for c in everything.values() if kind(c) == "code"]
    for document in documents[::10]:
        (function,) = ast.parse(document).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
    assert max(map(len, documents)) < 2000


def test_deterministic():
    first, second = (list(pydoc.generate(limit=200)) for _ in range(2))
    assert first == second
    other = list(pydoc.generate(limit=200, seed=1))
    assert len({c.id for c in other} & {c.id for c in first}) > 180  # other phrasings of nearly the same
    assert other != first


def test_kinds():
    assert {kind(c) for c in pydoc.generate(kinds=("module",), limit=50)} == {"module"}
    with pytest.raises(ValueError, match=r"kinds: found \['method'\]; expected some of \['function', "):
        pydoc.generate(kinds=("method",))


def test_nothing_is_imported_but_the_topics(read):
    """Of hundreds of modules that are read; `random` may bring the hash that it seeds with."""
    assert {name for name in read[1] if not name.startswith("_")} <= {"pydoc_data", "pydoc_data.topics"}
    assert "turtle" not in sys.modules


def library(monkeypatch, folder: Path, files: dict[str, str | bytes]) -> None:
    """Puts `files` in the place of the standard library."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


GOOD = '''"""What good does.\x0c"""
def f(a, *, b=3):
\t"""Adds.\n\n\tTakes a and b.\n\n\t>>> f(1)\n\t4\n\t"""
\ttotal = a + b  # a comment that stays, because it says something about the code
\treturn total, "and some more text to be long enough"
def _private():
\t"""Hidden."""
'''


def test_files_that_cannot_be_read_are_named_in_the_log(monkeypatch, tmp_path, caplog):
    bad = {"broken.py": "def f(:\n", "null.py": "x = 1\0\n", "latin.py": b"# \xe9\n", "deep.py": "(" * 500}
    library(monkeypatch, tmp_path, {**bad, "good.py": GOOD})
    with caplog.at_level(logging.WARNING):
        found = {c.id for c in pydoc.generate(kinds=("function", "module", "code", "class"))}
    assert found == {"module:good", "function:good.f", "code:good.f"}
    for name in bad:
        assert sum(f"{name}: skipped, because it cannot be parsed" in message for message in caplog.messages) == 1


def test_text_is_clean(monkeypatch, tmp_path):
    library(monkeypatch, tmp_path, {"good.py": GOOD})
    found = {c.id: c for c in pydoc.generate(kinds=("function", "module", "code"))}
    assert found["module:good"].turns[-1].text == "`f`."
    assert any("Adds.\n\nTakes a and b." in turn.text for turn in found["function:good.f"].turns)
    assert ">>>" not in found["function:good.f"].to_json()
    assert found["code:good.f"].turns[0].text == (
        "# good.f\ndef f(a, *, b=3):\n"
        "        total = a + b  # a comment that stays, because it says something about the code\n"
        '        return total, "and some more text to be long enough"'
    )


def test_what_is_read(monkeypatch, tmp_path):
    files = (
        "a.py",
        "_b.py",
        "test/c.py",
        "p/__init__.py",
        "p/d.py",
        "p/tests/e.py",
        "no-name/f.py",
        "__pycache__/g.py",
    )
    library(monkeypatch, tmp_path, {name: f'"""Module {number}."""' for number, name in enumerate(files)})
    assert [c.id for c in pydoc.generate(kinds=("module",))] == ["module:a", "module:p", "module:p.d"]


def test_no_topics_on_this_python(monkeypatch, tmp_path, caplog):
    library(monkeypatch, tmp_path, {"good.py": GOOD})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with caplog.at_level(logging.WARNING):
        assert {kind(c) for c in pydoc.generate()} == {"function", "module", "code"}
    assert "the topics of pydoc are left out" in caplog.text


def test_no_library(monkeypatch, tmp_path):
    library(monkeypatch, tmp_path, {"only.pyc": b""})
    with pytest.raises(FileNotFoundError, match=r"found no \.py file; expected the source of the standard library"):
        list(pydoc.generate())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("One sentence here. Another one", "One sentence here."),
        ("a paragraph\n\nand the next one", "a paragraph"),
        ("no end in sight at all here", "no end in sight at"),
        ("x" * 40, "x" * 20),
    ],
)
def test_shorten(text, expected):
    assert pydoc.shorten(text, 20) == expected
