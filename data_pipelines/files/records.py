"""Rows out of files: .json, .jsonl, .csv and .txt, each also as .gz, .parquet and .array_record, read as a stream.

`read_items` yields (Where, row); a row is an object with its fields. The row of a `Where` is, from 1:
  .jsonl  the line
  .json   the item of the array; or of the objects that follow one another, since many a .json holds JSON lines
  .csv    the record after the header, whose names become the keys; all values are text
  .txt    the document, as {"text": …}; see `separator`
  .parquet    the row, without its fields that are null; see `parquet`
  .array_record    the record, a tf.train.Example, as {feature: list of its values}; also .array_record-00000-of-00008

What does not fit is yielded as a DataError in its place; `read_rows` raises it instead. Reading goes on with the next
row where there is a safe place to go on from: the next line of .jsonl, the next record of .csv or .array_record, the
next row of .parquet. After a syntax error within .json, a damaged gzip, Parquet or ArrayRecord file or text that is not
UTF-8, there is none (in .jsonl and .parquet a row that is not UTF-8 costs that row alone): the rows before it have been
yielded, and the message says that reading ends there. Each error stands for one row.

Memory: one row at a time, a few times `max_row_bytes` at most; of an .array_record a group of records, as its writer
made it; of a .parquet some MiB of rows. Bytes and lines count in the unpacked file.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from data_pipelines.conversation import DataError, Where
from data_pipelines.errors import shown
from data_pipelines.files import array_records, parquet
from data_pipelines.files.json_stream import JsonError, json_values, syntax_error
from data_pipelines.files.tf_example import read_example

MAX_ROW_BYTES = 64 << 20
CHUNK = 1 << 20
ARRAY_RECORD, PARQUET = ".array_record", ".parquet"
CONTROLS = bytes({*range(32)} - {*b"\t\n\r"})

Row = tuple[Where, dict[str, Any]]
Items = Iterator[Row | DataError]


class _Stop(Exception):
    """Carries the error after which a file cannot be read on."""

    def __init__(self, error: DataError):
        self.error = error


def read_rows(path: Path | str, **options: Any) -> Iterator[Row]:
    """`read_items`, but the first error is raised."""
    for item in read_items(path, **options):
        if isinstance(item, DataError):
            raise item
        yield item


def read_items(
    path: Path | str,
    *,
    name: str | None = None,
    raw: BinaryIO | None = None,
    local: str | None = None,
    separator: int | str = 1,
    columns: Sequence[str] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Items:
    """Yields the rows of a file; see above for their form and for errors.

    `name` is what errors and `Where` call the file, by default its path. `raw` is the file already opened, for a
    caller that watches how far it is read; that of a .parquet can seek. All the same an .array_record is read at its
    path on this machine, `local`, and from a temporary copy where it has none. `separator` ends a document of a .txt
    file: a run of that many empty lines or more, or a mark such as "<|endoftext|>". `columns` are the names of the
    columns of a .csv file without a header.
    """
    reader = _Reader(name or str(path), max_row_bytes)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packed = suffixes[-1:] == [".gz"]
    of_records = array_records.NAME.search(Path(path).name) is not None
    kind = "".join((suffixes[:-1] if packed else suffixes)[-1:])
    reader.columns = columns
    readers = {".json": reader.json, ".jsonl": reader.jsonl, ".ndjson": reader.jsonl, ".csv": reader.csv}
    stopped: DataError | None = None
    try:
        if kind not in (*readers, ".txt") and not of_records and suffixes[-1:] != [PARQUET]:
            expected = f"{', '.join(readers)} or .txt, or that and .gz, or {PARQUET} or {ARRAY_RECORD}"
            reader.stop(f"the suffix {kind + '.gz' * packed!r}", expected, "unknown_suffix", whole=True)
        with raw or open(path, "rb", buffering=0) as file:
            if of_records:
                yield from reader.examples(file, local if raw else str(path))
            elif kind == PARQUET:
                yield from reader.parquet(file)
            else:
                reader.open(file, packed)
                yield from reader.text(separator) if kind == ".txt" else readers[kind]()
        if not reader.rows:
            reader.stop("no rows", "a row or more", "empty_file", whole=True)
    except _Stop as stop:
        stopped = stop.error
    except EOFError:
        stopped = reader.error("the end of the file within gzip data", "a complete gzip file", "truncated_gzip")
    except (gzip.BadGzipFile, zlib.error) as error:
        stopped = reader.error(f"damaged gzip data ({error})", "an intact gzip file", "damaged_gzip")
    if stopped:
        yield stopped


class _Reader:
    """One file: `row` is the last row that was read, `rows` how many were yielded or rejected."""

    stream: "io.BufferedReader[io.RawIOBase] | gzip.GzipFile"
    columns: Sequence[str] | None = None
    broken: tuple[str, str, str] | None = None  # what is wrong behind what was read
    damaged: Exception | None = None

    def __init__(self, name: str, max_row_bytes: int):
        self.name, self.max_row_bytes = name, max_row_bytes
        self.row = self.rows = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def error(self, found: str, expected: str, reason: str, whole: bool = False) -> DataError:
        """An error in the row after the last one, or in the whole file."""
        return DataError(Where(self.name, None if whole else self.row + 1), found, expected, reason)

    def stop(self, found: str, expected: str, reason: str, whole: bool = False) -> NoReturn:
        """An error after which nothing of the file is read, which the message says."""
        raise _Stop(self.error(found if whole else f"{found}, where reading ends", expected, reason, whole))

    def rejected(self, found: str, expected: str, reason: str) -> DataError:
        """An error in the last row; reading goes on."""
        self.rows += 1
        return DataError(Where(self.name, self.row), found, expected, reason)

    def accepted(self, value: object) -> Row | DataError:
        if not isinstance(value, dict):
            return self.rejected(shown(value), "an object {…}", "not_an_object")
        self.rows += 1
        return Where(self.name, self.row), value

    def open(self, file: BinaryIO, packed: bool) -> None:
        buffered = io.BufferedReader(cast(io.RawIOBase, file), CHUNK)
        start = buffered.peek(2)[:2]
        if packed and start and start != b"\x1f\x8b":
            found = f"a file that starts with the bytes {start.hex(' ')}"
            self.stop(found, "a gzip file, because of .gz", "not_gzip", whole=True)
        self.stream = stream = gzip.GzipFile(fileobj=buffered) if packed else buffered
        start = stream.peek(1 << 12)[: 1 << 12]
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.stop("UTF-16 text", "text in UTF-8", "not_utf8", whole=True)
        zipped = start.startswith(b"\x1f\x8b")
        controls = len(start) - len(start.translate(None, CONTROLS))  # a ninth of what is packed, none of a text
        if b"\0" in start and (zipped or controls > max(8, len(start) // 12) or controls > len(start) // 2):
            hint = " (a gzip file without .gz?)" if zipped else ""
            self.stop(f"a zero byte at byte {start.index(0)}{hint}", "a text file", "binary_file", whole=True)
        if start.startswith(codecs.BOM_UTF8):
            self.stream.read(len(codecs.BOM_UTF8))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(byte, line). Of a line that is too long only the start is kept, one byte more than allowed."""
        offset = self.stream.tell()
        while line := self.stream.readline(self.max_row_bytes + 1):
            size, last = len(line), line
            while len(line) > self.max_row_bytes and last and not last.endswith(b"\n"):
                last = self.stream.readline(CHUNK)
                size += len(last)
            yield offset, line
            offset += size

    def strings(self) -> Iterator[str]:
        """Lines of text, for formats in which a bad line cannot be left out."""
        for offset, line in self.lines():
            if len(line) > self.max_row_bytes:
                self.stop_too_long()
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                self.stop(*not_utf8(error, offset))

    def stop_too_long(self) -> NoReturn:
        self.stop(f"a row of more than {self.max_row_bytes:,} bytes", "shorter rows", "row_too_long")

    def jsonl(self) -> Items:
        for offset, line in self.lines():
            self.row += 1
            if len(line) > self.max_row_bytes:
                yield self.rejected(f"a line of more than {self.max_row_bytes:,} bytes", "shorter rows", "row_too_long")
                continue
            try:
                value = json.loads(text) if (text := line.decode().strip()) else None
            except UnicodeDecodeError as error:
                yield self.rejected(*not_utf8(error, offset))
            except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
                problem = syntax_error(error, self.row)
                yield self.rejected(problem.found, problem.expected, problem.reason)
            else:
                if text:
                    yield self.accepted(value)

    def characters(self, size: int) -> str:
        """About `size` further characters, none at the end. What stands before a byte that is not UTF-8 comes first."""
        text = ""
        while not text:
            if self.broken:
                self.stop(*self.broken)
            chunk = self.chunk(size)
            start = self.stream.tell() - len(chunk) - len(self.decoder.getstate()[0])
            try:
                text = self.decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                self.broken = not_utf8(error, start)
                text = error.object[: error.start].decode()
                continue
            if not chunk:
                break
        return text

    def chunk(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the file. What stands before damaged gzip data comes first."""
        if self.damaged:
            raise self.damaged
        parts: list[bytes] = []
        try:
            while size > 0 and (part := self.stream.read1(size)):
                parts.append(part)
                size -= len(part)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            if not parts:
                raise
            self.damaged = error
        return b"".join(parts)

    def json(self) -> Items:
        try:
            for value in json_values(self.characters, self.max_row_bytes):
                self.row += 1
                yield self.accepted(value)
        except JsonError as error:
            self.stop(error.found, error.expected, error.reason)

    def csv(self) -> Items:
        csv.field_size_limit(self.max_row_bytes)  # for the whole process; its default of 128 kB cuts long answers
        records = csv.reader(self.strings(), strict=True)
        try:
            header = list(self.columns or next(records, []))
        except csv.Error as error:
            self.stop(f"a header that is not CSV ({error})", "the names of the columns", "invalid_csv")
        if len(set(header)) < len(header) or not all(header[1:]):  # pandas leaves the name of its index empty
            self.stop(f"the header {header}", "different names of the columns", "invalid_csv")
        while True:
            try:
                fields = next(records, None)
            except csv.Error as error:
                self.row += 1
                yield self.rejected(f"a record that is not CSV ({error})", "fields with closed quotes", "invalid_csv")
                continue
            if fields is None:
                return
            if not fields:  # an empty line
                continue
            self.row += 1
            if len(fields) == len(header):
                yield self.accepted(dict(zip(header, fields)))
            else:
                yield self.rejected(
                    f"{len(fields)} fields", f"{len(header)}, as in the header {header}", "wrong_columns"
                )

    def parquet(self, file: BinaryIO) -> Items:
        try:
            for row in parquet.rows(file, self.max_row_bytes):
                self.row += 1
                yield self.accepted(row) if isinstance(row, dict) else self.rejected(*row)
        except parquet.Unreadable as error:
            self.stop(*error.args)

    def examples(self, file: BinaryIO, path: str | None) -> Items:
        """The records of an ArrayRecord file, which is read at its path where it has one."""
        with array_records.on_this_machine(file, path) as place:
            try:
                for record in array_records.records(place):
                    self.row += 1
                    yield self.example(record)
            except array_records.Damaged as error:
                self.stop(f"{error}", "an intact ArrayRecord file", "damaged_array_record")

    def example(self, record: bytes) -> Row | DataError:
        if len(record) > self.max_row_bytes:
            found = f"a record of more than {self.max_row_bytes:,} bytes"
            return self.rejected(found, "shorter records", "row_too_long")
        try:
            return self.accepted(read_example(record))
        except ValueError as error:
            return self.rejected(f"{error}", "a record that is a tf.train.Example", "not_an_example")

    def text(self, separator: int | str) -> Items:
        split = self.marked(separator) if isinstance(separator, str) else self.spaced(separator)
        document: list[str] = []
        size = 0
        for line in split:
            if line is not None:
                size += len(line)
                if size <= self.max_row_bytes:  # of a longer one nothing more is kept
                    document.append(line)
                continue
            text, too_long = "".join(document).strip("\n"), size > self.max_row_bytes
            document, size = [], 0
            if too_long:
                self.row += 1
                found = f"a document of more than {self.max_row_bytes:,} characters"
                yield self.rejected(found, "shorter documents", "row_too_long")
            elif text.strip():
                self.row += 1
                yield self.accepted({"text": text})

    def marked(self, mark: str) -> Iterator[str | None]:
        """Pieces of documents, and None at the end of each."""
        for line in self.strings():
            first, *others = line.replace("\r\n", "\n").split(mark)
            yield first
            for other in others:
                yield from (None, other)
        yield None

    def spaced(self, least: int) -> Iterator[str | None]:
        """As `marked`, for runs of empty lines; shorter runs belong to the document."""
        empty = 0
        for line in self.strings():
            line = line.replace("\r\n", "\n")
            if not line.strip():
                empty += 1
                if empty == least:  # at once: what follows may not be readable
                    yield None
                continue
            if 0 < empty < least:
                yield "\n" * empty
            empty = 0
            yield line
        yield None


def not_utf8(error: UnicodeDecodeError, offset: int) -> tuple[str, str, str]:
    byte = error.object[error.start]
    return f"byte {offset + error.start:,} is 0x{byte:02x}, which is not UTF-8", "text in UTF-8", "not_utf8"
