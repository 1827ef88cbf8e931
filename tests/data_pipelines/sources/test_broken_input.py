"""Input that is broken in every way we could think of: nothing crashes, every row is kept or counted by its reason, and
the rows beside a bad one come out exactly as they do without it."""

import csv
import gzip
import io
import json
import os
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from broken_rows import BREAKS, GRAMMARS, JSON
from hypothesis import HealthCheck, assume, find, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from parquet_files import parquet_file, table, without_nulls
from pyarrow import ArrowException
from tf_examples import array_record, example

from data_pipelines import sources
from data_pipelines.datasets import SPLITS, open_source
from data_pipelines.errors import InputError
from data_pipelines.prepare import prepare
from data_pipelines.stages.chunk import Ledger
from data_pipelines.stages.read import Reader
from data_pipelines.stages.source import Source

LONGEST = 200  # characters of a turn
FUZZED = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

Read = namedtuple("Read", "rows kept rejected conversations")


def read(kind, suffix, data, **options):
    """What is read of a file, after checking that the accounts add up and every message says what it should."""
    folder = SimpleNamespace(open=lambda name: io.BytesIO(data), local=lambda name: None)
    source = Source("s", kind, options, {}, folder, (f"f.{suffix}",))
    accounts, samples, drops = Ledger(), [], []
    for chunk, ledger in Reader(source, LONGEST, strict=False).chunks():
        samples += chunk
        drops += ledger.drops
        accounts.add(ledger)
    assert accounts.entered == accounts.left + sum(accounts.dropped.values())
    assert Counter(drop["reason"] for drop in drops) == accounts.dropped
    for drop in drops:
        told = f"{drop['found']}; {drop['expected']}"
        assert "\n" not in told and told.isprintable() and drop["file"] == f"f.{suffix}"
        assert drop["found"] and drop["expected"]
    made = [(c.id, turns_of(c)) for sample in samples for c in sample.conversations]
    if kind == "summarize":
        made = [(name, [[role, said_of(text), *rest] for role, text, *rest in turns]) for name, turns in made]
    return Read(accounts.entered, accounts.left, dict(accounts.dropped), made)


def turns_of(conversation):
    """As lists, and what tools there are."""
    tools = [["tools", conversation.tools]] if conversation.tools else []
    return [list(turn) for turn in conversation.turns] + tools


def said_of(text):
    """Without the phrase that stands before a post."""
    return text.removeprefix(next((f"{p} " for p in sources.load("summarize").PHRASES if text.startswith(p)), ""))


def unit(suffix, row, ascii_only=True):
    """A row as its file has it."""
    suffix = suffix.removesuffix(".gz")
    if suffix in ("json", "jsonl"):
        return json.dumps(row, ensure_ascii=ascii_only).encode()
    if suffix == "txt":
        return row["text"].encode()
    if suffix == "array_record":
        return example(row)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(row[key] for key in COLUMNS)
    return file.getvalue().removesuffix("\n").encode()


COLUMNS = ("text", "question", "label")


def framed(kind, suffix, units):
    """The file of these rows."""
    if suffix == "array_record":
        return array_record(*units)
    data = (b"\n\n" if kind == "text" else b"\n").join(units) + b"\n"
    if suffix.startswith("json") and not suffix.startswith("jsonl"):
        data = b"[" + b",\n".join(units) + b"]\n"
    if suffix.startswith("csv"):
        data = ",".join(COLUMNS).encode() + b"\n" + data
    return packed(suffix, data)


def packed(suffix, data):
    return gzip.compress(data, mtime=0) if suffix.endswith(".gz") else data


def expected(rows, without=(), shift=()):
    """The conversations of rows [(row, conversations)], but of those `without`; `shift`: numbers of the rows."""
    numbers = shift or range(1, len(rows) + 1)
    return [
        (f"f:{number}{end}", [[role, said_of(text), *rest] for role, text, *rest in turns])
        for i, (number, (_, conversations)) in enumerate(zip(numbers, rows))
        if i not in without
        for end, turns in conversations
    ]


@st.composite
def files(draw, name, suffixes=None, least=1):
    """(kind, suffix, rows, their units, a place among them)"""
    kind, grammar, known = GRAMMARS[name]
    suffix = draw(st.sampled_from([suffix for suffix in known if not suffixes or suffix in suffixes]))
    rows = draw(st.lists(grammar, min_size=least, max_size=4))
    units = [unit(suffix, row, draw(st.booleans())) for row, _ in rows]
    return kind, suffix, rows, units, draw(st.integers(0, len(rows) - 1))


@pytest.mark.parametrize("name", GRAMMARS)
@given(st.data())
@settings(FUZZED, max_examples=25)
def test_good_rows_are_kept_exactly(name, data):
    kind, suffix, rows, units, _ = data.draw(files(name))
    found = read(kind, suffix, framed(kind, suffix, units))
    assert found == Read(len(rows), len(rows), {}, expected(rows))


CASES = [
    pytest.param(grammar, function, reason, id=f"{name}, {grammar} {i}")
    for name, cases in BREAKS.items()
    for i, (grammar, function, reason) in enumerate(cases)
]


@pytest.mark.parametrize("name, function, reason", CASES)
@given(st.data())
@settings(FUZZED, max_examples=4)
def test_a_broken_row_is_counted_by_its_reason(name, function, reason, data):
    kind, suffix, rows, units, place = data.draw(files(name))
    bad = function(rows[place][0])
    text_only = set(bad) == {*COLUMNS} and all(isinstance(v, str) and "\ud83d" not in v for v in bad.values())
    if "csv" in suffix and not text_only:
        suffix, units = "jsonl", [unit("jsonl", row) for row, _ in rows]
    units[place] = unit(suffix, bad)
    found = read(kind, suffix, framed(kind, suffix, units))
    assert found == Read(len(rows), len(rows) - 1, {reason: 1}, expected(rows, without={place}))


# --- what is not a row at all ---

MIDDLE = lambda unit: len(unit) // 2
NO_JSON = {  # name -> what a row's JSON becomes, as a line
    "a row that is cut off": lambda unit: unit[: MIDDLE(unit)],
    "a comma too many": lambda unit: unit[:-1] + b",}",
    "a brace too many": lambda unit: unit + b"}",
    "a brace too few": lambda unit: unit[:-1],
    "single quotes": lambda unit: b"{'text': 'x'}",
    "a key without quotes": lambda unit: b'{text: "x"}',
    "no colon": lambda unit: b'{"text" "x"}',
    "a comment": lambda unit: b"{/* x */}",
    "an unclosed text": lambda unit: b'{"text": "x}',
    "a control character in a text": lambda unit: b'{"text": "a\x01b"}',
    "a zero byte in a text": lambda unit: b'{"text": "a\x00b"}' + b" " * 200,
    "an unknown escape": lambda unit: b'{"text": "\\x41"}',
    "an escape that is cut off": lambda unit: b'{"text": "\\u12"}',
    "a literal of another language": lambda unit: b'{"text": undefined}',
    "two rows in one": lambda unit: unit + b" " + unit,
    "nested too deeply": lambda unit: b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "brackets that are not closed": lambda unit: b"[" * 200_000,
    "a number of thousands of digits": lambda unit: b'{"text": ' + b"9" * 5000 + b"}",
}
NO_OBJECT = {
    "a number for a row": b"7",
    "text for a row": b'"x"',
    "null for a row": b"null",
    "true for a row": b"true",
    "a list for a row": b'[{"text": "x"}]',
    "not a number for a row": b"NaN",
}
NO_UTF8 = {
    "a byte that UTF-8 does not have": b"\xff",
    "Latin-1": "café".encode("latin-1"),
    "an overlong form": b"\xc0\xaf",
    "a surrogate in bytes": b"\xed\xa0\x80",
    "half a character": "€".encode()[:2],
    "a character beyond the last": b"\xf4\x90\x80\x80",
    "a stray continuation": b"\x80",
}
GOES_ON = ("jsonl", "jsonl.gz")
JSON_NAMES = [name for name, (_, _, known) in GRAMMARS.items() if "jsonl" in known]


def with_bad_unit(data, name, bad, reason, goes_on, suffixes):
    """Reads a file in which one unit is bad; what stands before it is kept, and behind it where reading goes on."""
    kind, suffix, rows, units, place = data.draw(files(name, suffixes))
    good = unit("jsonl", rows[place][0])
    bad = bad(good) if callable(bad) else bad
    found = read(kind, suffix, framed(kind, suffix, [*units[:place], bad, *units[place + 1 :]]))
    lost = {place} if suffix in goes_on else {*range(place + bad.startswith(good), len(rows))}
    kept = len(rows) - len(lost)
    assert found == Read(kept + 1, kept, {reason: 1}, expected(rows, without=lost)), (suffix, bad)


@pytest.mark.parametrize("bad", NO_JSON.values(), ids=NO_JSON)
@given(st.data())
@FUZZED
def test_a_line_that_is_no_json(bad, data):
    with_bad_unit(data, data.draw(st.sampled_from(JSON_NAMES)), bad, "invalid_json", GOES_ON, JSON)


@pytest.mark.parametrize("bad", NO_OBJECT.values(), ids=NO_OBJECT)
@given(st.data())
@FUZZED
def test_json_that_is_no_object(bad, data):
    with_bad_unit(data, data.draw(st.sampled_from(JSON_NAMES)), bad, "not_an_object", JSON, JSON)


@pytest.mark.parametrize("bad", NO_UTF8.values(), ids=NO_UTF8)
@given(st.data())
@FUZZED
def test_bytes_that_are_no_utf8(bad, data):
    name = data.draw(st.sampled_from([name for name, (_, _, known) in GRAMMARS.items() if "array_record" not in known]))
    row = b'{"text": "x%sy"}' % bad if name in JSON_NAMES else b"x%sy" % bad
    known = GRAMMARS[name][2] if name != "hc3_flat" else ("csv", "csv.gz")
    with_bad_unit(data, name, row, "not_utf8", GOES_ON, known)


NO_EXAMPLE = {
    "a line of JSON for a record": lambda record: b'{"tokens": [1, 2]}',
    "a record that is cut off": lambda record: record[:-1],
    "two records in one": lambda record: record + record,
    "a record of another message": lambda record: record + b"\x12\x00",
    "a packed record": gzip.compress,
    "zero bytes for a record": lambda record: bytes(len(record)),
}


@pytest.mark.parametrize("bad", NO_EXAMPLE.values(), ids=NO_EXAMPLE)
@given(st.data())
@FUZZED
def test_a_record_that_is_no_example(bad, data):
    kind, suffix, rows, units, place = data.draw(files("examples"))
    found = read(kind, suffix, framed(kind, suffix, [*units[:place], bad(units[place]), *units[place + 1 :]]))
    left = expected(rows, without={place})
    assert found == Read(len(rows), len(rows) - 1, {"not_an_example": 1}, left)


def as_columns(kind, rows):
    """What is read of these rows as Parquet, and as JSON; None where columns cannot hold them."""
    try:
        made = table(rows)
        data = parquet_file(made, row_group_size=2)
    except (ArrowException, UnicodeEncodeError, OverflowError):
        return None
    lines = [json.dumps(without_nulls(row)).encode() for row in made.to_pylist()]
    return read(kind, "parquet", data), read(kind, "jsonl", b"\n".join(lines))


AS_COLUMNS = [name for name in JSON_NAMES if name != "own"]  # its turns are lists of several types


@pytest.mark.parametrize("name", AS_COLUMNS)
@given(st.data())
@settings(FUZZED, max_examples=25)
def test_rows_of_columns_are_those_of_json(name, data):
    kind, grammar, _ = GRAMMARS[name]
    made = as_columns(kind, [row for row, _ in data.draw(st.lists(grammar, min_size=1, max_size=4))])
    assume(made)
    columns, lines = made
    assert columns == lines and columns.kept > 0


@pytest.mark.parametrize("name, function, reason", [case for case in CASES if case.values[0] in AS_COLUMNS])
@given(st.data())
@settings(FUZZED, max_examples=2)
def test_a_broken_row_of_columns_is_one_of_json(name, function, reason, data):
    kind, grammar, _ = GRAMMARS[name]
    rows = [function(data.draw(grammar)[0]), *([data.draw(grammar)[0]] * data.draw(st.integers(0, 1)))]
    columns, lines = as_columns(kind, rows) or (None, None)
    assert columns == lines


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@given(st.data())
@settings(FUZZED, max_examples=100)
def test_random_damage_of_columns_breaks_nothing(codec, data):
    rows = [{"text": f"tell {i}", "n": [{"x": i}, None]} for i in range(9)]
    whole = bytearray(parquet_file(rows, row_group_size=4, compression=codec, write_page_checksum=True))
    for _ in range(data.draw(st.integers(1, 4))):
        at, size = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 4))
        whole[at : at + size] = data.draw(st.binary(max_size=4))
    found = read("jsonl", "parquet", bytes(whole))
    assert found.rows > 0 and found.kept <= 9
    assert {*found.rejected} <= {
        "damaged_parquet",
        "not_utf8",
        "wrong_columns",
        "wrong_keys",
        "wrong_type",
        "empty_file",
    }


NO_CSV = {  # name -> (what a record becomes, reason, whether reading goes on)
    "a column too few": (b"x,y", "wrong_columns", True),
    "a column too many": (b"x,y,human,z", "wrong_columns", True),
    "other separators": (b"x;y;human", "wrong_columns", True),
    "text behind a quote": (b'"x"y,z,human', "invalid_csv", True),
    "a quote that is not closed": (b'"x,y,human', "invalid_csv", False),
}


@pytest.mark.parametrize("bad, reason, goes_on", NO_CSV.values(), ids=NO_CSV)
@given(st.data())
@FUZZED
def test_a_record_that_is_no_csv(bad, reason, goes_on, data):
    rows = data.draw(st.lists(GRAMMARS["hc3_flat"][1], min_size=1, max_size=4))
    rows = [row for row in rows if not any('"' in value for value in row[0].values())] or [TELL]
    place = data.draw(st.integers(0, len(rows) - 1))
    units = [unit("csv", row) for row, _ in rows]
    found = read("hc3", "csv", framed("hc3", "csv", [*units[:place], bad, *units[place + 1 :]]))
    lost = {place} if goes_on else {*range(place, len(rows))}
    assert found == Read(len(rows) - len(lost) + 1, len(rows) - len(lost), {reason: 1}, expected(rows, without=lost))


TELL = (
    {"text": "tell", "question": "ask", "label": "ai"},
    [("", [["user", "ask", 0.0, True], ["assistant", "tell", 1.0, True]])],
)
GOOD = ({"text": "tell"}, [("", [["text", "tell", 1.0, True]])])
LINE = b'{"text": "tell"}'
PACKED = gzip.compress(b"\n".join([LINE, LINE, LINE, b""]), mtime=0)
CRC = PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:]
COLUMN = parquet_file([GOOD[0]] * 3, row_group_size=2)
TWICE = parquet_file(pyarrow.table([["x"], ["y"]], names=["text", "text"]))
IDS = ({"tokens": [5, 6]}, [("", [["ids", "5 6", 1.0, True]])])
RECORDS = array_record(*[example(IDS[0])] * 3)

FILES = {  # name -> (suffix, bytes, reason, numbers of the rows kept)
    "an empty file": ("jsonl", b"", "empty_file", []),
    "nothing but empty lines": ("jsonl", b"\n \r\n\n", "empty_file", []),
    "an empty packed file": ("jsonl.gz", gzip.compress(b""), "empty_file", []),
    "a packed file without a byte": ("jsonl.gz", b"", "empty_file", []),
    "an empty array": ("json", b" [ ] ", "empty_file", []),
    "a header alone": ("csv", b"text,question,label\n", "empty_file", []),
    "a header with a name twice": ("csv", b"text,text,label\nx,y,ai\n", "invalid_csv", []),
    "a header without a name": ("csv", b"text,,label\nx,y,ai\n", "invalid_csv", []),
    "a header that is not closed": ("csv", b'"text,question,label\nx,y,ai\n', "invalid_csv", []),
    "no header": ("csv", b"tell,ask,ai\nx,y,human\n", "wrong_keys", []),
    "UTF-16 with a mark": ("jsonl", LINE.decode().encode("utf-16"), "not_utf8", []),
    "UTF-16 without a mark": ("jsonl", LINE.decode().encode("utf-16-le"), "binary_file", []),
    "UTF-32": ("jsonl", LINE.decode().encode("utf-32"), "not_utf8", []),
    "zero bytes": ("jsonl", bytes(100), "binary_file", []),
    "a binary file": ("jsonl", b"PAR1\x15\x00\x15\x00" + bytes(range(256)), "binary_file", []),
    "a packed file by another name": ("jsonl", PACKED, "binary_file", []),
    "a file that is not packed": ("jsonl.gz", LINE, "not_gzip", []),
    "a packed file that is cut off": ("jsonl.gz", PACKED[:-4], "truncated_gzip", [1, 2, 3]),
    "a packed file cut off in a row": ("jsonl.gz", gzip.compress(LINE + b"\n" + LINE)[:-8], "truncated_gzip", [1]),
    "a packed file cut off in its head": ("jsonl.gz", PACKED[:5], "truncated_gzip", []),
    "a wrong checksum": ("jsonl.gz", CRC, "damaged_gzip", [1, 2, 3]),
    "garbage behind packed data": ("jsonl.gz", PACKED + b"garbage", "damaged_gzip", [1, 2, 3]),
    "an array that is not closed": ("json", b"[%s, %s" % (LINE, LINE), "invalid_json", [1, 2]),
    "an array with a comma at its end": ("json", b"[%s, %s,]" % (LINE, LINE), "invalid_json", [1, 2]),
    "no comma between rows": ("json", b"[%s %s]" % (LINE, LINE), "invalid_json", [1]),
    "text behind an array": ("json", b"[%s] x" % LINE, "invalid_json", [1]),
    "text before an array": ("json", b"x [%s]" % LINE, "not_an_array", []),
    "a text for an array": ("json", b'"x"', "not_an_array", []),
    "a number for an array": ("json", b"7", "not_an_array", []),
    "a file that ends within a text": ("json", b'[%s, {"text": "te' % LINE, "invalid_json", [1]),
    "an array in a line": ("jsonl", b"[%s, %s]" % (LINE, LINE), "not_an_object", []),
    "line ends of old": ("jsonl", LINE + b"\r" + LINE, "invalid_json", []),
    "a document in an endless line": ("txt", b"x" * 300, "turn_too_long", []),
    "an empty file of records": ("array_record", b"", "damaged_array_record", []),
    "a file of no records": ("array_record", array_record(), "empty_file", []),
    "text for records": ("array_record", LINE * 99, "damaged_array_record", []),
    "records that are cut off": ("array_record", RECORDS[:-1], "damaged_array_record", []),
    "packed records": ("array_record.gz", gzip.compress(RECORDS), "unknown_suffix", []),
    "an empty file of columns": ("parquet", b"", "damaged_parquet", []),
    "a file of columns without rows": ("parquet", parquet_file(table([GOOD[0]]).slice(1)), "empty_file", []),
    "a file without columns": ("parquet", parquet_file([]), "empty_file", []),
    "columns of the same name": ("parquet", TWICE, "wrong_columns", []),
    "text for columns": ("parquet", LINE * 99, "damaged_parquet", []),
    "columns that are cut off": ("parquet", COLUMN[:-1], "damaged_parquet", []),
    "the start of a file of columns": ("parquet", b"PAR1", "damaged_parquet", []),
    "packed columns": ("parquet.gz", gzip.compress(COLUMN), "unknown_suffix", []),
    "an unknown suffix": ("arrow", b"ARROW1", "unknown_suffix", []),
}
SO_BE_IT = {  # name -> (suffix, bytes, numbers of the rows)
    "a mark of the byte order": ("jsonl", b"\xef\xbb\xbf" + LINE, [1]),
    "a mark of the byte order, packed": ("jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINE), [1]),
    "no line end at the end": ("jsonl", LINE + b"\n" + LINE, [1, 2]),
    "line ends of Windows": ("jsonl", LINE + b"\r\n" + LINE + b"\r\n", [1, 2]),
    "line ends of both kinds": ("jsonl", LINE + b"\r\n" + LINE + b"\n" + LINE, [1, 2, 3]),
    "empty lines between rows": ("jsonl", b"\n" + LINE + b"\n\n" + LINE + b"\n", [2, 4]),
    "spaces around a row": ("jsonl", b" \t" + LINE + b"  \n", [1]),
    "lines for an array": ("json", LINE + b"\n" + LINE, [1, 2]),
    "one object for an array": ("json", LINE, [1]),
    "a capital suffix": ("JSONL.GZ", gzip.compress(LINE), [1]),
    "packed data in two parts": ("jsonl.gz", PACKED + gzip.compress(LINE), [1, 2, 3, 4]),
    "zeros behind packed data": ("jsonl.gz", PACKED + bytes(64), [1, 2, 3]),
    "records with line ends of Windows": ("csv", b"text,question,label\r\ntell,ask,ai\r\n", [1]),
    "empty lines between records": ("csv", b"text,question,label\n\ntell,ask,ai\n\n", [1]),
    "an index without a name": ("csv", b",text,question,label\n0,tell,ask,ai\n", [1]),
    "quotes around everything": ("csv", b'"text","question","label"\n"tell","ask","ai"\n', [1]),
    "documents with line ends of Windows": ("txt", b"\r\ntell\r\n\r\n\r\ntell\r\n", [1, 2]),
    "lines of spaces between documents": ("txt", b"tell\n \t\ntell", [1, 2]),
    "records in groups": ("array_record", array_record(*[example(IDS[0])] * 3, options="group_size:2"), [1, 2, 3]),
    "columns in groups": ("parquet", COLUMN, [1, 2, 3]),
    "a capital suffix of columns": ("Parquet", COLUMN, [1, 2, 3]),
    "one shard of records": ("array_record-00000-of-00002", RECORDS, [1, 2, 3]),
}


@pytest.mark.parametrize(
    "suffix, data, reason, kept",
    [*FILES.values(), *((suffix, data, None, kept) for suffix, data, kept in SO_BE_IT.values())],
    ids=[*FILES, *SO_BE_IT],
)
def test_a_file_that_is_broken_or_only_unusual(suffix, data, reason, kept):
    kind, good = {"csv": ("hc3", TELL), "txt": ("text", GOOD), "array_record": ("tokens", IDS)}.get(
        suffix.partition("-")[0], ("jsonl", GOOD)
    )
    found = read(kind, suffix, data)
    rejected = {} if reason is None else {reason: 1}
    left = expected([good] * len(kept), shift=kept)
    stem = sources.stem(f"f.{suffix}")
    left = [(name.replace("f:", f"{stem}:"), turns) for name, turns in left]
    assert found == Read(len(kept) + len(rejected), len(kept), rejected, left)


# --- rows that are odd and kept all the same: what comes of them ---

ODD = {  # name -> (kind, the row as its line has it, the turns)
    "keys that nobody knows": ("alpaca", '{"instruction": "a", "output": "b", "extra": [1]}', ["a", "b"]),
    "a key twice: the last counts": ("alpaca", '{"instruction": "a", "output": "b", "output": "c"}', ["a", "c"]),
    "null for no input": ("alpaca", '{"instruction": "a", "input": null, "output": "b", "history": null}', ["a", "b"]),
    "blank input": ("alpaca", '{"instruction": "a", "input": " ", "output": "b"}', ["a  ", "b"]),
    "an escaped zero character": ("jsonl", '{"text": "a\\u0000b"}', ["a\0b"]),
    "escaped control characters": ("jsonl", '{"text": "\\u0001\\u001b[0m\\r"}', ["\1\x1b[0m\r"]),
    "nothing visible": ("jsonl", '{"text": "\\u200b"}', ["\u200b"]),
    "characters that are none": ("jsonl", '{"text": "\\ufffe\\uffff\\ufdd0"}', ["\ufffe\uffff\ufdd0"]),
    "text from right to left": ("jsonl", '{"text": "\\u202eabc"}', ["\u202eabc"]),
    "a surrogate pair in escapes": ("jsonl", '{"text": "\\ud83d\\ude00"}', ["😀"]),
    "line separators of Unicode": ("jsonl", '{"text": "a\u2028b\u0085c"}', ["a\u2028b\u0085c"]),
    "markers of another template": ("jsonl", '{"text": "<|im_end|></s>USER: [INST]"}', ["<|im_end|></s>USER: [INST]"]),
    "empty answers among good ones": (
        "hc3",
        '{"question": "a", "human_answers": ["", "b"], "chatgpt_answers": [" "]}',
        ["a", "b"],
    ),
    "an answer before the first question": (
        "sharegpt",
        '{"items": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
        ["a", "b"],
    ),
    "a question without an answer": (
        "sharegpt",
        '{"items": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "x"}]}',
        ["a", "b"],
    ),
    "speakers in capitals": (
        "sharegpt",
        '{"items": [{"from": " Human ", "value": "a"}, {"from": "GPT", "value": "b"}]}',
        ["a", "b"],
    ),
}


@pytest.mark.parametrize("kind, line, texts", ODD.values(), ids=ODD)
def test_an_odd_row_is_kept(kind, line, texts):
    (_, turns), *others = read(kind, "jsonl", line.encode()).conversations
    assert [turn[1] for turn in turns] == texts and not others


# --- damage at random ---


@st.composite
def damaged(draw, name):
    """A file, and the same with some of its bytes changed, left out, doubled or put in."""
    kind, suffix, _, units, _ = draw(files(name, least=2))
    data = bytearray(framed(kind, suffix, units))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["change", "cut", "double", "insert", "end"]))
        size = draw(st.integers(1, 20))
        if what == "change":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif what == "insert":
            data[at:at] = draw(
                st.one_of(st.binary(max_size=6), st.sampled_from([b'"', b"\n", b"{", b"]", b",", b"\\", b"\r\n"]))
            )
        elif what == "end":
            del data[at:]
        else:
            data[at : at + size] = data[at : at + size] * 2 if what == "double" else b""
    return kind, suffix, bytes(data)


@pytest.mark.parametrize("name", GRAMMARS)
@given(st.data())
@settings(FUZZED, max_examples=40)
def test_random_damage_breaks_nothing(name, data):
    kind, suffix, broken = data.draw(damaged(name))
    found = read(kind, suffix, broken)  # which checks the accounts
    assert found.rows > 0


@pytest.mark.parametrize("name", JSON_NAMES)
@given(st.data())
@settings(FUZZED, max_examples=25)
def test_damage_within_a_line_costs_that_line_at_most(name, data):
    kind, suffix, rows, units, place = data.draw(files(name, ["jsonl", "jsonl.gz"]))
    line, at = bytearray(units[place]), data.draw(st.integers(0, 200))
    line[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=3)).replace(b"\n", b"")
    found = read(kind, suffix, framed(kind, suffix, [*units[:place], bytes(line), *units[place + 1 :]]))
    others = expected(rows, without={place})
    assert [each for each in found.conversations if each in others or each[0].split(":")[1] != str(place + 1)] == others


# --- whole folders ---


def config(name="text", **options):
    return ConfigDict({"sources": {name: options}, "heldout": 0.5})


@pytest.mark.parametrize("make", ["a folder", "a link to nothing", "a link to itself", "a pipe", "another suffix"])
def test_what_is_no_file_is_not_read(tmp_path, make):
    folder = tmp_path / "in/text"
    folder.mkdir(parents=True)
    odd = folder / "odd.txt"
    if make == "a folder":
        odd.mkdir()
    elif make == "a pipe":
        os.mkfifo(odd)
    elif make == "another suffix":
        (folder / "odd.text").write_text("x")
    else:
        odd.symlink_to("nowhere" if make == "a link to nothing" else "odd.txt")
    with pytest.raises(InputError, match=r"found no files for 1 of 1 sources"):
        prepare(config(), tmp_path / "in", tmp_path / "out")
    (folder / "good.txt").write_text("tell")
    assert prepare(config(), tmp_path / "in", tmp_path / "out")["sources"]["text"]["rows"] == 1


def test_links_to_files_and_folders_are_read(tmp_path):
    (tmp_path / "in/text").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text("tell")
    (tmp_path / "in/text/b.txt").symlink_to(tmp_path / "elsewhere/a.txt")
    (tmp_path / "in/text/c").symlink_to(tmp_path / "elsewhere")
    wanted = config(patterns=("text/*.txt", "text/*/*.txt"))
    files = prepare(wanted, tmp_path / "in", tmp_path / "out")["sources"]["text"]["files"]
    assert [file["path"] for file in files] == ["text/b.txt", "text/c/a.txt"]


def test_a_file_that_cannot_be_read_stops_everything(tmp_path):
    (tmp_path / "in/text").mkdir(parents=True)
    (tmp_path / "in/text/a.txt").write_text("tell")
    (tmp_path / "in/text/b.txt").symlink_to("/proc/self/mem")  # a file whose first byte is an error
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs /proc")
    with pytest.raises(OSError):
        prepare(config(), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_name_that_is_no_utf8(tmp_path):
    (tmp_path / "in/text").mkdir(parents=True)
    (tmp_path / "in/text" / os.fsdecode(b"caf\xe9.txt")).write_text("tell")
    with pytest.raises(InputError, match=r"found the file name 'text/caf\\udce9.txt'; expected one in UTF-8"):
        prepare(config(), tmp_path / "in", tmp_path / "out")


def test_everything_at_once(tmp_path):
    """Every break of some grammars between good rows, from files to the dataset and back."""
    reasons, good_rows = {}, {}
    whole = ("sharegpt", "hh_rlhf", "summarize", "own", "text", "oasst", "pairs", "easylm", "tools", "examples")
    some = {name: GRAMMARS[name] for name in whole}
    for name, (kind, grammar, known) in some.items():
        row, conversations = find(grammar, lambda _: True, settings=settings(database=None))
        suffix = next((suffix for suffix in ("txt", "array_record") if suffix in known), "jsonl")
        cases = [(function, reason) for cases in BREAKS.values() for g, function, reason in cases if g == name]
        good = unit(suffix, row)
        units = [good, *(each for function, _ in cases for each in (unit(suffix, function(row)), good))]
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"f.{suffix}").write_bytes(framed(kind, suffix, units))
        reasons[name] = Counter(reason for _, reason in cases)
        good_rows[name] = expected([(row, conversations)] * (len(cases) + 1), shift=range(1, len(units) + 1, 2))
    options = {name: {"kind": kind, "patterns": (f"{name}/*",)} for name, (kind, _, _) in some.items()}
    everything = ConfigDict({"sources": options, "heldout": 0.3, "max_turn_chars": LONGEST})
    manifest = prepare(everything, tmp_path / "in", tmp_path / "out")
    lines = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert Counter(json.loads(line)["source"] for line in lines) == {n: sum(r.values()) for n, r in reasons.items()}
    for name, source in manifest["sources"].items():
        bad = sum(reasons[name].values())
        assert (source["rows"], source["kept_rows"], source["rejected"]) == (2 * bad + 1, bad + 1, reasons[name])
        made = [c for split in SPLITS for c in open_source(tmp_path / "out", name, split)]
        turns = [[[role, said_of(text), *rest] for role, text, *rest in turns_of(c)] for c in made]
        assert sorted(zip([c.id.replace(f"{name}/", "") for c in made], turns)) == sorted(good_rows[name])


def test_there_are_sixty_kinds_of_broken_input():
    kinds = {*BREAKS, *NO_JSON, *NO_OBJECT, *NO_UTF8, *NO_EXAMPLE, *NO_CSV, *FILES}
    assert len(kinds) >= 60 and len(kinds) > len(BREAKS) + 20
