"""JSON values out of a text that is read piece by piece: the standard library parses whole texts only."""

import json
import re
from collections.abc import Callable, Iterator

PIECE = 1 << 20
NEAR_THE_CUT = 16  # characters: more than the longest literal, number sign or escape that a cut can damage
SPACE = re.compile(r"[ \t\r\n]*")

Read = Callable[[int], str]  # about so many further characters, none at the end


class JsonError(Exception):
    """Text that is not what it should be, in the terms of a DataError."""

    def __init__(self, found: str, expected: str = "valid JSON", reason: str = "invalid_json"):
        super().__init__(found)
        self.found, self.expected, self.reason = found, expected, reason


def json_values(read: Read, limit: int) -> Iterator[object]:
    """The items of an array, or objects one after the other; `limit` is the most characters of one.

    Raises JsonError where it cannot go on.
    """
    text = _Text(read, limit)
    first = text.peek()
    if first not in ("", "[", "{"):
        raise JsonError(f"a file that starts with {first!r}", "an array [ or an object {", "not_an_array")
    if first != "[":
        while text.peek():
            yield text.value()
        return
    text.take()
    after = text.take() if text.peek() == "]" else ","
    while after == ",":
        yield text.value()
        after = text.take()
    if after != "]":
        found = f"{after!r} in line {text.line()}" if after else "the end of the file"
        raise JsonError(f"{found} after an item", "a comma or ] after an item")
    if text.peek():
        raise JsonError(f"{text.peek()!r} in line {text.line()} after the array", "an array and nothing else")


def syntax_error(error: Exception, first_line: int) -> JsonError:
    """`error` is what the parser raised for a text that starts in line `first_line` of its file."""
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(0, error.pos - 10) : error.pos + 20]
        return JsonError(f"invalid JSON in line {first_line + error.lineno - 1} ({error.msg}, near {near!r})")
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return JsonError(f"JSON that cannot be read ({reason})")


class _Text:
    """The part of the text that is at hand. It grows until it holds a whole value, and drops what is used up."""

    def __init__(self, read: Read, limit: int):
        self.read, self.limit = read, limit
        self.text, self.at = "", 0
        self.first_line = 1  # of `text`
        self.decoder = json.JSONDecoder()

    def line(self) -> int:
        return self.first_line + self.text.count("\n", 0, self.at)

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """As `peek`, and steps over it."""
        found = self.peek()
        self.at += len(found)
        return found

    def value(self) -> object:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
                problem = syntax_error(error, self.first_line)  # before `more` moves the text
                if not (self.cut(error) and self.more()):
                    raise problem from None
            else:
                # a number may go on behind the cut
                if end < len(self.text) or isinstance(value, dict) or not self.more():
                    self.at = end
                    return value

    def cut(self, error: Exception) -> bool:
        """Whether the error may come from the end of what is at hand."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        # A string that is cut off is reported where it starts, everything else close to the cut.
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - NEAR_THE_CUT

    def more(self) -> bool:
        """Reads as much again as is at hand, so that long values are not parsed over and over. False at the end."""
        self.first_line = self.line()
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > self.limit:
            raise JsonError(f"a row of more than {self.limit:,} characters", "shorter rows", "row_too_long")
        piece = self.read(max(PIECE, len(self.text)))
        self.text += piece
        return bool(piece)
