"""The small part of Python that unit tests of generated code are written in.

    assert name(1, [2, 3]) == 5                a test of one line

    def test_empty():                          a test of several
        try:
            name([])
        except ValueError:
            return_value = None
        else:
            assert False

A test calls functions of the code with plain values and asserts something about plain results. What it may consist of
is listed here, node by node: no imports (`math` is there without), no attributes but methods of plain values, no names
but the code's functions, harmless built-ins, exceptions and its own variables, no handler that catches everything.
That serves two ends: calls can be sent to another sandbox, and a test cannot reach the program that judges it. It is
not what holds generated code back; tests run in a sandbox as well.

What is run is made from the syntax tree that was checked, not from the text.
"""

import ast
import builtins
import math
from collections.abc import Collection, Iterator

LONGEST = 16_384  # characters; a syntax tree takes about a hundred times as much memory

VALUES = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
FUNCTIONS = {
    "abs", "all", "any", "bin", "chr", "divmod", "enumerate", "filter", "hex", "isinstance", "len", "map", "max",
    "min", "oct", "ord", "pow", "range", "repr", "reversed", "round", "sorted", "sum", "zip",
}  # fmt: skip  # not `type`, which makes classes
EXCEPTIONS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
}
BUILTINS = FUNCTIONS | EXCEPTIONS | {kind.__name__ for kind in VALUES}
METHODS = {name for kind in VALUES for name in dir(kind) if not name.startswith("_")} - {"format", "format_map"}
STATEMENTS = (
    ast.Assert, ast.Assign, ast.AugAssign, ast.Expr, ast.For, ast.If, ast.Pass, ast.Try, ast.ExceptHandler,
)  # fmt: skip
EXPRESSIONS = (
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.Call, ast.keyword, ast.Lambda,
    ast.arguments, ast.arg, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp, ast.comprehension, ast.IfExp, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.JoinedStr,
    ast.FormattedValue, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


class NotATest(ValueError):
    """What stands there is no test of this form; the message says why."""


def parse(text: str) -> ast.Module:
    """The syntax tree of untrusted text. Raises SyntaxError for whatever keeps it from being parsed: it may be too
    long, too deep, hold a null byte or a number of thousands of digits."""
    if len(text) > LONGEST:
        raise SyntaxError(f"{len(text):,} characters; expected {LONGEST:,} at most")
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise SyntaxError(f"{error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise SyntaxError(f"{type(error).__name__}: {error}") from None


def unparse(tree: ast.AST) -> str:
    """The text of a syntax tree. Raises SyntaxError where it has none: it is too deep, or has too long a number."""
    try:
        return ast.unparse(tree)
    except (ValueError, RecursionError) as error:
        raise SyntaxError(f"{type(error).__name__}: {error}") from None


def split_tests(text: str, functions: Collection[str]) -> list[str]:
    """The tests of a block, each as the text of a program. Raises NotATest if the block is not Python, or if one of
    its statements is neither a test of the form above nor harmless around it (`import math`, a docstring, `print(…)`,
    a call of a test)."""
    try:
        return list(_tests(parse(text), functions))
    except SyntaxError as error:
        raise NotATest(str(error)) from None


def _tests(tree: ast.Module, functions: Collection[str]) -> Iterator[str]:
    defined: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assert):
            check([node], functions)
            yield unparse(node)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test") and node.name not in functions:
            if ast.unparse(node.args) or node.decorator_list:
                raise NotATest(f"line {node.lineno}: {node.name} has arguments or decorators")
            check(node.body, functions)
            defined.add(node.name)
            plain = ast.FunctionDef("test", node.args, node.body, [], lineno=1, col_offset=0)
            yield f"{unparse(plain)}\ntest()"
        elif not _harmless(node, defined):
            raise NotATest(f"line {node.lineno}: found {type(node).__name__}; expected assert or def test…")


def _harmless(node: ast.stmt, defined: Collection[str]) -> bool:
    """Whether a statement between the tests can be left out."""
    if isinstance(node, ast.Import):
        return all(alias.name == "math" and not alias.asname for alias in node.names)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
        return node.value.func.id == "print" or node.value.func.id in defined
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def check(body: list[ast.stmt], functions: Collection[str]) -> None:
    """Raises NotATest for the first node that no test may have."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    stored |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    known = BUILTINS | set(functions) | {"math"}
    if hidden := sorted(name for name in stored if name in known or name.startswith("__")):
        raise NotATest(f"a variable is called {hidden[0]}; expected a name of its own")
    for node in nodes:
        if problem := _problem(node, known | stored):
            raise NotATest(f"line {getattr(node, 'lineno', 1)}: {problem}")


def _problem(node: ast.AST, names: Collection[str]) -> str | None:
    if not isinstance(node, STATEMENTS + EXPRESSIONS):
        return f"found {type(node).__name__}"
    if isinstance(node, ast.Name) and node.id not in names:
        return f"found the name {node.id}"
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "found except without a kind of error"
    if isinstance(node, ast.Attribute):
        of_math = isinstance(node.value, ast.Name) and node.value.id == "math"
        known = set(dir(math)) if of_math else METHODS
        if node.attr.startswith("_") or node.attr not in known or not isinstance(node.ctx, ast.Load):
            return f"found the attribute {node.attr}"
    return None
