"""Files of Parquet, by pyarrow's own writer, for tests of what reads them."""

import io

import pyarrow
from pyarrow import parquet


def table(rows):
    """A column for every key of any row. Raises ArrowException where a column would have values of several types."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in names})


def parquet_file(made, **options):
    """The bytes of a file of these rows, or of this table."""
    file = io.BytesIO()
    parquet.write_table(made if isinstance(made, pyarrow.Table) else table(made), file, **options)
    return file.getvalue()


def without_nulls(value):
    """What a file has of a row: no fields that are null, nor such of objects in it."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
