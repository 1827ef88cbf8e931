"""A folder that is written beside its place and moved there when it is whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".partial"  # of what a killed process leaves beside the place


def prefix(place: Path) -> str:
    """What the names of unfinished folders beside a place begin with."""
    return f".{place.name}."


@contextmanager
def beside(place: Path) -> Iterator[tuple[Path, Path]]:
    """(an empty folder to be written and then moved to `place`, where to put aside what stands there).

    Both are in a folder of this process's own, which is gone at the end, with what was not moved out of it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(SUFFIX, prefix(place), place.parent))
    try:
        new = own / "new"  # with the permissions of any new folder, which `own` does not have
        new.mkdir()
        yield new, own / "old"
    finally:
        shutil.rmtree(own, ignore_errors=True)
