"""tf.train.Examples are read as protobuf reads them, and bytes that are none are told."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tf_examples import KINDS, example, parsed

from data_pipelines.files.tf_example import read_example

INT64 = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 300), st.sampled_from([127, 128, 2**14, 2**63 - 1]))
FLOAT32 = st.floats(width=32, allow_nan=False)
VALUES = st.one_of(
    *(st.lists(each, max_size=8) for each in (INT64, FLOAT32, st.text(max_size=5), st.binary(max_size=5)))
)
ROWS = st.dictionaries(st.text(max_size=6), VALUES, max_size=4)


def readable(row):
    """The row as it should be read: bytes as text, and features of other bytes left out."""
    read = {}
    for name, values in row.items():
        try:
            read[name] = [value.decode() if isinstance(value, bytes) else value for value in values]
        except UnicodeDecodeError:
            continue
    return read


def found_in(record):
    """`read_example` and what protobuf says, or None for an error of either."""
    try:
        ours = read_example(record)
    except ValueError:
        ours = None
    try:
        theirs = readable({name: values for name, (_, values) in parsed(record).items()})
    except Exception:  # DecodeError is protobuf's own
        theirs = None
    return ours, theirs


def same(one, other):
    """Equal in types and bits, NaN included."""
    bits = lambda row: {
        name: [(type(v), struct.pack("<d", v) if isinstance(v, float) else v) for v in row[name]] for name in row
    }
    return bits(one) == bits(other)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_what_protobuf_writes_is_read(row):
    assert same(read_example(example(row)), readable(row))


def varint(value):
    value %= 2**64
    digits = []
    while value > 127:
        digits.append(value % 128 + 128)
        value >>= 7
    return bytes([*digits, value])


def sized(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def entry(name, feature):
    return sized(1, sized(1, name) + sized(2, feature))


def one_by_one(values):
    """An Example with the feature x, numbers of which are not packed, as protobuf's first version had them."""
    if isinstance(values[0], int):
        return sized(1, entry(b"x", sized(3, b"".join(b"\x08" + varint(value) for value in values))))
    return sized(1, entry(b"x", sized(2, b"".join(b"\x0d" + struct.pack("<f", value) for value in values))))


@given(st.one_of(st.lists(INT64, min_size=1, max_size=8), st.lists(FLOAT32, min_size=1, max_size=8)))
def test_numbers_that_are_not_packed(values):
    ours, theirs = found_in(one_by_one(values))
    assert same(ours, {"x": values}) and same(theirs, {"x": values})


def test_packed_and_not_in_one_list():
    mixed = sized(1, b"\x05\x80\x01") + b"\x08" + varint(-1)
    ours, theirs = found_in(sized(1, entry(b"x", sized(3, mixed))))
    assert ours == theirs == {"x": [5, 128, -1]}


def test_what_is_there_with_nothing_in_it():
    assert read_example(b"") == read_example(sized(1, b"")) == {}
    for feature in (b"", sized(1, b""), sized(2, b""), sized(3, b""), sized(3, sized(1, b""))):
        assert found_in(sized(1, entry(b"x", feature))) == ({"x": []}, {"x": []})
    assert found_in(sized(1, sized(1, b""))) == ({"": []}, {"": []})  # an entry without key and value


INTS, FLOATS = sized(3, sized(1, b"\x07")), sized(2, sized(1, struct.pack("<f", 1)))
GOOD = sized(1, entry(b"x", INTS))
BROKEN = {  # name -> (bytes, what is said of them)
    "text": (b"tokens: 1 2 3\n", "a field that tf.train.Example does not have"),
    "JSON": (b'{"tokens": [1, 2]}', "a field that"),
    "a gzip file": (b"\x1f\x8b\x08\0", "a field that"),
    "zero bytes": (bytes(20), "a field that"),
    "a field behind": (GOOD + varint(2 << 3) + b"\x01", "a field that"),
    "a SequenceExample": (GOOD + sized(2, sized(1, b"")), "a field that"),
    "a group": (b"\x0b\x0c", "a field that"),
    "another type": (b"\x08\x01", "a field that"),
    "integers among bytes": (sized(1, entry(b"x", sized(1, b"\x08\x01"))), "a field that"),
    "floats of 64 bits": (sized(1, entry(b"x", sized(2, b"\x09" + bytes(8)))), "a field that"),
    "features twice": (GOOD + GOOD, "a field twice"),
    "a key twice": (sized(1, sized(1, sized(1, b"x") + sized(1, b"y") + sized(2, INTS))), "a field twice"),
    "a feature of two kinds": (sized(1, entry(b"x", INTS + FLOATS)), "a feature of two kinds"),
    "a kind twice": (sized(1, entry(b"x", INTS + INTS)), "a field twice"),
    "a feature twice": (sized(1, entry(b"x", INTS) + entry(b"x", INTS)), "the feature 'x' twice"),
    "the end missing": (GOOD[:-1], "of which"),
    "a size beyond all": (b"\x0a" + varint(2**63), "of which 0 are there"),
    "a name that is no text": (sized(1, entry(b"\xff", INTS)), "codec can't decode"),
    "a number that is cut off": (sized(1, entry(b"x", sized(3, sized(1, b"\x07\x87")))), "a number that is cut off"),
    "a tag that is cut off": (b"\x8a", "a number that is cut off"),
    "nothing but a tag": (b"\x0a", "a number that is cut off"),
    "a tag with a zero behind": (b"\x8a\x00" + GOOD[1:], "more bytes than it needs"),
    "a size with a zero behind": (b"\x0a\x80\x00", "more bytes than it needs"),
    "a number with a zero behind": (sized(1, entry(b"x", sized(3, sized(1, b"\x87\x00")))), "more bytes than it needs"),
    "a number of 70 bits": (sized(1, entry(b"x", sized(3, sized(1, b"\xff" * 9 + b"\x02")))), "than 64 bits take"),
    "a number of 11 bytes": (sized(1, entry(b"x", sized(3, sized(1, b"\xff" * 10 + b"\x01")))), "than 64 bits take"),
    "a tag of 11 bytes": (b"\xff" * 10 + b"\x01", "than 64 bits take"),
    "half a float": (sized(1, entry(b"x", sized(2, sized(1, b"\0\0\0\0\0\0")))), "6 bytes of floats"),
}


@pytest.mark.parametrize("record, told", BROKEN.values(), ids=BROKEN)
def test_bytes_that_are_no_example(record, told):
    assert read_example(GOOD) == {"x": [7]}
    with pytest.raises(ValueError) as caught:
        read_example(record)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=400, deadline=None)
@given(ROWS, st.data())
def test_what_is_read_of_damaged_bytes_is_what_protobuf_reads(row, data):
    record = bytearray(example(row))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(record)))
        record[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    ours, theirs = found_in(bytes(record))
    assert ours is None or same(ours, theirs)


def test_damage_is_often_told_and_sometimes_cannot_be():
    """A control of the test above: both happen."""
    record = example({"x": [1, 2, 3], "y": [0.5]})
    changed = [found_in(record[:at] + bytes([byte]) + record[at + 1 :]) for at in range(len(record)) for byte in (0, 9)]
    refused = [theirs for ours, theirs in changed if ours is None]
    assert len(refused) > 20 and any(theirs is not None for theirs in refused)
    assert sum(ours is not None for ours, _ in changed) > 5


def test_floats_are_those_of_float32():
    (value,) = read_example(example({"x": [0.1]}))["x"]
    assert value != 0.1 and np.float32(value) == np.float32(0.1)


def test_the_kinds_of_the_writer_are_all_read():
    assert {*KINDS.values()} == {"int64_list", "float_list", "bytes_list"}
    assert read_example(example({"a": [1], "b": [1.0], "c": [b"\xff"], "d": ["ü"]})) == {
        "a": [1],
        "b": [1.0],
        "d": ["ü"],
    }
