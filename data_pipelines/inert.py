"""Text of the data, as it may be shown to a person: without what gives orders to a terminal or deceives a reader."""

from rich.text import Text

# Control characters as their symbols; what turns the direction of writing around, letters that nobody sees (tags,
# byte order marks) and halves of surrogate pairs, which are no text, as the replacement character. Line breaks and
# tabs stay.
_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_DIRECTIONS = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNSEEN = (*range(0x80, 0xA0), 0xFEFF, 0xFFFE, 0xFFFF, *range(0xE0000, 0xE0080))
_SURROGATES = range(0xD800, 0xE000)
INERT = _SYMBOLS | dict.fromkeys((*_DIRECTIONS, *_UNSEEN, *_SURROGATES), 0xFFFD)


def inert(text: str) -> str:
    return text.translate(INERT)


def plain(text: str, style: str = "") -> Text:
    """For a terminal: markup stays as it is written."""
    return Text(inert(text), style)
