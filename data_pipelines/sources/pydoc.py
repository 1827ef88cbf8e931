"""Questions, answers and code from the Python standard library: some megabytes of English and code that stand on
every machine with Python, so that a first run needs no download.

The source files are parsed, never imported: importing all of the standard library would open windows (`turtle`),
print poems (`this`) and fail where a part is missing. The one import is `pydoc_data.topics`, a file of plain text.
Some systems ship a smaller library (no `tkinter`, no topics): what is not there is not read, and missing topics are
logged. The conversations therefore depend on the installed Python, but are the same on every run.
"""

import ast
import inspect
import logging
import random
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from data_pipelines.conversation import Conversation, Turn

log = logging.getLogger(__name__)

SOURCE = "pydoc"
LICENCE = "PSF-2.0"
KINDS = ("function", "class", "module", "topic", "code")
SKIPPED = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
ANSWER = 600  # characters of an answer, at most
CODE = range(80, 1500)  # characters of a function that makes a document: no stubs, no giants
SECTION = 1200  # characters of a piece of a topic, at most

DOES = ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.", "Describe `{}` in Python.")
SIGNATURE = ("What is the signature of `{}`?", "How do I call `{}`?", "Which arguments does `{}` take?")
AND_SIGNATURE = ("What is its signature?", "How do I call it?", "Which arguments does it take?")
MODULE = ("What is the module `{}` for?", "What does the module `{}` do?", "Tell me about the module `{}`.")
WHICH = ("Which module does this: {}", "Name the module: {}")
DEFINES = ("What does it define?", "What is in it?", "Which names does it have?")
TOPIC = ("Explain the Python topic `{}`.", "What does Python's manual say about `{}`?")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def generate(*, limit: int | None = None, kinds: Sequence[str] = KINDS, seed: int = 0) -> Iterator[Conversation]:
    """The first `limit` conversations (None: all) in the order of modules and of their text; topics come last.

    `seed` picks the phrasings. Text that occurs twice (inherited docstrings) is taken once. Raises ValueError for
    an unknown kind, FileNotFoundError where the standard library stands only compiled or in a zip file.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds: found {unknown}; expected some of {list(KINDS)}")
    return islice(distinct(everything(tuple(kinds), seed)), limit)


def everything(kinds: tuple[str, ...], seed: int) -> Iterator[Conversation]:
    if set(kinds) - {"topic"}:
        library = Path(sysconfig.get_paths()["stdlib"])
        found = list(modules(library))
        if not found:
            raise FileNotFoundError(f"{library}: found no .py file; expected the source of the standard library")
        for name, path in found:
            if parsed := parse(path):
                yield from of_module(name, *parsed, kinds, seed)
    if "topic" in kinds:
        yield from of_topics(seed)


def distinct(conversations: Iterator[Conversation]) -> Iterator[Conversation]:
    """Without a repeated id (a name defined once per platform) and without a repeated answer or document."""
    seen: set[str] = set()
    for conversation in conversations:
        marks = {conversation.id, *(turn.text for turn in conversation.turns if turn.weight)}
        if not marks & seen:
            yield conversation
        seen |= marks


def modules(folder: Path, package: str = "") -> Iterator[tuple[str, Path]]:
    """Names and files under `folder`, sorted; not what is private, a test, or not importable by name."""
    for path in sorted(folder.iterdir()):
        if path.name == "__init__.py" and package:
            yield package, path
        elif path.stem.isidentifier() and not path.stem.startswith("_") and path.stem not in SKIPPED:
            name = f"{package}.{path.stem}" if package else path.stem
            if path.is_dir():
                yield from modules(path, name)
            elif path.suffix == ".py":
                yield name, path


def parse(path: Path) -> tuple[ast.Module, list[str]] | None:
    """The syntax tree and the lines; None, and a warning in the log, for a file that this Python cannot read."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files are not ours to report
            return ast.parse(text), text.split("\n")
    except (OSError, SyntaxError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a null byte
        log.warning("%s: skipped, because it cannot be parsed: %s", path, error)
        return None


def of_module(
    name: str, tree: ast.Module, lines: list[str], kinds: tuple[str, ...], seed: int
) -> Iterator[Conversation]:
    found = list(definitions(tree, name))
    if "module" in kinds and (doc := documentation(tree)):
        names = [name for name, node in found if node in tree.body]
        yield about_module(name, doc, names, random.Random(f"{seed}/module/{name}"))
    for full_name, node in found:
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        if kind in kinds and (doc := documentation(node)):
            yield about(kind, full_name, node, doc, random.Random(f"{seed}/{kind}/{full_name}"))
        if "code" in kinds and kind == "function" and (code := body(node, lines)):
            yield Conversation(SOURCE, f"code:{full_name}", (Turn("text", f"# {full_name}\n{code}", 1.0),))


def definitions(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public functions and classes with their full names, and what is in the classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}.{node.name}")


def about_module(name: str, doc: str, names: list[str], rng: random.Random) -> Conversation:
    first_line = doc.split("\n\n")[0].replace("\n", " ")
    if rng.random() < 0.3 and len(first_line) < 200:
        pairs = [(rng.choice(WHICH).format(first_line), f"`{name}`")]
    else:
        pairs = [(rng.choice(MODULE).format(name), doc)]
    if names:
        listed = ", ".join(f"`{name.rpartition('.')[2]}`" for name in names[:12])
        more = f", and {len(names) - 12} more" if len(names) > 12 else ""
        pairs.append((rng.choice(DEFINES), f"{listed}{more}."))
    return dialogue(f"module:{name}", pairs)


def about(kind: str, name: str, node: Definition, doc: str, rng: random.Random) -> Conversation:
    """What it does, how it is called, or the one after the other."""
    pairs = [(rng.choice(DOES).format(name), doc)]
    if not isinstance(node, ast.ClassDef):
        call = f"`{name}({ast.unparse(node.args)})`"
        form = rng.randrange(3)
        if form == 1:
            pairs.append((rng.choice(AND_SIGNATURE), call))
        elif form == 2:
            pairs = [(rng.choice(SIGNATURE).format(name), f"{call}: {doc}")]
    return dialogue(f"{kind}:{name}", pairs)


def dialogue(name: str, pairs: Sequence[tuple[str, str]]) -> Conversation:
    turns = []
    for asked, told in pairs:
        turns += [Turn("user", asked, 0.0), Turn("assistant", shorten(told, ANSWER), 1.0)]
    return Conversation(SOURCE, name, tuple(turns))


def of_topics(seed: int) -> Iterator[Conversation]:
    """The chapters of the language reference that `help()` shows: the start as an answer, the rest as documents."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        log.warning("the topics of pydoc are left out, because this Python came without them: %s", error)
        return
    for name, text in sorted(topics.items()):
        question = random.Random(f"{seed}/topic/{name}").choice(TOPIC).format(name)
        pieces = list(sections(clean(text)))
        yield dialogue(f"topic:{name}", [(question, pieces[0])])
        for number, piece in enumerate(pieces[1:], start=1):
            yield Conversation(SOURCE, f"topic:{name}#{number}", (Turn("text", piece, 1.0),))


def sections(text: str) -> Iterator[str]:
    """Paragraphs, put together up to SECTION characters."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > SECTION:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip()
    yield piece


def documentation(node: ast.Module | Definition) -> str:
    """The docstring up to its first example; empty where there is none."""
    doc = clean(ast.get_docstring(node, clean=False) or "")
    return doc.split(">>>")[0].strip()


def body(node: Definition, lines: list[str]) -> str | None:
    """The source without its docstring, which is asked about elsewhere; None if the rest is too short or too long."""
    taken = list(range(node.lineno - 1, node.end_lineno or node.lineno))
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        if doc.lineno == node.lineno:  # all on one line: nothing is left
            return None
        dropped = range(doc.lineno - 1, doc.end_lineno or doc.lineno)
        taken = [line for line in taken if line not in dropped]
    code = printable(textwrap.dedent("\n".join(lines[line].expandtabs() for line in taken)))
    return code if len(code) in CODE else None


def clean(text: str) -> str:
    """A docstring without its indentation, tabs and control characters."""
    return printable(inspect.cleandoc(text))


def printable(text: str) -> str:
    """No control characters, no space at the ends of lines, one blank line at most."""
    text = "".join(character for character in text if character == "\n" or character.isprintable())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut where a paragraph, sentence or line ends past the middle."""
    if len(text) <= limit:
        return text
    start = text[:limit]
    for end in (r"(?s).*\n\n", r"(?s).*[.:!?](?=\s)", r"(?s).*\n", r"(?s).*\s"):
        found = re.match(end, start)
        if found and found.end() >= limit // 2:
            return found.group().rstrip()
    return start
