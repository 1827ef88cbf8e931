"""Numbers are read and compared exactly, and nothing is guessed."""

import contextlib
from fractions import Fraction as F

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.synthesis.exact import NotANumber, canonical, evaluate, final_answer, same, value

NUMBERS = {
    "3": F(3),
    "-3": F(-3),
    "−3": F(-3),
    "+3": F(3),
    "0.1": F(1, 10),
    ".5": F(1, 2),
    "1,234,567.50": F(123456750, 100),
    "12{,}345": F(12345),
    "3/4": F(3, 4),
    "-3/4": F(-3, 4),
    "1 1/2": F(3, 2),
    "-1 1/2": F(-3, 2),
    "75%": F(3, 4),
    "75\\%": F(3, 4),
    "12.5 %": F(1, 8),
    "$5": F(5),
    "\\$1,000": F(1000),
    "$5$": F(5),
    "€2.50": F(5, 2),
    "1.5e3": F(1500),
    "1.5 \\times 10^3": F(1500),
    "2\\cdot10^{-2}": F(1, 50),
    "\\frac{3}{4}": F(3, 4),
    "-\\dfrac{3}{4}": F(-3, 4),
    "\\frac12": F(1, 2),
    "\\frac{-1}{3}": F(-1, 3),
    "1\\frac{1}{2}": F(3, 2),
    "\\boxed{7}": F(7),
    "$\\boxed{\\frac{1}{7}}$": F(1, 7),
    "\\(42\\)": F(42),
    "\\text{42}": F(42),
    "**42**.": F(42),
    "42。": F(42),
}
NO_NUMBERS = (
    "", " ", "x", "five", "1,23", "1 234", "1,2345", "1.2.3", "3 apples", "1/0", "\\frac{1}{0}", "\\frac{1}{x}",
    "1/2/3", "0x10", "1_000", "٣", "²", "inf", "nan", "1e99999", "1e999", "9" * 300, "--", "5/", "\\boxed{1", "%",
    "1 2/0",    "10^" + "9" * 50, "2\\times10^9999", "{" * 1000,
)  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert value(text) == NUMBERS[text]
    assert canonical(text) == str(NUMBERS[text])


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number(text):
    with pytest.raises(NotANumber):
        value(text)


@given(st.text(alphabet="0123456789.,/%-+eE \\frac{}boxed$^*()×", max_size=60))
def test_no_text_breaks_the_reading(text):
    for read in (value, evaluate):
        with contextlib.suppress(NotANumber):
            assert isinstance(read(text), F)
    assert isinstance(canonical(text), str)
    final_answer(text)


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_read_as_itself(number):
    above, below = abs(number.numerator), number.denominator
    sign = "-" if number < 0 else ""
    for text in (f"{sign}{above}/{below}", f"{sign}\\frac{{{above}}}{{{below}}}", f"\\boxed{{{sign}{above}/{below}}}"):
        assert value(text) == number
    assert value(f"{sign}{above:,}") == number * below


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    (
        ("0.5", "1/2", True),
        ("50%", "0.5", True),
        ("50%", "50", False),  # another number, though people mix them up
        ("0.3333333333333333", "1/3", False),  # as floats they are equal
        ("0.1000000000000000000000000001", "0.1", False),
        ("100000000000000000000000000000001", "100000000000000000000000000000000", False),
        ("3", "3 apples", False),
        ("3 apples", "3", False),
        ("1,000", "1000", True),
        ("\\text{B}", "b", True),
        ("x + 1", "x+1", True),
        ("x+1", "x+2", False),
        ("", "", False),
    ),
)
def test_results_are_the_same_or_not(given, expected, equal):
    assert same(given, expected) == equal


@pytest.mark.parametrize(
    ("text", "found"),
    (
        ("So it is \\boxed{7}.", "7"),
        ("First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{7", None),
        ("He has 3.\n#### 72", "72"),
        ("#### 1\nmore\n####  2  ", "2"),
        ("The answer is 12.5. It was easy.", "12.5"),
        ("The answer is: $5$\nBut no, the answer is 6.", "6"),
        ("因此答案是：42。", "42"),
        ("12 + 30 = 42", None),  # the last number of a text is no answer
        ("", None),
    ),
)
def test_the_result_is_what_the_answer_says(text, found):
    assert final_answer(text) == found


def test_results_are_found_in_linear_time():
    for hostile in ("#### " * 200_000, "####" + " " * 10**6, "\\boxed{" * 100_000, "answer is " * 100_000):
        final_answer(hostile)


@pytest.mark.parametrize(
    ("text", "result"),
    (
        ("1 + 2 * 3", F(7)),
        ("(1 + 2) × 3 ÷ 4", F(9, 4)),
        ("0.1 + 0.2", F(3, 10)),
        ("-7 // 2", F(-4)),
        ("-7 % 3", F(2)),
        ("7 / 2 / 2", F(7, 4)),
        ("2 ** -3", F(1, 8)),
        ("-(3 - 5)", F(2)),
    ),
)
def test_expressions(text, result):
    assert evaluate(text) == result


@pytest.mark.parametrize(
    "text",
    (
        "1 / 0", "5 % 0", "0 ** -1", "2 ** 0.5", "9 ** 9 ** 9", "(10 ** 99) ** 99", "9" * 1000, "1 +", "x", "f(1)",
        "'a' * 9", "1 if 1 else 2", "[1]", "1 << 2", "1 < 2", "True", "1j", "__import__('os')", "(" * 300,
        "-" * 700 + "1", "1+" * 350 + "1", "0x10", "1e9999", "", "1_0", "1; 2", "10**90*" * 50 + "1",
    ),
)  # fmt: skip
def test_what_is_no_expression_or_too_large(text):
    with pytest.raises(NotANumber):
        evaluate(text)


@given(st.recursive(st.integers(0, 99), lambda x: st.tuples(st.sampled_from("+-*/"), x, x), max_leaves=12))
def test_expressions_agree_with_fractions(tree):
    def both(tree):
        if isinstance(tree, int):
            return str(tree), F(tree)
        (left, a), (right, b) = both(tree[1]), both(tree[2])
        if tree[0] == "/" and b == 0:
            return left, a
        return f"({left} {tree[0]} {right})", {"+": a + b, "-": a - b, "*": a * b, "/": b and a / b}[tree[0]]

    text, result = both(tree)
    assert evaluate(text) == result
