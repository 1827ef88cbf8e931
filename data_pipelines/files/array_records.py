"""ArrayRecord files, which MaxText, grain and TFDS keep their data in: records of bytes, in groups that are compressed
together. What a record holds is for the reader to know.

Memory: a group of the file, which most writers make of one record.
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from array_record.python.array_record_module import ArrayRecordReader

NAME = re.compile(r"(?<=.)\.array_record(?=$|-\d+-of-\d+$)", re.IGNORECASE)  # of a file, or of one shard of several
DAMAGED = "damaged ArrayRecord data"
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # without them it reads megabytes ahead, in threads of its own


class Damaged(ValueError):
    """Bytes that are no ArrayRecord file, or no longer."""


def records(path: str) -> Iterator[bytes]:
    """The records of a file of this machine, in order. Raises Damaged where they end too early. What the library says
    of it is not told: it names the path, which may be that of a copy."""
    reader = ArrayRecordReader(path, _OPTIONS)
    try:
        for _ in range(reader.num_records()):
            yield reader.read()
        if not reader.ok():  # as which a file opens that is damaged at its end, with no records
            raise Damaged(DAMAGED)
    except RuntimeError as error:
        raise Damaged(DAMAGED) from error
    finally:
        with contextlib.suppress(RuntimeError):  # of a damaged file
            reader.close()


@contextlib.contextmanager
def on_this_machine(file: BinaryIO, path: str | None) -> Iterator[str]:
    """The path of a file: `path` itself, or without one that of a copy, which is there as long as the block."""
    if path is not None:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".array_record") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        yield copy.name
