"""Input files, on this machine or behind a URL (gs://, s3://, …), through fsspec.

A folder is given as a path or as a URL; its files are named by their paths below it, with forward slashes. What a URL's
scheme needs beside fsspec (gcsfs for gs://, s3fs for s3://) is for the user to install; the error names it.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from data_pipelines.errors import InputError

STAMPS = ("etag", "ETag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
BUFFER = 1 << 20  # bytes that a remote file is read ahead


@dataclass(frozen=True)
class Folder:
    """A folder of input files. Can be sent to another process."""

    url: str

    def __post_init__(self) -> None:
        self._opened()

    def _opened(self) -> tuple[Any, str]:
        try:
            return cast(tuple[Any, str], fsspec.core.url_to_fs(self.url))
        except (ValueError, ImportError) as error:  # a scheme that is unknown, or whose package is not installed
            raise InputError(f"{self.url}: found a folder that cannot be opened ({error})") from error

    def exists(self) -> bool:
        files, root = self._opened()
        return bool(files.exists(root))

    def glob(self, patterns: Iterable[str]) -> list[str]:
        """The files that match a pattern and none of the "!patterns", in the order of their names."""
        files, root = self._opened()
        found: set[str] = set()
        for pattern in patterns:
            bare = pattern.removeprefix("!")
            if not bare or bare.startswith("/") or ".." in bare.split("/"):
                raise InputError(f"found {pattern!r}; expected relative globs")
            if files.protocol[0] == "file":  # fsspec's glob passes over links
                matches = {path.as_posix() for path in Path(root).glob(bare) if path.is_file()}
            else:
                listed = files.glob(f"{root}/{bare}", detail=True)
                matches = {match for match, info in listed.items() if info["type"] == "file"}
            found = found - matches if pattern.startswith("!") else found | matches
        return sorted(path.removeprefix(root).lstrip("/") for path in found)

    def open(self, name: str) -> BinaryIO:
        files, root = self._opened()
        remote = {} if files.protocol[0] == "file" else {"block_size": BUFFER}
        return cast(BinaryIO, files.open(f"{root}/{name}", "rb", **remote))

    def local(self, name: str) -> str | None:
        """The path of a file, where it is on this machine."""
        files, root = self._opened()
        return f"{root}/{name}" if files.protocol[0] == "file" else None

    def stamp(self, name: str) -> dict[str, Any]:
        """Size in bytes, and what the system says of the file's last change, None if nothing: what tells that it is
        still the same."""
        files, root = self._opened()
        info = files.info(f"{root}/{name}")
        changed = next((info[key] for key in STAMPS if info.get(key)), None)
        if files.protocol[0] == "file":
            changed = os.stat(f"{root}/{name}").st_mtime_ns  # fsspec rounds it
        return {"bytes": int(info["size"]), "changed": None if changed is None else str(changed)}

    def sha256(self, name: str) -> str:
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
