"""Characters that are wrong, invisible or different ways of writing the same: what is mended in any text.

`visible` takes out what no reader sees: control characters and the escape sequences of terminals, marks of writing
direction (which can show code in another order than it runs: N. Boucher and R. Anderson, "Trojan Source", 2021),
spaces of no width and Unicode's invisible copies of ASCII, which hide text from people only. A joiner stays where it
joins: between letters of scripts that use it, and in emoji.

`mended` undoes what wrong decodings have done ("schÃ¶n" for "schön"), with ftfy (R. Speer, Zenodo 2019). Of ftfy only
that is used. Its other repairs are wrong for us: it makes quotation marks straight and Chinese punctuation narrow,
takes a text without "<" for HTML, and on "&amp;amp;amp;…" it does so in quadratic time. It is slow (0.5 µs a
character), hence `_SUSPECT`: whatever ftfy takes for mojibake has two neighbours out of the few hundred characters
that wrong decodings produce, or one of Â, Ã, Œ, œ or C1. A test shows that nothing else is ever mended.
"""

import re
import unicodedata

import ftfy
from ftfy.badness import MOJIBAKE_CATEGORIES

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
_ESCAPES = re.compile("\x1b\\[[0-9;]*[A-Za-z]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\u206a-\u206f\ufff9-\ufffc\ufffe\uffff]")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ZERO_WIDTH = re.compile("[\u180e\u200b\u2060-\u2065\ufeff]")
_JOINERS = re.compile("[\u200c\u200d]+")
_TAGS = re.compile("[\U000e0000-\U000e007f]+")
_FLAG = "\U0001f3f4"  # of England, Scotland and Wales: a flag, then tag characters

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
_JOINED = re.compile("[\u0600-\u1cff\u2190-\u2bff\ufb50-\ufdff\ufe0f\ufe70-\ufefc\U0001f000-\U0001faff]")

_C1 = re.compile("[\x80-\x9f]")
_NO_BREAK = re.compile("[\xa0\u2007\u202f]")
_SPECIAL = re.compile("[\x80-\xa0\xad\u2007\u202f]")

_MOJIBAKE = "".join(MOJIBAKE_CATEGORIES.values()) + "®°µ·»´ŠŸŽšžœ"
_SUSPECT = re.compile(f"[{MOJIBAKE_CATEGORIES['c1']}ÂÃŒœ]|[{_MOJIBAKE}]{{2}}")
_ENCODING_ALONE = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_LIGATURE = re.compile("[\ufb00-\ufb06]")


def visible(text: str, changed: set[str]) -> str:
    """The text with "\\n" alone as line end, and without what is invisible. Leaves what `mended` goes by."""
    if not _INVISIBLE.search(text):
        return text
    steps = (
        ("line_ends", _LINE_ENDS, "\n"),
        ("control", _ESCAPES, ""),
        ("control", _CONTROL, ""),
        ("bidi", _BIDI, ""),
        ("zero_width", _ZERO_WIDTH, ""),
    )
    for name, pattern, by in steps:
        text, count = pattern.subn(by, text)
        if count:
            changed.add(name)
    joined = _JOINERS.sub(_joiner, text)
    if joined != text:
        changed.add("zero_width")
    tagged = _TAGS.sub(_tag, joined)
    if tagged != joined:
        changed.add("control")
    return tagged


def _joiner(run: re.Match[str]) -> str:
    around = run.string[run.start() - 1 : run.start()], run.string[run.end() : run.end() + 1]
    return run[0] if all(_JOINED.match(character) for character in around) else ""


def _tag(run: re.Match[str]) -> str:
    return run[0] if run.string[max(run.start() - 1, 0)] == _FLAG else ""


def mended(text: str, changed: set[str]) -> str:
    """The text without mojibake, and without ligatures such as "ﬁ", which come from typeset pages."""
    if _SUSPECT.search(text) and (fixed := ftfy.fix_text(text, _ENCODING_ALONE)) != text:
        changed.add("mojibake")
        text = fixed
    if _LIGATURE.search(text):
        changed.add("ligatures")
        text = text.translate(_LIGATURES)
    return text


def spaced(text: str, changed: set[str]) -> str:
    """The text with plain spaces for those that do not break, and without soft hyphens and C1 controls."""
    if not _SPECIAL.search(text):
        return text
    steps = (
        ("line_ends", "\x85", "\n"),
        ("control", _C1, ""),
        ("zero_width", "\xad", ""),
        ("no_break_space", _NO_BREAK, " "),
    )
    for name, pattern, by in steps:
        text, count = re.subn(pattern, by, text)
        if count:
            changed.add(name)
    return text


def composed(text: str, changed: set[str]) -> str:
    """The text in Unicode's normal form C."""
    if unicodedata.is_normalized("NFC", text):
        return text
    changed.add("nfc")
    return unicodedata.normalize("NFC", text)
