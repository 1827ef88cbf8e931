"""Chunks on disk, each found by what it was made of.

    STORE/<stage>/<key>.jsonl.gz    a header line, then a sample a line (`Sample.to_line`)
    STORE/<stage>/<key>.json        what a step other than a stage left, such as the list of a file's chunks

A key is a hash of the stage's code, of its options and of what it was given (the digest of a chunk's samples, or of a
file). So nothing is ever out of date: what is there can be used, and what is not has to be made. A changed option, a
changed stage or a changed input give other keys from there on, and the same keys elsewhere; a stage that changed but
gave the same samples as before changes nothing after it. Files are written under another name and renamed, so what a
killed run left is whole.
"""

import gzip
import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.disk import write_whole
from data_pipelines.stages.chunk import Ledger, Sample


@dataclass(frozen=True)
class Made:
    """A chunk in the store: where it is, a hash of its samples, how many these are, and what the stage did, without
    the list of drops, which may be long: that stays in the file (`read_drops`)."""

    path: str
    digest: str
    samples: int
    ledger: Ledger


class Store:
    """A folder of chunks; see above."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, stage: str, key: str, suffix: str = ".jsonl.gz") -> Path:
        return self.folder / stage / f"{key}{suffix}"

    def tidy(self) -> None:
        """Removes what runs that were killed had not finished. Only for whoever holds the folder's lock."""
        for path in [*self.folder.rglob("*.tmp")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def write_chunk(path: Path, samples: Sequence[Sample], stage: str, ledger: Ledger) -> Made:
    """Writes a chunk that is there whole or not at all."""
    content, digest = packed(samples, {stage: ledger})
    write_whole(path, content)
    return Made(str(path), digest, len(samples), replace(ledger, drops=[]))


def packed(samples: Sequence[Sample], ledgers: Mapping[str, Ledger]) -> tuple[bytes, str]:
    """The content of a chunk's file, and the digest of its samples. `ledgers`: those of the stages that it came
    through since it was last written."""
    lines = "".join([sample.to_line() + "\n" for sample in samples]).encode()
    digest = hashlib.sha256(lines).hexdigest()
    accounts = {stage: vars(ledger) for stage, ledger in ledgers.items()}
    header = {"digest": digest, "samples": len(samples), "ledgers": accounts}
    text = json.dumps(header, ensure_ascii=False).encode() + b"\n" + lines
    return gzip.compress(text, compresslevel=1, mtime=0), digest


def unpacked(content: bytes) -> tuple[list[Sample], dict[str, Ledger]]:
    """What `packed` was given."""
    first, *lines = _lines(content)
    ledgers = json.loads(first)["ledgers"]
    return [Sample.from_line(line) for line in lines], {stage: _ledger(fields) for stage, fields in ledgers.items()}


def made_before(path: Path, stage: str) -> Made | None:
    """What the header of a chunk says; None if there is no such chunk, or only what a power cut left of it."""
    try:
        return read_made(path, stage)
    except (OSError, EOFError, ValueError, KeyError, zlib.error):
        return None


def read_made(path: Path | str, stage: str) -> Made:
    """What the header of a chunk says."""
    header = _header(path)
    ledger = _ledger(header["ledgers"][stage] | {"drops": []})
    return Made(str(path), header["digest"], header["samples"], ledger)


def read_drops(path: Path | str, stage: str) -> list[dict[str, Any]]:
    """What the stage dropped, in order."""
    drops: list[dict[str, Any]] = _header(path)["ledgers"][stage]["drops"]
    return drops


def _header(path: Path | str) -> dict[str, Any]:
    with gzip.open(path, "rb") as file:
        header: dict[str, Any] = json.loads(file.readline())
    return header


def _ledger(fields: Mapping[str, Any]) -> Ledger:
    counted = {name: Counter(fields[name]) for name in ("dropped", "changed")}
    seen = {table: Counter(counts) for table, counts in fields["seen"].items()}
    return Ledger(**{**fields, **counted, "seen": seen})


def read_samples(path: Path | str) -> Iterator[Sample]:
    yield from map(Sample.from_line, read_lines(path))


def read_lines(path: Path | str) -> list[str]:
    """The samples of a chunk as they are written."""
    return _lines(Path(path).read_bytes())[1:]


def _lines(content: bytes) -> list[str]:
    return gzip.decompress(content).decode().split("\n")[:-1]
