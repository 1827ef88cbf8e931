"""What an answer of the code route has to look like, and which tests are tests."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.synthesis import candidate as module
from data_pipelines.synthesis.candidate import Failed, Rejected, fingerprint, is_short, read_answer, read_candidate
from data_pipelines.synthesis.unit_tests import LONGEST, NotATest, parse, split_tests

CODE = 'def twice(x):\n    """Twice x."""\n    y = x\n    return y + x'
TESTS = "assert twice(1) == 2\nassert twice('a') == 'aa'\nassert twice([]) == []"


def answer(task="Task: double it.", code=CODE, tests=TESTS, between="\n\n"):
    return f"{task}\n\n```python\n{code}\n```{between}```python\n{tests}\n```\nHope this helps!"


def read(text, least=3, most=5):
    return read_candidate(read_answer(text), least, most)


def test_an_answer_in_the_right_form():
    found = read(answer(task="**Task:** double\nit."))
    assert (found.task, found.code, found.name, found.functions) == ("double\nit.", CODE, "twice", ("twice",))
    assert found.tests == tuple(TESTS.split("\n"))
    assert read(answer(tests="\n".join(f"assert twice({i}) == {2 * i}" for i in range(9)))).tests[-1].endswith("== 8")
    windows = answer().replace("\n", "\r\n")
    assert read(windows) == read(answer())
    helper = "def half(x):\n    return x / 2\n\n" + CODE
    assert read(answer(code=helper)).name == "twice"


@pytest.mark.parametrize(
    ("text", "reason"),
    (
        (answer(task=""), "missing_task"),
        (answer(task="Task:"), "missing_task"),
        ("Task: nothing more", "missing_code"),
        ("Task: x\n```java\nint x;\n```", "missing_code"),
        ("Task: x\n```python\nnot closed", "missing_code"),
        (f"Task: x\n```python\n{CODE}\n```", "missing_tests"),
        (answer(tests=""), "missing_tests"),
        (answer(tests="assert twice(1) == 2"), "missing_tests"),
        (answer(tests="assert twice(1) == "), "missing_tests"),
        (answer(tests="import os\n" + TESTS), "missing_tests"),
        (answer(tests=TESTS.replace("twice", "thrice")), "missing_tests"),
        (answer(tests="assert True\n" * 3), "missing_name"),
        (answer(code="twice = lambda x: 2 * x"), "missing_name"),
        (answer(code="if x: ("), "missing_name"),
        (answer(code=CODE.replace('"""Twice x."""', "pass")), "missing_annotation"),
        (answer(code=CODE.replace("Twice x.", " ")), "missing_annotation"),
        (answer(code=CODE + " +"), "does_not_compile"),
        (answer(code="# coding: utf-16\n" + CODE), "does_not_compile"),
        (answer(code="# coding: nonsense\n" + CODE), "does_not_compile"),
        (answer(code=CODE + "\x00"), "does_not_compile"),
        (answer(code=CODE + f"\nx = {'9' * 5000}"), "does_not_compile"),
        (answer(code=CODE + f"\nx = {'(' * 5000}"), "does_not_compile"),
        (answer(code=CODE + f"\nx = {'-' * 9000}1"), "does_not_compile"),
        (answer(code=CODE + f"\nx = {'1+' * 5000}1"), "does_not_compile"),
        (answer(code=CODE + f"\nx = y{'.z' * 5000}"), "does_not_compile"),
        (answer(code=CODE + f"\nx = {'[' * 150}{']' * 150}\n" + "# " * LONGEST), "does_not_compile"),
        (answer(code=CODE + f"\nx = 0x{'f' * 9000}"), "does_not_compile"),  # which has no decimal form
    ),
)
def test_an_answer_in_another_form(text, reason):
    with pytest.raises(Rejected) as error:
        read(text)
    assert error.value.reason == reason
    assert isinstance(error.value, Failed) == (reason == "does_not_compile")


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")  # about the text that is made up
@given(st.text(alphabet="`python \ndefassert_()=:\"'#1[]\\\x00\ud800é", max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_reading(text):
    for whole in (text, answer(code=text), answer(tests=text), answer(code=CODE + "\n" + text)):
        try:
            found = read(whole, 1)
        except Rejected:
            continue
        assert found.name in found.functions and found.tests


def test_it_is_read_in_linear_time():
    for hostile in ("```a\n" * 200_000, "```\n" * 200_000, "#" * 10**6, " " * 10**6, "Task:" * 200_000):
        with pytest.raises(Rejected):
            read_answer(hostile)


GOOD = (
    "assert f(1) == 2",
    "assert not f([1, {2: (3,)}], key='x'), 'message'",
    "assert abs(f(2) - 1.414) < 1e-3 and math.isclose(f(3), math.sqrt(3))",
    "assert sorted(f(x) for x in range(3)) == [i ** 2 for i in (1, 2, 3)]",
    "assert all(isinstance(f(v), str) for v in 'abc')",
    "assert f('a').upper().split(',')[0:1] == ['A']",
    "assert f(*[1, 2], **{'a': 1}) is None",
    "assert f'{f(1)}' == '2'",
    "assert max([1, 2], key=lambda v: -v) == f(1)",
    "def test_it():\n    x = [3]\n    f(x)\n    x[0] += 1\n    assert x == [4]",
    "def test_it():\n    for a, b in [(1, 2)]:\n        assert f(a) == b\n    if f(0):\n        pass",
    "def test_error():\n    try: f(-1)\n    except (ValueError, KeyError) as e: assert str(e)\n    else: assert False",
    "import math\n'some words'\nassert f(1)\nprint('done')",
    "def test_a() -> None:\n    '''Says what.'''\n    assert f(1)\n\ntest_a()",
)  # fmt: skip
BAD = {
    "__import__('os')._exit(0)": "Expr",
    "assert __import__('os')": "the name __import__",
    "import os\nassert f(1)": "Import",
    "from math import sqrt\nassert f(1)": "ImportFrom",
    "def test_a():\n    import math\n    assert f(1)": "Import",
    "assert open('x')": "the name open",
    "assert eval('1')": "the name eval",
    "assert f.__globals__": "the attribute __globals__",
    "assert ().__class__": "the attribute __class__",
    "assert '{0.__class__}'.format(1)": "the attribute format",
    "assert f(1).value": "the attribute value",
    "assert (x for x in [1]).gi_frame": "the attribute gi_frame",
    "assert math.__loader__": "the attribute __loader__",
    "assert type(1)": "the name type",
    "assert getattr(f, 'x')": "the name getattr",
    "assert g(1)": "the name g",
    "assert (x := f(1))": "NamedExpr",
    "def test_a():\n    f = lambda x: 2\n    assert f(1) == 2": "a variable is called f",
    "def test_a():\n    len = 2\n    assert f(1)": "a variable is called len",
    "def test_a():\n    __builtins__ = 1": "a variable is called __builtins__",
    "def test_a():\n    try:\n        f(1)\n    except:\n        pass": "except without",
    "def test_a():\n    try:\n        f(1)\n    except BaseException:\n        pass": "the name BaseException",
    "def test_a():\n    return 1": "Return",
    "def test_a():\n    while True:\n        pass": "While",
    "def test_a():\n    global x\n    x = 1": "Global",
    "def test_a():\n    math.sqrt = 1": "the attribute sqrt",
    "def test_a():\n    class A:\n        pass": "ClassDef",
    "def test_a():\n    raise SystemExit": "Raise",
    "def test_a(x):\n    assert f(x)": "arguments or decorators",
    "@f\ndef test_a():\n    assert f(1)": "arguments or decorators",
    "def helper():\n    return 1": "FunctionDef",
    "async def test_a():\n    assert f(1)": "AsyncFunctionDef",
    "x = 1\nassert f(x) == 1": "Assign",
    "assert (yield)": "Yield",
    "class TestF:\n    pass": "ClassDef",
    "assert f(1) ==": "invalid syntax",
}


@pytest.mark.parametrize("text", GOOD)
def test_tests_of_the_small_language(text):
    (only,) = split_tests(text, ["f"])
    ast.parse(only)


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_test(text):
    with pytest.raises(NotATest) as error:
        split_tests(text, ["f"])
    assert BAD[text] in str(error.value)


def test_several_tests_are_told_apart():
    found = split_tests("assert f(1)\n\ndef test_b():\n    # why\n    assert f(2)\n\nassert f(3)", ["f"])
    assert found == ["assert f(1)", "def test():\n    assert f(2)\ntest()", "assert f(3)"]


def test_what_counts_as_the_same_code():
    same = [
        CODE,
        CODE.replace("    ", "  "),
        CODE.replace('"""Twice x."""', "'''Something\n    else.'''"),
        CODE.replace("y = x", "y = (x)  # comment\n\n"),
    ]
    assert len(set(map(fingerprint, same))) == 1
    assert fingerprint(CODE) != fingerprint(CODE.replace("y + x", "x + y"))
    assert fingerprint('def f():\n    """Doc."""') == fingerprint("def f():\n    'Other.'")


@pytest.mark.parametrize(
    ("code", "short"),
    (
        ("def f(x):\n    return x", True),
        ('def f(x):\n    """A\n    long\n    text."""\n    # and\n    # comments\n\n    return x', True),
        ("def f(x):\n    x += 1\n    return x", False),
        ("import math\ndef f(x): return math.sqrt(x)", False),
    ),
)
def test_short_code(code, short):
    assert is_short(code) == short


def test_parsing_names_what_is_wrong():
    for text, message in (("x = 1 +", "line 1"), ("\0", "null bytes"), ("x" * 20_000, "expected 16,384 at most")):
        with pytest.raises(SyntaxError, match=message):
            parse(text)
    assert module.LABEL.sub("", "### Task 1: add") == "1: add"
