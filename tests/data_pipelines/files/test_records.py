"""Rows come out of every format, and every kind of broken file is named with its place."""

import gzip
import io
import json
import random
import tempfile
import time
import zlib

import pytest
from tf_examples import array_record, example

from data_pipelines.conversation import DataError
from data_pipelines.files import json_stream
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
    ("a.parquet", b"PAR1", "unknown_suffix", None, ["'.parquet'", ".jsonl"]),
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
