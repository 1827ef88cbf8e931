"""Writing so that a killed run leaves nothing half done, and two runs do not meet."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.errors import InputError


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Only one process at a time works in a folder. Raises InputError if another does; a lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: found another {what} at work there; expected one at a time") from error
        yield


def write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


@contextlib.contextmanager
def array_record_errors(folder: Path) -> Iterator[None]:
    """ArrayRecord's writer tells what the system told it as a RuntimeError; this raises the OSError that it was."""
    try:
        yield
    except RuntimeError as error:
        full = os.strerror(errno.ENOSPC) in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(folder)) from error
