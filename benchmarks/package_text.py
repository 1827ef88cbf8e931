"""Text that stands on any machine with these packages installed: the Python sources and documents of site-packages.

Some hundred megabytes of code and English by many authors, for experiments that have to run without a download. What
there is depends on what is installed, so a result names its bytes; on one machine it is the same every time.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {".py", ".md", ".rst", ".txt"}
SIZES = range(1_000, 200_000)  # bytes of a file: no empty ones, no generated tables


class Document(NamedTuple):
    """A file's name under site-packages and its text."""

    name: str
    text: str


def documents(one_in: int, heldout_one_in: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: one in `one_in` files, and of these one in `heldout_one_in` is held out.

    The sha256 of a file's content decides both, so that a copy that another package ships cannot stand on both sides;
    of equal files the first is taken.
    """
    train, heldout, seen = [], [], set()
    for path, content in _files():
        digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        if digest % one_in or digest in seen:
            continue
        seen.add(digest)
        try:
            document = Document(str(path), content.decode())
        except UnicodeDecodeError:
            continue
        (heldout if digest // one_in % heldout_one_in == 0 else train).append(document)
    return train, heldout


def _files() -> Iterator[tuple[Path, bytes]]:
    """Names and contents in the order of the names."""
    root = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size in SIZES:
            yield path.relative_to(root), path.read_bytes()
