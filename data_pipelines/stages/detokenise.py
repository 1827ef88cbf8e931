"""Text that other people's preparation took apart, put together again: for the sources that need it.

`detokenised` is for text that a tokeniser pulled apart ("hello , world . It 's 5 % ( or so ) ."), such as the
questions and human answers of HC3 (Penn Treebank style; the answers of ChatGPT there are not, which a model would
take for the difference between people and machines). The rules undo what is unambiguous: marks that belong to the
word before or after them, English clitics, brackets, and straight quotation marks where a line has an even number of
them, all apart. A hyphen between spaces may have been a dash and stays, and so do ":)" and " .5".

`unescaped` is for line breaks written as a backslash and an n, as in the answers of ChatGPT in copies of HC3.
"""

import re

_BEFORE = re.compile(r"(?<=\S) (?=[,;:!?.]{1,6}(?:[ \n]|\Z))")
_PERCENT = re.compile(r"(?<=\d) (?=[%°](?:[ \n.,;:!?)]|\Z))")
_CLITIC = re.compile(r"(?<=\w) (?=(?:n['’]t|['’](?:s|re|ve|ll|d|m))\b)", re.IGNORECASE)
_AFTER = re.compile(r"(?<=[(\[]) (?! )|(?<=[$£€]) (?=\d)")
_CLOSING = re.compile(r"(?<=[^\s(\[]) (?=[)\]](?:[ \n.,;:!?'\")\]]|\Z))")
_LINK = re.compile(r"(?<=\]) \((?=URL_\d)")
_QUOTE = re.compile(r'(?<!\S)"(?!\S)')
_BREAK_AND_WORD = re.compile(r"\\n[a-z]")


def detokenised(text: str) -> str:
    """The text put together; the same text where nothing was pulled apart. Time is linear."""
    if '" ' in text:
        text = "\n".join(map(_quoted, text.split("\n")))
    for pattern in (_BEFORE, _PERCENT, _CLITIC, _AFTER, _CLOSING):
        text = pattern.sub("", text)
    return _LINK.sub("(", text)


def _quoted(line: str) -> str:
    parts = _QUOTE.split(line)
    if len(parts) % 2 == 0 or len(parts) - 1 != line.count('"'):
        return line
    return '"'.join(part.strip(" ") if i % 2 else part for i, part in enumerate(parts))


def unescaped(text: str) -> str:
    r"""The text with line breaks for every "\n" spelled out, if it has no real ones and none of them may be the start
    of a word, as in "\neq"."""
    if "\\n" not in text or "\n" in text or _BREAK_AND_WORD.search(text):
        return text
    return text.replace("\\n", "\n")
