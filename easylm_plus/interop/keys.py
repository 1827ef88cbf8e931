"""Keys of other people's JSON, read by type: what is absent or of another kind is one error that names the key."""

import math
from collections.abc import Mapping
from typing import Any

from easylm_plus.errors import UserError

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def required(raw: Mapping[str, Any], key: str, kind: type, place: str, least: int = 1) -> Any:
    """raw[key], which has to be there and of that kind.

    Args:
      kind: one of KINDS; a float may be written as a whole number and comes back as a float.
      place: of `raw`, for messages.
      least: the smallest whole number allowed.

    Raises UserError.
    """
    if key not in raw:
        raise UserError(f"{place}: found no {key}, expected {_expected(kind, least)}")
    value: Any = raw[key]
    if kind is float and type(value) is int:
        value = float(value)
    allowed = {int: lambda: value >= least, float: lambda: math.isfinite(value)}
    if type(value) is not kind or not allowed.get(kind, lambda: True)():
        raise UserError(f"{place}: found {key} = {value!r}, expected {_expected(kind, least)}")
    return value


def optional(raw: Mapping[str, Any], key: str, kind: type, place: str, default: Any, least: int = 1) -> Any:
    """raw[key] as `required` reads it; `default` where it is absent or null."""
    return default if raw.get(key) is None else required(raw, key, kind, place, least)


def _expected(kind: type, least: int) -> str:
    return f"{KINDS[kind]} of at least {least}" if kind is int else KINDS[kind]
