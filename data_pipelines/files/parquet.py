"""Parquet files, as which most data sets on Hugging Face are distributed: columns of values, in groups of rows.

A row is what the same row of a .jsonl file would be: text, numbers, true and false, lists and objects. Fields that are
null, of rows and of objects in them, are left out, because a column has a place for every field in every row, also for
an argument that this call of a tool does not have. Bytes are decoded as UTF-8; times, dates and decimal numbers become
text.

Memory: a batch of rows of some BATCH_BYTES and of BATCH_ROWS at most, however large the group, beside the pages that
they lie in; more where a long text is there once for many rows that have it.
"""

from collections.abc import Callable, Iterator
from io import SEEK_END
from typing import Any, BinaryIO

BATCH_BYTES, BATCH_ROWS = 8 << 20, 512
BUFFER = 1 << 20  # bytes of a column that are read at once

Row = dict[str, Any]
Unfit = tuple[str, str, str]  # found, expected, reason
Clean = Callable[[Any], Any]

DAMAGED = "Parquet data that is damaged or cannot be read", "an intact Parquet file", "damaged_parquet"
NOT_UTF8 = "bytes that are not UTF-8", "text in UTF-8", "not_utf8"


class Unreadable(Exception):
    """Why a file cannot be read, or not further: found, expected and reason."""


def rows(file: BinaryIO, max_row_bytes: int) -> Iterator[Row | Unfit]:
    """The rows of a file that can seek, in order, and in the place of one that does not fit, why. Raises Unreadable for
    bytes that are no Parquet file, or no longer; and what reading the file itself raises."""
    import pyarrow
    from pyarrow import parquet

    source = _Source(file)
    try:
        whole = parquet.ParquetFile(
            pyarrow.PythonFile(source, mode="r"),
            buffer_size=BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        table = _Table(whole.schema_arrow, max_row_bytes)
        for batch in _batches(whole):
            yield from table.rows(batch)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is not UTF-8
        if source.error:
            raise source.error from error
        raise Unreadable(*DAMAGED) from error


def _batches(whole: Any) -> Iterator[Any]:
    for group in range(whole.num_row_groups):
        about = whole.metadata.row_group(group)
        row_bytes = max(1, about.total_byte_size // max(1, about.num_rows))
        count = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
        yield from whole.iter_batches(count, row_groups=[group], use_threads=False)


class _Source:
    """A file as pyarrow wants it: what is read is all that was asked for, or the end. Remembers what reading raised."""

    closed = False
    error: Exception | None = None

    def __init__(self, file: BinaryIO):
        self.file = file
        self.end = file.seek(0, SEEK_END)

    def read(self, size: int) -> bytes:
        try:
            left = min(size, self.end - self.file.tell())  # a damaged file may ask for gigabytes
            parts = []
            while left > 0 and (part := self.file.read(left)):
                parts.append(part)
                left -= len(part)
        except Exception as error:
            self.error = error
            raise
        return b"".join(parts)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        """Is for who opened the file."""


class _Table:
    """Makes rows of batches of these columns."""

    def __init__(self, schema: Any, max_row_bytes: int):
        import pyarrow

        self.schema, self.max_row_bytes = schema, max_row_bytes
        _different(schema.names)
        self.plain = pyarrow.schema([field.with_type(_plain(field.type)) for field in schema])
        self.cleaners = [_cleaner(field.type) for field in self.plain]

    def rows(self, batch: Any) -> list[Row | Unfit]:
        if self.plain != self.schema:
            batch = batch.cast(self.plain, safe=False)  # which leaves it to `values` to tell what is not UTF-8
        return self.fitting(batch)

    def fitting(self, batch: Any) -> list[Row | Unfit]:
        unfit = f"a row of more than {self.max_row_bytes:,} bytes", "shorter rows", "row_too_long"
        if batch.nbytes <= self.max_row_bytes:
            try:
                return [*self.values(batch)]
            except UnicodeDecodeError:
                unfit = NOT_UTF8
        if batch.num_rows == 1:
            return [unfit]
        return [row for at in range(batch.num_rows) for row in self.fitting(batch.slice(at, 1))]

    def values(self, batch: Any) -> Iterator[Row]:
        columns = []
        for column, clean in zip(batch.columns, self.cleaners):
            values = column.to_pylist()
            columns.append([*map(clean, values)] if clean else values)
        for row in zip(*columns):
            yield {name: value for name, value in zip(self.plain.names, row) if value is not None}


def _different(names: list[str]) -> None:
    if len({*names}) < len(names):
        raise Unreadable("columns of the same name", "different names of the columns", "wrong_columns")


def _plain(kind: Any) -> Any:
    """The type that values of a type are read as."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _plain(kind.storage_type)
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_struct(kind):
        _different([field.name for field in kind])
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    if types.is_map(kind) and types.is_large_string(_plain(kind.key_type)):
        return pyarrow.map_(_plain(kind.key_type), _plain(kind.item_type))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        return pyarrow.float32() if types.is_float16(kind) else kind
    bytewise = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    if bytewise or types.is_string(kind) or types.is_large_string(kind):
        return pyarrow.large_string()
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pyarrow.string()
    raise Unreadable(f"a column of the type {kind}", "text, numbers, lists and objects", "wrong_columns")


def _cleaner(kind: Any) -> Clean | None:
    """What leaves out the fields that are null of the objects in a value; None where there are no objects."""
    from pyarrow import types

    each: Clean
    if types.is_struct(kind):
        inner = {field.name: _cleaner(field.type) or _as_it_is for field in kind}
        each = lambda value: {key: inner[key](one) for key, one in value.items() if one is not None}
    elif types.is_map(kind):
        clean = _cleaner(kind.item_type) or _as_it_is  # of a key twice the last counts, as in JSON
        each = lambda pairs: {key: clean(one) for key, one in dict(pairs).items() if one is not None}
    elif (types.is_list(kind) or types.is_large_list(kind)) and (within := _cleaner(kind.value_type)):
        each = lambda value: [*map(within, value)]
    else:
        return None
    return lambda value: None if value is None else each(value)


def _as_it_is(value: Any) -> Any:
    return value
