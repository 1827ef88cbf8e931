"""HTML to Markdown, for `chat_page`: safe for whatever stands in it, and in linear time.

`canonical` reads the page with one expression in one pass, and passes on known elements alone, closed and in order,
at most MAX_DEPTH deep and MAX_TAGS in all; whatever else looks like a tag is text. So neither html.parser (quadratic
on "<!--<!--…" before Python 3.13.6), nor BeautifulSoup, nor markdownify (recursive, quadratic in a list's items)
meets what it is slow on. On the way code blocks lose the spans of their colours and get a language, and formulas
become TeX. markdownify (github.com/matthewwithanm/python-markdownify) makes Markdown of the rest.
"""

import bisect
import html
import re
from collections import defaultdict
from typing import Any

from bs4 import BeautifulSoup
from markdownify import MarkdownConverter

MAX_DEPTH, MAX_TAGS = 60, 20_000

# Possessive, so that what is no tag fails at once; no "<" within a tag, so that the next one is never run over.
_TAG = re.compile(r"""<(/?)([a-zA-Z][a-zA-Z0-9]*+)((?:\s(?:[^<>"']++|"[^"<]*+"|'[^'<]*+')*+)?+)/?>""")
_ATTRIBUTE = r"""\s{}\s*=\s*(?:"([^"]*)"|'([^']*)')"""
_ATTRIBUTES = {name: re.compile(_ATTRIBUTE.format(name)) for name in ("class", "href", "src", "alt", "start")}
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_LANGUAGE = re.compile(r"\blanguage-([\w+#.-]{1,30})")
_LABEL = re.compile(r"([\w+#.-]{0,30})\s{0,9}(?:Copy code)?")

_KEPT = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "strong", "b", "em", "i", "del", "s", "code", "a"}
_KEPT |= {"blockquote", "table", "tr", "th", "td", "div"}
_VOID = {"br", "hr"}
_SKIPPED = {"svg", "button", "script", "style", "template", "noscript", "select"}


class PageTooLarge(ValueError):
    """A page nested deeper, or of more tags, than is converted; the message says so."""


def markdown(page: str) -> str:
    """The Markdown of a page. Raises PageTooLarge."""
    soup = BeautifulSoup(canonical(_without_comments(page)), "html.parser")
    text: str = _Writer(**_OPTIONS).convert_soup(soup)
    return text.strip()


def plain(page: str) -> str:
    """The text of a page that shows line breaks and spaces as they are."""
    page = _without_comments(page)
    return _text(page, list(_TAG.finditer(page)), 0, len(page), breaks=True).strip()


def _without_comments(page: str) -> str:
    first, *others = page.split("<!--")
    return first + "".join(other.partition("-->")[2] if "-->" in other else other for other in others)


def _attribute(name: str, attributes: str) -> str:
    found = _ATTRIBUTES[name].search(attributes)
    return unescaped(found[1] if found[1] is not None else found[2]) if found else ""


def unescaped(text: str) -> str:
    """Entities with a semicolon alone, of few digits: html.unescape raises on numbers of thousands of digits."""
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def _text(page: str, tags: list[re.Match[str]], start: int, end: int, breaks: bool = False) -> str:
    """What stands in page[start:end] beside `tags`, which are those within it, and without skipped elements."""
    parts = []
    inside = ""  # the name of the skipped element
    closed = {tag[2].lower() for tag in tags if tag[1]}
    for tag in tags:
        name = tag[2].lower()
        if not inside:
            parts.append(page[start : tag.start()])
            if breaks and name == "br":
                parts.append("\n")
            if name in _SKIPPED and not tag[1] and name in closed:
                inside = name
        elif tag[1] and name == inside:
            inside = ""
        start = tag.end()
    parts.append("" if inside else page[start:end])
    return unescaped("".join(parts))


def canonical(page: str) -> str:
    """HTML of known elements alone, well formed, with few attributes and all text escaped. Raises PageTooLarge."""
    return _Canonical(page).read()


class _Canonical:
    """One reading of a page. `out`: what was written; `stack`: open elements; `items`: of each open list."""

    def __init__(self, page: str):
        self.page = page
        self.tags = list(_TAG.finditer(page))
        self.closings: dict[str, list[int]] = defaultdict(list)
        for i, tag in enumerate(self.tags):
            if tag[1]:
                self.closings[tag[2].lower()].append(i)
        self.out: list[str] = []
        self.stack: list[str] = []
        self.items: list[int] = []
        self.written = 0
        self.formulas = True  # until one is not as KaTeX has it, since looking for its end takes time

    def read(self) -> str:
        i = end = 0
        while i < len(self.tags):
            tag = self.tags[i]
            self.say(self.page[end : tag.start()])
            i = self.element(i)
            end = self.tags[i - 1].end()
        self.say(self.page[end:])
        while self.stack:
            self.close(self.stack[-1])
        return "".join(self.out)

    def say(self, text: str) -> None:
        self.out.append(html.escape(unescaped(text), quote=False))

    def element(self, i: int) -> int:
        """Writes what tag i stands for; the number of the tag to go on with."""
        tag = self.tags[i]
        name = tag[2].lower()
        if tag[1]:
            self.close(name)
            return i + 1
        if name in _SKIPPED or name == "pre":
            if (last := self.closing(name, i)) is None:
                return i + 1
            if name == "pre":
                self.block(i, last)
            return last + 1
        if name == "span":
            return self.formula(i)
        self.open(name, tag[3])
        return i + 1

    def closing(self, name: str, i: int) -> int | None:
        """The number of the first closing tag of that name after tag i."""
        closings = self.closings[name]
        at = bisect.bisect_right(closings, i)
        return closings[at] if at < len(closings) else None

    def open(self, name: str, attributes: str) -> None:
        if name in _VOID:
            self.count()
            self.out.append(f"<{name}>")
        elif name == "img":
            source = _attribute("src", attributes)
            kept = f"![{_attribute('alt', attributes)}]({source})" if source.startswith("http") else ""
            self.out.append(html.escape(kept or _attribute("alt", attributes), quote=False))
        elif name in _KEPT:
            self.count()
            self.stack.append(name)
            if len(self.stack) > MAX_DEPTH:
                raise PageTooLarge(f"elements nested more than {MAX_DEPTH} deep")
            self.out.append(f"<{name}{self.attributes(name, attributes)}>")

    def attributes(self, name: str, attributes: str) -> str:
        """A link's address, and an item's number in its list."""
        if name == "a" and (address := _attribute("href", attributes)).startswith(("http", "mailto:")):
            return f' href="{html.escape(address)}"'
        if name in ("ol", "ul"):
            start = _attribute("start", attributes)
            first = int(start) if start.isascii() and start.isdigit() and len(start) < 10 else 1
            self.items.append(first if name == "ol" else -1)
        if name == "li" and self.items and self.items[-1] >= 0:
            self.items[-1] += 1
            return f' value="{self.items[-1] - 1}"'
        return ""

    def close(self, name: str) -> None:
        """Closes the innermost element of that name, with what is open in it; nothing if there is none."""
        if name not in self.stack:
            return
        while True:
            last = self.stack.pop()
            self.out.append(f"</{last}>")
            if last in ("ol", "ul"):
                self.items.pop()
            if last == name:
                return

    def count(self) -> None:
        self.written += 1
        if self.written > MAX_TAGS:
            raise PageTooLarge(f"more than {MAX_TAGS:,} elements")

    def block(self, first: int, last: int) -> None:
        """A code block: tags from <pre> to </pre>. The language is a class of <code>, or what stands above it."""
        within = self.tags[first + 1 : last]
        start, end = self.tags[first].end(), self.tags[last].start()
        language = ""
        code = next((i for i, tag in enumerate(within) if tag[2].lower() == "code" and not tag[1]), None)
        if code is not None:
            named = _LANGUAGE.search(_attribute("class", within[code][3]))
            label = _LABEL.fullmatch(_text(self.page, within[:code], start, within[code].start()).strip())
            language = named[1] if named else label[1] if label else ""
            start, within = within[code].end(), within[code + 1 :]
            ends = [i for i, tag in enumerate(within) if tag[2].lower() == "code" and tag[1]]
            if ends:
                end, within = within[ends[-1]].start(), within[: ends[-1]]
        self.count()
        kind = f' class="{html.escape(language)}"' if language else ""
        text = html.escape(_text(self.page, within, start, end), quote=False)
        self.out.append(f"<pre{kind}>{text}</pre>")

    def formula(self, i: int) -> int:
        """A formula of KaTeX becomes its TeX; any other <span> goes, what is in it stays."""
        names = _attribute("class", self.tags[i][3]).split()
        display = "katex-display" in names or "math-display" in names
        if not self.formulas or not (display or "katex" in names):
            return i + 1
        depth = 0
        for last in range(i, len(self.tags)):
            if self.tags[last][2].lower() == "span":
                depth += -1 if self.tags[last][1] else 1
            if depth == 0:
                break
        else:
            self.formulas = False
            return i + 1
        note = next((j for j in range(i, last) if self.tags[j][2].lower() == "annotation"), None)
        if note is None:
            self.formulas = False
            return i + 1
        tex = self.page[self.tags[note].end() : self.tags[note + 1].start()].strip()
        self.say(f"$${tex}$$" if display else f"${tex}$")
        return last + 1


_OPTIONS: dict[str, Any] = {
    "heading_style": "ATX",
    "bullets": "-",
    "escape_asterisks": False,
    "escape_underscores": False,
    "autolinks": False,
}


class _Writer(MarkdownConverter):
    """markdownify, for what `canonical` writes."""

    def convert_br(self, el: Any, text: str, parent_tags: set[str]) -> str:
        return " " if "_inline" in parent_tags else "\n"

    def convert_li(self, el: Any, text: str, parent_tags: set[str]) -> str:
        bullet = f"{el['value']}. " if "value" in el.attrs else "- "
        indented = re.sub(r"\n(?=[^\n])", "\n" + " " * len(bullet), text.strip())
        return f"{bullet}{indented}\n" if indented else "\n"

    def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
        code = text.strip("\n").rstrip()
        longest = max(map(len, re.findall("`{3,}", code)), default=2)
        fence = "`" * (longest + 1)
        return f"\n\n{fence}{' '.join(el.get('class') or ())}\n{code}\n{fence}\n\n" if code else ""
