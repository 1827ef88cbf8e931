"""Numbers as people and models write them, compared exactly: as fractions, never as floats.

`value` reads 1,234.50, -3, 3/4, 1 1/2, 75%, $5, 1.2e3, 1.2 \\times 10^3, \\frac{3}{4}, \\dfrac12 and these inside
\\boxed{…}, \\text{…} or $…$. A percent sign is a factor: 75% is 3/4, and not 75. `final_answer` finds the result that
an answer ends with, where it says so: the last \\boxed{…}, else the last line `#### …`, else after the last "answer is"
(or 答案是, 答案为). There is no guessing of the last number in the text: the scorer that Yuan 2.0 was published with
takes it, and gives credit for numbers that were no answers.

`evaluate` computes + - * / // % ** of such numbers. It walks over the syntax tree, and what is too large is an error,
so no text can make it slow.
"""

import ast
import re
from fractions import Fraction

DIGITS = 200  # of a number, at most
EXPONENT = 100
NODES = 400  # of an expression

NUMBER = re.compile(r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<decimals>\d+))?(?:[eE](?P<exponent>[+-]?\d{1,4}))?")
TIMES = re.compile(r"^(.+?)(?:\\times|\\cdot|×|\*)10\^\{?([+-]?\d{1,4})\}?$")
FRACTION = re.compile(r"^\\[dt]?frac(?:\{([^{}]*)\}|(\d))(?:\{([^{}]*)\}|(\d))$")
MIXED = re.compile(r"^(\d+)\s+(\d+)/(\d+)$|^(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}$")
ANSWER_IS = re.compile(r"(?:\banswer is\b|\banswer:|答案是|答案为)\s*[:：]?\s*([^\n]*)", re.IGNORECASE)
HASHES = re.compile(r"^#{4}[^\S\n]*(\S[^\n]*)$", re.MULTILINE)
CURRENCY = ("\\$", "$", "€", "£", "¥", "￥")
WRAPPERS = ("\\boxed", "\\text", "\\mathrm", "\\mathbf")


class NotANumber(ValueError):
    """Text that is no number, or one too large."""


def value(text: str) -> Fraction:
    """The number that `text` is, all of it. Raises NotANumber."""
    text = unwrapped(text)
    sign, text = (-1, text[1:].strip()) if text[:1] in ("-", "−", "–") else (1, text.removeprefix("+").strip())
    for mark in CURRENCY:
        text = text.removeprefix(mark).strip()
    for mark in ("\\%", "%", "％"):
        if text.endswith(mark):
            return sign * unsigned(text.removesuffix(mark).strip()) / 100
    return sign * unsigned(text)


def unwrapped(text: str) -> str:
    """Without what stands around a number: $…$, \\(…\\), \\boxed{…}, \\text{…}, a full stop, bold type."""
    before = None
    text = text[: 8 * DIGITS].replace("\\left", "").replace("\\right", "").replace("\\!", "").replace("{,}", ",")
    while text != before:
        before = text
        text = text.strip().strip("*").strip().removesuffix(".").removesuffix("。").strip()
        for start, end in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"), *((f"{w}{{", "}") for w in WRAPPERS)):
            inner = text[len(start) : -len(end)]
            if text.startswith(start) and text.endswith(end) and len(text) > len(start) and balanced(inner):
                text = inner
    return text


def balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def unsigned(text: str) -> Fraction:
    if len(text) > 4 * DIGITS:
        raise NotANumber("a number that is too long")
    if found := MIXED.match(text):
        whole, above, below = (Fraction(plain(part)) for part in found.groups() if part is not None)
        return whole + divided(above, below)
    if found := FRACTION.match(text):
        above, below = (value(part) for part in found.groups() if part is not None)
        return divided(above, below)
    if found := TIMES.match(text.replace(" ", "")):
        return plain(found[1]) * power(Fraction(10), Fraction(int(found[2])))
    if text.count("/") == 1:
        above, below = (value(part) for part in text.split("/"))
        return divided(above, below)
    return plain(text)


def plain(text: str) -> Fraction:
    """Digits with commas between thousands, a decimal point and an exponent."""
    found = NUMBER.fullmatch(text.strip())
    if not found or not (found["whole"] or found["decimals"]) or not text.isascii() or len(text) > DIGITS:
        raise NotANumber(f"found {text[:60]!r}; expected a number")
    whole, decimals = (found["whole"] or "").replace(",", ""), found["decimals"] or ""
    number = Fraction(int(whole + decimals), 10 ** len(decimals))
    return number * power(Fraction(10), Fraction(int(found["exponent"] or 0)))


def divided(above: Fraction, below: Fraction) -> Fraction:
    if not below:
        raise NotANumber("a division by zero")
    return above / below


def power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > EXPONENT:
        raise NotANumber(f"the exponent {exponent}; expected a whole number up to {EXPONENT}")
    if not base and exponent < 0:
        raise NotANumber("a division by zero")
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > 4 * DIGITS * 10:
        raise NotANumber("a number that is too large")
    return base**exponent.numerator


def final_answer(text: str) -> str | None:
    """What an answer says its result is, None if it does not say."""
    if (start := text.rfind("\\boxed{")) >= 0:
        return braced(text, start + len("\\boxed"))
    if found := HASHES.findall(text):
        return str(found[-1]).strip()
    if found := ANSWER_IS.findall(text):
        return re.split(r"[.。](?:\s|$)", str(found[-1]).strip())[0].strip() or None
    return None


def braced(text: str, start: int) -> str | None:
    """The text between the brace at `start` and the one that closes it; None if none does."""
    depth = 0
    for end in range(start, min(len(text), start + 8 * DIGITS)):
        depth += (text[end] == "{") - (text[end] == "}")
        if not depth:
            return text[start + 1 : end]
    return None


def same(given: str, expected: str) -> bool:
    """Whether two results are equal: as numbers if the expected one is a number, else letter for letter, without
    regard to spaces, capitals and what stands around."""
    try:
        wanted = value(expected)
    except NotANumber:
        return canonical(given) == canonical(expected) != ""
    try:
        return value(given) == wanted
    except NotANumber:
        return False


def canonical(text: str) -> str:
    """The same for results that are equal: of a number its lowest terms, of other text what `same` compares."""
    try:
        return str(value(text))
    except NotANumber:
        return "".join(unwrapped(text).split()).casefold()


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression. Raises NotANumber for what is none, or too large, or a division by zero."""
    if len(expression) > 4 * DIGITS:
        raise NotANumber("an expression that is too long")
    text = expression.translate({0xD7: "*", 0xF7: "/", 0x2212: "-"}).strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotANumber(f"found {expression[:60]!r}; expected an expression") from None
    if sum(1 for _ in ast.walk(tree)) > NODES:
        raise NotANumber("an expression that is too long")
    return _evaluated(tree.body, text)


def _evaluated(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        return plain(ast.get_source_segment(text, node) or "")  # its letters, for 0.1 is not a float here
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _evaluated(node.operand, text)
        return -inner if isinstance(node.op, ast.USub) else inner
    if not isinstance(node, ast.BinOp):
        raise NotANumber(f"found {type(node).__name__}; expected numbers and + - * / // % **")
    left, right = _evaluated(node.left, text), _evaluated(node.right, text)
    if max(number.numerator.bit_length() for number in (left, right)) > 40 * DIGITS:
        raise NotANumber("a number that is too large")
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return divided(left, right)
        case ast.FloorDiv():
            return Fraction(divided(left, right).__floor__())
        case ast.Mod():
            return left - right * Fraction(divided(left, right).__floor__())
        case ast.Pow():
            return power(left, right)
    raise NotANumber(f"found {type(node.op).__name__}; expected + - * / // % **")
