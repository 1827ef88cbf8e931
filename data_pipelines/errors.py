"""The error that is the user's to mend, and what its messages are made of."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence

SHOWN = 60  # characters of a value that an error message quotes


class InputError(ValueError):
    """Bad input: a file, a row, a configuration key. Commands show it as one message, without a traceback.

    The message names what was found and what was expected.
    """


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is like it."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def known_key(options: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises InputError for the first key that is not known."""
    known = list(known)
    for key in options:
        if key not in known:
            raise InputError(f"{where}found the key {key!r}; expected one of {', '.join(known)}{nearest(key, known)}")


def shown(value: object) -> str:
    """A value for an error message: its type and its start, on one line, without control characters."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        keys = ", ".join(json.dumps(str(key)[:SHOWN]) for key in list(value)[:12])
        return f"an object with the keys {keys}" if value else "an empty object"
    if isinstance(value, str):
        return "an empty text" if not value.strip() else f"the text {_quoted(value)}"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:SHOWN]}"


def _quoted(text: str) -> str:
    return repr(text[:SHOWN]) + ("…" if len(text) > SHOWN else "")
