"""A tf.train.Example out of its bytes, without TensorFlow (tensorflow/core/example/example.proto and feature.proto):

    Example     { Features features = 1; }
    Features    { map<string, Feature> feature = 1; }    an entry of the map: { string key = 1; Feature value = 2; }
    Feature     { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }
    each list   { repeated … value = 1; }                floats and integers packed, or one by one

Strict, because bytes of another kind may look like a message: a field that is not one of these, one of them twice where
it can be there once, a number that is longer than it need be, and bytes that are missing at the end raise ValueError.
No writer of protobuf makes any of these.
"""

from collections.abc import Collection, Iterator

import numpy as np

from data_pipelines.errors import SHOWN

Row = dict[str, list[int] | list[float] | list[str]]

VARINT, SIZED, FIXED32 = 0, 2, 5  # wire types, the last three bits of a tag
FIRST, SECOND, THIRD = (number << 3 | SIZED for number in (1, 2, 3))  # tags of fields that have a size
ONE_INT, ONE_FLOAT = 1 << 3 | VARINT, 1 << 3 | FIXED32
VARINT_BYTES = 10  # at most: 64 bits, 7 a byte
CUT_OFF, TOO_LONG = "a number that is cut off", "a number of more bytes than it needs, or than 64 bits take"


def read_example(record: bytes) -> Row:
    """name -> values of each feature, none of them for one without a kind. Bytes are decoded as UTF-8; a feature with
    bytes that are no text is left out. Raises ValueError for bytes that are no Example."""
    row: Row = {}
    seen: set[str] = set()
    for features in _once(_fields(record, (FIRST,))).values():
        for _, entry in _fields(features, (FIRST,)):
            parts = _once(_fields(entry, (FIRST, SECOND)))
            name = parts.get(FIRST, b"").decode()
            if name in seen:
                raise ValueError(f"the feature {name[:SHOWN]!r} twice")
            seen.add(name)
            values = _values(parts.get(SECOND, b""))
            if values is not None:
                row[name] = values
    return row


def _values(feature: bytes) -> list[int] | list[float] | list[str] | None:
    kinds = _once(_fields(feature, (FIRST, SECOND, THIRD)))
    if len(kinds) > 1:
        raise ValueError("a feature of two kinds")
    for kind, content in kinds.items():
        return {FIRST: _texts, SECOND: _floats, THIRD: _ints}[kind](content)
    return []


def _texts(content: bytes) -> list[str] | None:
    values = [value for _, value in _fields(content, (FIRST,))]  # all of them, before one that is no text ends it
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        return None


def _floats(content: bytes) -> list[float]:
    """float32 values, exactly."""
    values = b"".join([value for _, value in _fields(content, (FIRST, ONE_FLOAT))])
    if len(values) % 4:
        raise ValueError(f"{len(values)} bytes of floats, which have 4 each")
    return list(np.frombuffer(values, "<f4").tolist())


def _ints(content: bytes) -> list[int]:
    return [value for _, part in _fields(content, (FIRST, ONE_INT)) for value in _varints(part)]


def _varints(data: bytes) -> list[int]:
    """The integers, of 64 bits with a sign, that follow one another in some bytes: base 128, low digits first, with the
    highest bit set in all bytes of a number but its last."""
    if not data:
        return []
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    if not len(ends) or ends[-1] != len(octets) - 1:
        raise ValueError(CUT_OFF)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    last = octets[ends]
    if np.max(lengths) > VARINT_BYTES or (last[lengths == VARINT_BYTES] > 1).any() or (last[lengths > 1] == 0).any():
        raise ValueError(TOO_LONG)
    digits = (octets & 0x7F).astype(np.uint64)
    digits <<= (7 * (np.arange(len(octets)) - starts.repeat(lengths))).astype(np.uint64)
    return list(np.bitwise_or.reduceat(digits, starts).view(np.int64).tolist())


def _fields(data: bytes, tags: Collection[int]) -> Iterator[tuple[int, bytes]]:
    """(tag, content) of the fields of a message, all of which have one of the tags. A number is left as its bytes."""
    at = 0
    while at < len(data):
        tag, start = _number(data, at)
        if tag not in tags:
            raise ValueError(f"a field that tf.train.Example does not have (tag {tag})")
        if tag & 7 == SIZED:
            size, start = _number(data, start)
        else:
            size = 4 if tag & 7 == FIXED32 else _number(data, start)[1] - start
        at = start + size
        if at > len(data):
            raise ValueError(f"a field of {size} bytes, of which {len(data) - start} are there")
        yield tag, data[start:at]


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(value of the number that starts at a byte, 64 bits without a sign; where the next thing starts)"""
    value = 0
    for place in range(at, min(at + VARINT_BYTES, len(data))):
        value |= (data[place] & 0x7F) << 7 * (place - at)
        if data[place] < 0x80:
            if value >> 64 or (place > at and not data[place]):
                raise ValueError(TOO_LONG)
            return value, place + 1
    raise ValueError(CUT_OFF if len(data) - at < VARINT_BYTES else TOO_LONG)


def _once(fields: Iterator[tuple[int, bytes]]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for tag, content in fields:
        if tag in found:
            raise ValueError("a field twice that can be there once")
        found[tag] = content
    return found
