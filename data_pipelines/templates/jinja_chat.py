"""Renders Hugging Face chat templates: jinja2 in a sandbox, with the assistant's spans and inert content.

A template is somebody else's program. It runs in jinja2's ImmutableSandboxedEnvironment without a loader (no files,
no imports), and its output is bounded, as are the products and powers it may form. A loop that burns time without
writing anything is not stopped.

Marks. Three private-use characters carry what plain text cannot say: _INERT breaks up special tokens that occur in
the content of a turn, in a call or in the description of a tool, so that only those the template writes are taken for
real; _OPEN and _CLOSE surround what `{% generation %}` produces. Content that happens to hold a mark has it swapped for
an unused character on the way in and swapped back on the way out; so has a special token of a single character, which
no mark can break up.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from data_pipelines.errors import InputError

_MARKS = _INERT, _OPEN, _CLOSE = "\ue000", "\ue001", "\ue002"
_NOT_ASCII = re.compile("[^\x00-\x7f\ue000-\ue002\U000f0000-\U000ffffd]")  # but for marks and their stand-ins
# Keys that belong to the format of messages, calls and tools; no stranger chose them, and templates ask for them.
_KEYS = {
    "role", "content", "name", "tool_calls", "tool_call_id", "helpful", "id", "type", "function", "arguments",
    "description", "parameters", "properties", "required",
}  # fmt: skip
_MAX_RESULT = 1 << 20  # items or bits that one * or ** of a template may produce
# What a template may raise: its own errors, and those of the operations it calls for.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplateError(InputError):
    """A chat template that is not valid, not allowed, or does not fit the conversation."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: marks what is inside as written by the assistant."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
        return nodes.Scope([opening, *body, closing]).set_lineno(line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _result_size(operator, left, right) > _MAX_RESULT:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Items or bits that `left operator right` takes; 0 where that cannot be much."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            return len(sequence) * count
    return 0


class Rendered(NamedTuple):
    """Text of a rendered conversation, still with inert marks, and the (start, end) of each generation block."""

    text: str
    spans: list[tuple[int, int]]
    swapped: Mapping[int, str]

    @property
    def as_it_is(self) -> bool:
        """Whether no part of it has to be cleaned."""
        return not self.swapped and _INERT not in self.text

    def clean(self, start: int, end: int) -> str:
        """The real text of a part: inert marks taken out, swapped characters back in place."""
        text = self.text[start:end].replace(_INERT, "")
        return text.translate(self.swapped) if self.swapped else text  # translate is slow even with nothing to do

    def position(self, start: int, at: int) -> int:
        """Where character `at` of the text stands in `clean(start, …)`."""
        return at - start - self.text.count(_INERT, start, at)


class ChatRenderer:
    """A compiled chat template. `has_generation` tells whether it marks the assistant's text, `takes_tools` whether it
    asks for the list of tools.

    `now` is what strftime_now writes; without it there is no such function, which templates may ask with `is defined`.
    """

    def __init__(self, source: str, special_tokens: Iterable[str], *, now: datetime.datetime | None = None):
        if any(mark in source for mark in _MARKS):
            raise ChatTemplateError("the chat template holds a character of U+E000..E002, which are used as marks")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        del environment.globals["lipsum"]  # text of any length
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        if now is not None:
            environment.globals["strftime_now"] = now.strftime
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"the chat template does not compile: line {error.lineno}: {error}") from error
        self.has_generation = any(data.data == _OPEN for data in tree.find_all(nodes.TemplateData))
        self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(tree)
        pieces = sorted(special_tokens)
        self._starts = _first_characters(pieces) if pieces else None
        self._prefixes = {piece[:n] for piece in pieces for n in range(1, len(piece))}
        self._suffixes = {piece[n:] for piece in pieces for n in range(1, len(piece))}
        self._longest = max(map(len, self._prefixes), default=0)
        self._single = tuple(piece for piece in pieces if len(piece) == 1)
        self._name = functools.lru_cache(maxsize=256)(self._inert)  # of keys, which repeat
        self._firsts, self._lasts = ({piece[at] for piece in pieces} for at in (0, -1))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, **variables: Any
    ) -> Rendered:
        """Renders messages ({"role", "content", …}); raises ChatTemplateError for whatever goes wrong in it.

        Everything in them but the roles is taken for text of strangers, the names of keys included, as far as these are
        not those of the format.
        """
        given = "".join(_strings(messages, _strings(tools, [])))
        swap = _unused(given, (*_MARKS, *self._single))
        changed = (lambda text: self._inert(text.translate(swap))) if swap else self._inert
        names = changed if swap else self._name
        inert = [_message(message, changed, names) for message in messages]
        try:
            offered = None if tools is None else _changed(list(tools), changed, names)
            parts = self._template.generate(messages=inert, tools=offered, documents=None, **variables)
            marked = _joined(parts, (1 << 20) + 10 * len(given))
        except jinja2.exceptions.SecurityError as error:
            raise ChatTemplateError(f"the chat template tries something that is not allowed: {error}") from error
        except _FAILURES as error:
            raise ChatTemplateError(f"the chat template fails: {error}") from error
        text, spans = _take_out_spans(marked)
        return Rendered(text, spans, {ord(new): chr(old) for old, new in swap.items()})

    def _inert(self, content: str) -> str:
        """Puts a mark after the first character of every special token in the content, after one that only begins at
        its end and that the next text could complete, and before one that its beginning could complete."""
        if self._starts is None:
            return content
        tail = content.rstrip()
        if not self._firsts.isdisjoint(tail[-self._longest :]):  # which is rare, and soon seen
            for size in range(1, min(self._longest, len(tail)) + 1):
                if tail[-size:] in self._prefixes:
                    at = len(tail) - size + 1
                    content = content[:at] + _INERT + content[at:]
        head = content.lstrip()
        if not self._lasts.isdisjoint(head[: self._longest]) and any(
            head[:size] in self._suffixes for size in range(1, self._longest + 1)
        ):
            at = len(content) - len(head)
            content = content[:at] + _INERT + head
        return self._starts.sub(_marked, content) if self._starts.search(content) else content


def _marked(match: re.Match[str]) -> str:
    return match[0] + _INERT


def _first_characters(pieces: Sequence[str]) -> re.Pattern[str]:
    """Finds the first character of any piece where the rest of it follows; with the characters outside the look ahead
    a text is searched for them, and 256 pieces are tried only where one of them stands."""
    rests: dict[str, list[str]] = {}
    for piece in pieces:
        rests.setdefault(piece[0], []).append(re.escape(piece[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()))


def _strings(value: Any, found: list[str]) -> list[str]:
    """`found` with every text in a value of JSON, keys included."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        found += value
        for each in value.values():
            _strings(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            _strings(each, found)
    return found


def _message(message: Mapping[str, Any], change: Callable[[str], str], name: Callable[[str], str]) -> dict[str, Any]:
    """A message with every text in it changed but the role, which is not a stranger's."""
    return {**_changed(message, change, name), "role": message["role"]}


def _changed(value: Any, change: Callable[[str], str], name: Callable[[str], str]) -> Any:
    """The value with every text in it changed, and the names of keys by `name`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key if key in _KEYS else name(key): _changed(each, change, name) for key, each in value.items()}
    return [_changed(each, change, name) for each in value] if isinstance(value, list | tuple) else value


def _joined(parts: Iterable[str], limit: int) -> str:
    found = []
    for part in parts:
        limit -= len(part)
        if limit < 0:
            raise InputError("it writes more than 1 MiB and ten times its input")
        found.append(part)
    return "".join(found)


def _unused(given: str, marks: Sequence[str]) -> dict[int, str]:
    """{mark: stand-in} for a text that holds a mark; stand-ins are private-use characters that it does not hold."""
    if not any(mark in given for mark in marks):
        return {}
    used = set(given)
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    return {ord(mark): next(free) for mark in marks}


def _take_out_spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    spans: list[tuple[int, int]] = []
    before, *opened = marked.split(_OPEN)
    parts = before.split(_CLOSE)
    at = sum(map(len, parts))
    for block in opened:
        start = at
        for number, part in enumerate(block.split(_CLOSE)):
            if number:
                spans.append((start, at))
            parts.append(part)
            at += len(part)
    return "".join(parts), spans


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """As in Hugging Face: plain JSON, where jinja2's own filter would escape <, >, & and quotes for HTML."""
    ascii_only = options.pop("ensure_ascii", False)
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ascii_only else text


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
