"""Turns that are the HTML of a chat page, made the Markdown that was behind it; and what a page leaves in text.

Dumps of ShareGPT hold answers as the page of ChatGPT showed them:

    <div class="markdown prose w-full break-words dark:prose-invert light"><p>Use this:</p><pre><div class="bg-black …">
    <div class="flex …"><span>python</span><button …><svg …>…</svg>Copy code</button></div><div class="p-4 …"><code
    class="!whitespace-pre hljs language-python"><span class="hljs-keyword">import</span> os …

Vicuna's cleaning (fastchat/data/clean_sharegpt.py of lm-sys/FastChat) takes out the openings of <div> and <span>, so
that code keeps its indentation and underscores, has markdownify do the rest, puts the language above a code block in
place of "Copy code", and takes out the pager ("2 / 3") at the start, "Copy12 chars / 3 words" and empty code blocks.
We keep these rules, and depart from the code:

- It runs on everything. We convert a turn only if all of it is such a page (`is_answer`): it starts and ends as an
  element, and its class names are the page's own. HTML that someone asks about or an answer teaches has words around
  it or other classes, and stays. `is_fragment` is for dumps whose class names were cut off (<p>…</p><ol>…</ol>); it
  cannot tell such an answer from one that is HTML on purpose, so a source has to ask for it.
- It escapes every * and _ in prose, which the models trained on its data learned to write; we do not.
- It keeps a formula three times over (MathML, TeX and glyphs); we keep its TeX, in dollars.
- Its pager takes any two numbers, also the 3 / 4 of a sum; ours needs the first to be no larger than the second, and
  a line or a word after it.
"""

import re

from data_pipelines.stages import code_spans, html_markdown

_ANSWER = re.compile(r'<div\b[^<>]*\bclass="[^"<>]*markdown prose')
_QUESTION = re.compile(r'<div\b[^<>]*\bclass="[^"<>]*whitespace-pre-wrap')
_HEAD = 2000  # characters in which a page shows what it is

_PROSE = "p|ol|ul|h[1-6]|pre|blockquote|table"
_FRAGMENT = re.compile(rf"<(?:{_PROSE}|div)\b[^<>]*>", re.IGNORECASE)
_FRAGMENT_END = re.compile(rf"</(?:{_PROSE}|div)>\Z", re.IGNORECASE)
_PARAGRAPHS = re.compile(r"<p>|<li>", re.IGNORECASE)
_DOCUMENT = re.compile(
    r"<(?:!doctype|html|head|body|form|input|script|style|nav|section|header|footer)\b", re.IGNORECASE
)


def is_answer(text: str) -> bool:
    """Whether all of the text is HTML of an answer on the page. Costs nothing for text that does not start so."""
    return _is_element(text) and bool(_ANSWER.search(text[:_HEAD]))


def is_question(text: str) -> bool:
    """Whether all of the text is HTML as the page has a question: plain text in an element that keeps its lines."""
    return _is_element(text) and not is_answer(text) and bool(_QUESTION.search(text[:_HEAD]))


def _is_element(text: str) -> bool:
    return text[:64].lstrip().startswith("<div") and text[-64:].rstrip().endswith("</div>")


def is_fragment(text: str) -> bool:
    """Whether all of the text is HTML of prose (paragraphs or lists), of whatever origin."""
    if not text[:64].lstrip().startswith("<"):
        return False
    whole = text.strip()
    framed = _FRAGMENT.match(whole) and _FRAGMENT_END.search(whole, max(0, len(whole) - 16))
    return bool(framed and _PARAGRAPHS.search(whole) and not _DOCUMENT.search(whole))


def to_markdown(page: str) -> str:
    """The Markdown of an answer, a question or a fragment. Raises html_markdown.PageTooLarge.

    Never again taken for a page: HTML that the page shows as text may be one itself, and then gets a backslash.
    """
    text = html_markdown.plain(page) if is_question(page) else html_markdown.markdown(page)
    return f"\\{text}" if is_answer(text) or is_question(text) or is_fragment(text) else text


# --- what a page leaves in text ---

_PAGER = re.compile(r"\s*(\d{1,3}) / (\d{1,3})(?=\n|[^\W\d_])\s*")
_COUNTER = re.compile(r"\n?Copy\d{1,7} chars / \d{1,7} words\n?|\n\d{1,7} chars / \d{1,7} words\s{1,4}Copy(?=\n|\Z)")
_BUTTON = re.compile(r"[ \t]*([\w+#.-]{0,30}?)[ \t]?(?:Copy code)+(?=\S|\Z)(.*)", re.DOTALL)
_BUTTON_LINE = re.compile(r"^Copy code[ \t]*$", re.MULTILINE)


def without_leftovers(text: str, answer: bool, changed: set[str]) -> str:
    """The text without pager, counters and, in an answer and in code blocks, "Copy code"."""
    pager = _PAGER.match(text)
    if pager and 1 <= int(pager[1]) <= int(pager[2]) and pager.end() < len(text):
        changed.add("page_counter")
        text = text[pager.end() :]
    if " chars / " in text:
        text, count = _COUNTER.subn("\n", text)
        if count:
            changed.add("page_counter")
    if "Copy code" not in text:
        return text
    kept = ""
    for piece in code_spans.pieces(text):
        if piece.kind == "fence":
            kept += _without_button(piece.text)
        else:
            kept += _BUTTON_LINE.sub("", piece.text) if answer and piece.kind == "prose" else piece.text
    if kept != text:
        changed.add("copy_code")
    return kept


def _without_button(block: str) -> str:
    """A fenced block whose first line, or the end of its fence line, is "Copy code": "pythonCopy code" and so on.

    What comes after the button on its line is code; a block of nothing else goes.
    """
    opening = code_spans.FENCE.match(block)
    if opening is None:
        return block
    info, body = opening[2].strip(), block[opening.end() :].removeprefix("\n")
    if (button := _BUTTON.fullmatch(info)) is not None:
        language, first, rest = button[1], button[2], body
    else:
        line, _, rest = body.lstrip("\n").partition("\n")
        if (button := _BUTTON.fullmatch(line)) is None:
            return block
        language, first = button[1] or info, button[2]
    if not (first + rest).strip(" \t\n>`~"):
        return ""
    return "\n".join([block[: opening.start(2)] + language, *([first] if first else []), rest])
