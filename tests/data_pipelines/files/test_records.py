"""Rows come out of every format, and every kind of broken file is named with its place."""

import datetime
import decimal
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
import time
import zlib

import pyarrow as pa
import pytest
from parquet_files import parquet_file, table
from tf_examples import array_record, example

from data_pipelines.conversation import DataError
from data_pipelines.files import json_stream, parquet
from data_pipelines.files.records import read_items, read_rows


def write(folder, name, data):
    data = data.encode() if isinstance(data, str) else data
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(path, **options):
    """Rows with their numbers, and all errors."""
    items = list(read_items(path, name=path.name, **options))
    errors = [item for item in items if isinstance(item, DataError)]
    return [(item[0].row, item[1]) for item in items if not isinstance(item, DataError)], errors


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    "name, data",
    [
        ("a.json", '[{"n": "1"}, {"n": "é"}]'),
        ("a.json", '{"n": "1"}\n{"n": "é"}\n'),  # many a .json holds JSON lines
        ("a.jsonl", '\ufeff{"n": "1"}\r\n{"n": "é"}'),
        ("a.csv", 'n\n1\n"é"\n'),
    ],
)
def test_formats(tmp_path, name, data, packed):
    rows, errors = read(write(tmp_path, name + packed, data))
    assert (rows, errors) == ([(1, {"n": "1"}), (2, {"n": "é"})], [])


def test_one_object_is_one_row(tmp_path):
    assert read(write(tmp_path, "a.json", ' {"n": [1, {"m": 2}]} '))[0] == [(1, {"n": [1, {"m": 2}]})]


def test_jsonl_rows_are_lines(tmp_path):
    rows, errors = read(write(tmp_path, "a.jsonl", '{"n": 1}\n\n{"n": 2}\n'))
    assert [row for row, _ in rows] == [1, 3]
    assert not errors


def test_csv_fields_may_hold_line_breaks_and_quotes(tmp_path):
    rows, _ = read(write(tmp_path, "a.csv", 'q,a\n"two\nlines","say ""hi"""\nx,y\n'))
    assert rows == [(1, {"q": "two\nlines", "a": 'say "hi"'}), (2, {"q": "x", "a": "y"})]


@pytest.mark.parametrize(
    "separator, documents",
    [
        (1, ["one\nstill one", "two", "three<END>", "four"]),
        (2, ["one\nstill one\n\ntwo", "three<END>\n\nfour"]),
        ("<END>", ["one\nstill one\n\ntwo\n\n\nthree", "four"]),
    ],
)
def test_text_documents(tmp_path, separator, documents):
    path = write(tmp_path, "a.txt", "one\nstill one\r\n\ntwo\n\n\nthree<END>\n\nfour\n\n")
    rows, errors = read(path, separator=separator)
    assert [row["text"] for _, row in rows] == documents
    assert [number for number, _ in rows] == list(range(1, len(documents) + 1))
    assert not errors


GOOD = '{"n": 1}\n'
BROKEN = [  # name, bytes, reason, row, what the message must contain
    ("a.jsonl", b"", "empty_file", None, ["no rows"]),
    ("a.jsonl", b"\n \n", "empty_file", None, ["no rows"]),
    ("a.json", b"[]", "empty_file", None, ["no rows"]),
    ("a.csv", b"q,a\n", "empty_file", None, ["no rows"]),
    ("a.txt.gz", b"\n\n", "empty_file", None, ["no rows"]),
    ("a.arrow", b"ARROW1", "unknown_suffix", None, ["'.arrow'", ".jsonl", ".parquet"]),
    ("a.parquet", b"PAR1", "damaged_parquet", 1, ["where reading ends", "an intact Parquet file"]),
    ("a.jsonl", b"\x00\x01\x02", "binary_file", None, ["zero byte at byte 0", "text file"]),
    ("a.json", "[{}]".encode("utf-16"), "not_utf8", None, ["UTF-16"]),
    ("a.jsonl", GOOD.encode() + b'{"n": "caf\xe9"}\n', "not_utf8", 2, ["byte 19", "0xe9", "UTF-8"]),
    ("a.json", b'[{"n": 1}, {"n": "caf\xe9"}]', "not_utf8", 2, ["byte 21", "0xe9", "where reading ends"]),
    ("a.json", b'[{"n": 1}, {"n": 2}\xe9, {"n": 3}]', "not_utf8", 3, ["byte 19", "0xe9"]),
    ("a.csv", b"q\nok\nb\xffd\n", "not_utf8", 2, ["byte 6", "0xff"]),
    ("a.jsonl", (GOOD + "{oops}\n").encode(), "invalid_json", 2, ["line 2", "oops"]),
    ("a.json", b'[{"n": 1},\n {"n": }]', "invalid_json", 2, ["line 2", "Expecting value"]),
    ("a.json", b'[{"n": 1},\n{"n": 2}', "invalid_json", 3, ["the end of the file", "comma or ]"]),
    ("a.json", b'[{"n": 1}\n{"n": 2}]', "invalid_json", 2, ["'{' in line 2", "comma or ]"]),
    ("a.json", b'[{"n": 1}] x', "invalid_json", 2, ["'x' in line 1 after the array"]),
    ("a.json", b'[{"n": "no end}]', "invalid_json", 1, ["line 1", "Unterminated string"]),
    ("a.json", b'[{"n": 1},]', "invalid_json", 2, ["line 1"]),
    ("a.json", b'"a text"', "not_an_array", 1, ["starts with '\"'", "array"]),
    ("a.json", b'[{"n": 1}, 7]', "not_an_object", 2, ["int 7", "an object"]),
    ("a.jsonl", (GOOD + "[1, 2]\n").encode(), "not_an_object", 2, ["a list of 2", "an object"]),
    ("a.jsonl", (GOOD + "null\n").encode(), "not_an_object", 2, ["null"]),
    ("a.jsonl", (GOOD + "[" * 200_000).encode(), "invalid_json", 2, ["nested too deeply"]),
    ("a.jsonl", (GOOD + '{"n": ' + "9" * 5000 + "}").encode(), "invalid_json", 2, ["digits"]),
    ("a.csv", b"q,a\n1\n", "wrong_columns", 1, ["1 fields", "2, as in the header"]),
    ("a.csv", b"q,a\n1,2,3\n", "wrong_columns", 1, ["3 fields"]),
    ("a.csv", b"q,q\n1,2\n", "invalid_csv", 1, ["header ['q', 'q']", "different names"]),
    ("a.csv", b'q,a\n1,"no end\n', "invalid_csv", 1, ["not CSV", "closed quotes"]),
]


@pytest.mark.parametrize("name, data, reason, row, parts", BROKEN)
def test_broken_files(tmp_path, name, data, reason, row, parts):
    path = write(tmp_path, name, data)
    _, errors = read(path)
    assert [error.reason for error in errors] == [reason]
    assert (errors[0].where.path, errors[0].where.row) == (name, row)
    for part in (name, "found", "expected", *parts):
        assert part in str(errors[0])
    assert "\n" not in str(errors[0])
    with pytest.raises(DataError):  # without a handler the same error is raised
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz"])
def test_truncated_gzip_keeps_the_rows_before_it(tmp_path, name):
    lines, end = [f"{random.Random(n).random()}" for n in range(9999)], "\n\n"
    if "json" in name:
        lines, end = [json.dumps({"n": line}) for line in lines], "\n"
    path = write(tmp_path, name, end.join(["n", *lines] if "csv" in name else lines))
    path.write_bytes(path.read_bytes()[:-5000])
    left = zlib.decompressobj(wbits=31).decompress(path.read_bytes())
    whole = left.count(end.encode()) - ("csv" in name)
    rows, errors = read(path)
    assert whole - 1 <= len(rows) <= whole and whole > 5000
    assert [error.reason for error in errors] == ["truncated_gzip"]
    assert errors[0].where.row == len(rows) + 1


def test_damaged_and_misnamed_gzip(tmp_path):
    path = write(tmp_path, "a.jsonl.gz", "".join(f'{{"n": {n}}}\n' for n in range(999)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # the checksum
    path.write_bytes(data)
    assert [error.reason for error in read(path)[1]] == ["damaged_gzip"]
    path.write_bytes(GOOD.encode())
    assert [error.reason for error in read(path)[1]] == ["not_gzip"]
    path = tmp_path / "b.jsonl"
    path.write_bytes(gzip.compress(GOOD.encode()))
    errors = read(path)[1]
    assert [error.reason for error in errors] == ["binary_file"]
    assert "without .gz" in str(errors[0])


def test_reading_goes_on_after_a_bad_row(tmp_path):
    rows, errors = read(write(tmp_path, "a.jsonl", b'{"n": 1}\n{\n\xff\n[]\n{"n": 2}\n'))
    assert [row for row, _ in rows] == [1, 5]
    assert [(error.where.row, error.reason) for error in errors] == [
        (2, "invalid_json"),
        (3, "not_utf8"),
        (4, "not_an_object"),
    ]
    rows, errors = read(write(tmp_path, "a.csv", "q,a\n1\n3,4\n"))
    assert rows == [(2, {"q": "3", "a": "4"})]
    assert len(errors) == 1


@pytest.mark.parametrize(
    "name, data, rows_left",
    [
        ("a.jsonl", GOOD + '{"n": "' + "x" * 500 + '"}\n' + GOOD, [1, 3]),
        ("a.json", "[" + GOOD + ', {"n": "' + "x" * 500 + '"}]', [1]),
        ("a.csv", "n\n1\n" + "x" * 500 + "\n", [1]),
        ("a.txt", "1\n\n" + "x\n" * 250, [1]),
        ("a.txt", "1\n\n" + "x\n" * 250 + "\n\n3\n", [1, 3]),
    ],
)
def test_rows_over_the_limit(tmp_path, monkeypatch, name, data, rows_left):
    monkeypatch.setattr(json_stream, "PIECE", 64)
    path = write(tmp_path, name, data)
    rows, errors = read(path, max_row_bytes=200)
    assert [row for row, _ in rows] == rows_left
    assert [(error.reason, error.where.row) for error in errors] == [("row_too_long", 2)]
    assert read(path, max_row_bytes=600)[1] == []


PART = 400_000  # bytes


def seconds_to_read(tmp_path, name, parts, reader):
    """Processor time for a row with a text of so many parts: the best of three, other processes not counted."""
    long = "word " * (PART // 5 * parts)
    data = f'n\n"{long}"\n' if name == "a.csv" else json.dumps({"n": long})
    path, taken = write(tmp_path, name, data), []
    for _ in range(3):
        start = time.process_time()
        rows, errors = reader(path)
        taken.append(time.process_time() - start)
        assert rows == [(1, {"n": long})] and not errors
    return min(taken)


def read_again_and_again(path):
    """What reading a row anew for each part of its file costs."""
    for _ in range(0, path.stat().st_size, PART):
        found = read(path)
    return found


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_the_time_grows_with_the_length_of_a_text(tmp_path, name):
    """Eight times the text takes about 8 times as long, and would take 64 times if it were quadratic."""
    growth = lambda reader: seconds_to_read(tmp_path, name, 8, reader) / seconds_to_read(tmp_path, name, 1, reader)
    assert growth(read) < 24 < growth(read_again_and_again)


def test_json_in_pieces_equals_json_at_once(tmp_path, monkeypatch):
    """Whatever the place where a piece of the file ends: within a number, an escape, a literal, a character."""
    items = [{"a": 1.5e-7, "b": -12, "c": [True, None, {}]}, {"é€😀": '"\\ \u1234\n', "d": [-0.25]}]
    escaped, raw = json.dumps(items, indent=1), json.dumps(items, ensure_ascii=False)
    data = f"{escaped[:-1]},{raw[1:]}\n{' ' * 40}"
    path = write(tmp_path, "a.json", data)
    for piece in (1, 2, 3, 5, 17, 64):
        monkeypatch.setattr(json_stream, "PIECE", piece)
        rows, errors = read(path)
        assert [row for _, row in rows] == json.loads(data)
        assert not errors


def test_json_error_lines_with_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "PIECE", 8)
    path = write(tmp_path, "a.json", "[\n" + '{"n": 1},\n' * 50 + '{"n"; 2}]')
    rows, errors = read(path)
    assert len(rows) == 50
    assert errors[0].where.row == 51
    assert "line 52" in str(errors[0])


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path, "a.json", "[" + '{"n": 1}, ' * 10 + "oops")
    rows = read_rows(path)
    assert next(rows)[1] == {"n": 1}
    rows.close()


EXAMPLES = [example({"n": [i], "f": [i / 4], "t": [f"é{i}"]}) for i in range(300)]
ROWS = [(i + 1, {"n": [i], "f": [i / 4], "t": [f"é{i}"]}) for i in range(300)]


@pytest.mark.parametrize("options", ["group_size:1", "group_size:7", "group_size:1,uncompressed", "group_size:65536"])
@pytest.mark.parametrize("name", ["a.array_record", "A.Array_Record", "a.b.array_record-00001-of-00010"])
def test_array_records(tmp_path, name, options):
    path = write(tmp_path, name, array_record(*EXAMPLES, options=options))
    assert read(path) == (ROWS, [])
    with open(path, "rb") as file:  # from a copy, as behind a URL
        assert read(path.rename(tmp_path / f"away{path.suffix}"), raw=file) == (ROWS, [])


def test_a_copy_of_array_records_is_removed(tmp_path, monkeypatch):
    made, copied = [], tempfile.NamedTemporaryFile
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **o: made.append(copied(dir=tmp_path, **o)) or made[-1])
    path = write(tmp_path, "a.array_record", array_record(*EXAMPLES[:3]))
    data = io.BytesIO(path.read_bytes())
    assert read(path, raw=data) == (ROWS[:3], []) and len(made) == 1 and data.closed
    assert [each.name for each in tmp_path.iterdir()] == ["a.array_record"]
    assert read(path, raw=io.BytesIO(), local=str(path)) == (ROWS[:3], []) and len(made) == 1


@pytest.mark.parametrize("name", [".array_record", "a.array_record.gz", "a.array_record-1", "array_record"])
def test_names_that_are_not_of_array_records(tmp_path, name):
    (error,) = read(write(tmp_path, name, array_record(*EXAMPLES[:3])))[1]
    assert error.reason == "unknown_suffix" and ".array_record" in error.expected


def test_records_that_are_no_examples_cost_themselves_alone(tmp_path):
    path = write(
        tmp_path, "a.array_record", array_record(EXAMPLES[0], b"{}", b"", EXAMPLES[3], b"x" * 500, EXAMPLES[5])
    )
    rows, errors = read(path)
    assert rows == [ROWS[0], (3, {}), ROWS[3], ROWS[5]]
    assert [(error.where.row, error.reason) for error in errors] == [(2, "not_an_example"), (5, "not_an_example")]
    rows, errors = read(path, max_row_bytes=499)
    assert [row for row, _ in rows] == [1, 3, 4, 6]
    assert [(error.where.row, error.reason) for error in errors] == [(2, "not_an_example"), (5, "row_too_long")]


NO_ARRAY_RECORDS = {
    "nothing": b"",
    "text": b"tokens 1 2 3\n" * 9999,
    "zeros": bytes(1 << 17),
    "the first half": array_record(*EXAMPLES)[: len(array_record(*EXAMPLES)) // 2],
    "all but the last byte": array_record(*EXAMPLES)[:-1],
    "the last half": array_record(*EXAMPLES)[len(array_record(*EXAMPLES)) // 2 :],
}


@pytest.mark.parametrize("data", NO_ARRAY_RECORDS.values(), ids=NO_ARRAY_RECORDS)
def test_files_that_are_no_array_records(tmp_path, data):
    rows, (error,) = read(write(tmp_path, "a.array_record", data))
    assert (rows, error.reason, error.where.row) == ([], "damaged_array_record", 1)
    assert str(error) == (
        "a.array_record, row 1: found damaged ArrayRecord data, where reading ends; expected an intact ArrayRecord file"
    )


def test_array_records_without_any(tmp_path):
    (error,) = read(write(tmp_path, "a.array_record", array_record()))[1]
    assert (error.reason, error.where.row) == ("empty_file", None)


def test_what_stands_before_damaged_records_is_read(tmp_path):
    data = bytearray(array_record(*EXAMPLES, options="group_size:1,uncompressed"))
    at = data.index(EXAMPLES[120])
    data[at + 3] ^= 1
    rows, (error,) = read(write(tmp_path, "a.array_record", bytes(data)))
    assert rows == ROWS[:120] and (error.reason, error.where.row) == ("damaged_array_record", 121)


COLUMNS = [{"n": i, "t": f"é{i}", "o": {"x": [i / 4, None]}} for i in range(1500)]


@pytest.mark.parametrize("options", [{}, {"row_group_size": 7}, {"compression": "zstd"}, {"use_dictionary": False}])
@pytest.mark.parametrize("name", ["a.parquet", "A.Parquet", "train-00000-of-00001.parquet"])
def test_parquet(tmp_path, name, options):
    path = write(tmp_path, name, parquet_file(COLUMNS, **options))
    rows = [*enumerate(COLUMNS, start=1)]
    assert read(path) == (rows, [])
    with open(path, "rb", buffering=0) as file:
        assert read(path, raw=file) == (rows, [])


def column(kind, *values):
    return pa.array(values, kind)


TIME = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
VALUES = {  # name -> (a column, what is read of it)
    "null": (column(pa.string(), None, "x"), [{}, {"v": "x"}]),
    "nothing but null": (column(pa.null(), None), [{}]),
    "bytes": (column(pa.binary(), "é".encode(), None), [{"v": "é"}, {}]),
    "bytes of one length": (column(pa.binary(2), b"ab"), [{"v": "ab"}]),
    "bytes in lists": (column(pa.list_(pa.large_binary()), [b"a", None]), [{"v": ["a", None]}]),
    "a time": (column(pa.timestamp("us"), TIME), [{"v": "2020-01-02 03:04:05.000000"}]),
    "a time of a zone": (column(pa.timestamp("s", "UTC"), TIME), [{"v": "2020-01-02 03:04:05.000Z"}]),
    "nanoseconds": (column(pa.timestamp("ns"), 1), [{"v": "1970-01-01 00:00:00.000000001"}]),
    "a time in an object": (column(pa.struct({"t": pa.date32()}), {"t": TIME.date()}), [{"v": {"t": "2020-01-02"}}]),
    "a decimal number": (column(pa.decimal128(9, 2), decimal.Decimal("1.50")), [{"v": "1.50"}]),
    "half a float": (column(pa.float16(), 0.5), [{"v": 0.5}]),
    "large integers": (column(pa.uint64(), 2**64 - 1), [{"v": 2**64 - 1}]),
    "true and false": (column(pa.list_(pa.bool_()), [True, False]), [{"v": [True, False]}]),
    "categories": (column(pa.string(), "x", "y", "x").dictionary_encode(), [{"v": "x"}, {"v": "y"}, {"v": "x"}]),
    "a map": (column(pa.map_(pa.string(), pa.int32()), [("a", 1), ("b", None), ("a", 2)]), [{"v": {"a": 2}}]),
    "lists of one length": (column(pa.list_(pa.int32(), 2), [1, 2]), [{"v": [1, 2]}]),
    "null in objects": (
        column(pa.list_(pa.struct({"a": pa.int32(), "b": pa.struct({"c": pa.int32()})})), [{"a": 1}, {"b": {}}, None]),
        [{"v": [{"a": 1}, {"b": {}}, None]}],
    ),
}


@pytest.mark.parametrize("values, expected", VALUES.values(), ids=VALUES)
def test_values_of_parquet(tmp_path, values, expected):
    path = write(tmp_path, "a.parquet", parquet_file(pa.table({"v": values})))
    assert read(path) == ([*enumerate(expected, start=1)], [])


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.list_(pa.binary()), pa.struct({"x": pa.binary()})])
def test_bytes_that_are_not_text_cost_their_row_alone(tmp_path, kind):
    wrap = {pa.list_(pa.binary()): lambda v: [v], pa.struct({"x": pa.binary()}): lambda v: {"x": v}}.get(
        kind, lambda v: v
    )
    values = pa.array([wrap(each) for each in (b"a", b"\xff\xfe", b"c")], pa.binary() if kind == pa.string() else kind)
    values = values.view(pa.string()) if kind == pa.string() else values
    rows, (error,) = read(write(tmp_path, "a.parquet", parquet_file(pa.table({"v": values}))))
    assert rows == [(1, {"v": wrap("a")}), (3, {"v": wrap("c")})]
    assert (error.reason, error.where.row) == ("not_utf8", 2)
    assert str(error) == "a.parquet, row 2: found bytes that are not UTF-8; expected text in UTF-8"


def test_long_rows_of_parquet_cost_themselves_alone(tmp_path):
    path = write(tmp_path, "a.parquet", parquet_file([{"t": "x" * size} for size in (5, 500, 60, 5)]))
    assert len(read(path)[0]) == 4
    rows, (error,) = read(path, max_row_bytes=100)
    assert [row for row, _ in rows] == [1, 3, 4] and (error.reason, error.where.row) == ("row_too_long", 2)


NO_ROWS = {  # name -> (columns, what is told of them)
    "a name twice": (pa.table([[1], [2]], names=["n", "n"]), "columns of the same name"),
    "a name twice within": (
        pa.table({"n": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])}),
        "columns of the same name",
    ),
    "numbers for keys": (
        pa.table({"n": column(pa.map_(pa.int32(), pa.int32()), [(1, 2)])}),
        "a column of the type map<int32",
    ),
}


@pytest.mark.parametrize("made, told", NO_ROWS.values(), ids=NO_ROWS)
def test_columns_that_no_row_can_have(tmp_path, made, told):
    (error,) = read(write(tmp_path, "a.parquet", parquet_file(made)))[1]
    assert (error.reason, error.where.row) == ("wrong_columns", 1) and f"found {told}" in str(error)


def test_what_stands_before_damaged_columns_is_read(tmp_path):
    data = bytearray(parquet_file(COLUMNS[:9], row_group_size=3, write_page_checksum=True, compression="none"))
    data[data.index("é4".encode())] ^= 1
    rows, (error,) = read(write(tmp_path, "a.parquet", bytes(data)))
    assert rows == [*enumerate(COLUMNS[:3], start=1)] and (error.reason, error.where.row) == ("damaged_parquet", 4)
    assert str(error).endswith("cannot be read, where reading ends; expected an intact Parquet file")


class Failing(io.BytesIO):
    """Fails after some bytes, as a disk or a network does."""

    left = 1 << 20

    def read(self, size=-1):
        self.left -= size
        if self.left < 0:
            raise OSError("the network is gone")
        return super().read(size)


def test_a_disk_that_fails_is_no_damage():
    data = parquet_file([{"t": random.Random(i).randbytes(50).hex()} for i in range(9999)], row_group_size=999)
    assert len(list(read_items("a.parquet", raw=io.BytesIO(data)))) == 9999
    Failing.left = len(data) // 2
    with pytest.raises(OSError, match="the network is gone"):
        list(read_items("a.parquet", raw=Failing(data)))


class Slow(io.BytesIO):
    """Gives less than was asked for."""

    def read(self, size=-1):
        return super().read(min(size, 999) if size > 0 else size)


def test_short_reads_are_not_the_end():
    items = list(read_items("a.parquet", raw=Slow(parquet_file(COLUMNS))))
    assert [row for _, row in items] == COLUMNS


def test_batches_of_parquet_are_small_however_large_the_group(monkeypatch):
    sizes, values = [], parquet._Table.rows
    monkeypatch.setattr(parquet._Table, "rows", lambda self, batch: sizes.append(batch.num_rows) or values(self, batch))
    small, long = (
        [{"t": f"{i}"} for i in range(2000)],
        [{"t": random.Random(i).randbytes(1 << 19).hex()} for i in range(40)],
    )
    for made, most in ((small, 512), (long, 7)):
        sizes.clear()
        data = parquet_file(made, row_group_size=len(made))
        assert [row for _, row in read_items("a.parquet", raw=io.BytesIO(data))] == made
        assert sum(sizes) == len(made) and max(sizes) == most


def test_pyarrow_is_not_imported_for_other_files(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD)
    write(tmp_path, "a.parquet", parquet_file(table(COLUMNS[:2])))
    code = """if True:
        import sys
        from data_pipelines.files.records import read_rows
        for name in sys.argv[1:]:
            list(read_rows(name))
            print("pyarrow" in sys.modules)
    """
    names = [str(path), str(tmp_path / "a.parquet")]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
