"""Chunks on disk, each found by what it was made of.

    STORE/<stage>/<key>.jsonl.gz    a header line, then a sample a line (`Sample.to_line`)
    STORE/<stage>/<key>.json        what a step other than a stage left, such as the list of a file's chunks

A key is a hash of the stage's code, of its options and of what it was given (the digest of a chunk's samples, or of a
file). So nothing is ever out of date: what is there can be used, and what is not has to be made. A changed option, a
changed stage or a changed input give other keys from there on, and the same keys elsewhere; a stage that changed but
gave the same samples as before changes nothing after it. Files are written under another name and renamed, so what a
killed run left is whole.

Code counts by its syntax tree: comments and docstrings do not. All that a module imports from this package counts with
it, and of other packages their versions.
"""

import ast
import contextlib
import fcntl
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.chunk import Ledger, Sample
from data_pipelines.errors import InputError

PACKAGE = "data_pipelines"


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


def key_of(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


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


def write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


@functools.cache
def code_of(module: str) -> str:
    """A hash of a module and of all that it imports; see above for what counts. Where the module is of another package,
    as a source may be, that package counts like this one."""
    trees: dict[str, str] = {}
    outside: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in trees:
            continue
        tree = _tree(name)
        trees[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        for imported in _imports(tree):
            if imported.partition(".")[0] in (PACKAGE, module.partition(".")[0]):
                waiting.append(imported)
            else:
                outside.add(imported.partition(".")[0])
    versions = {name: _version(name) for name in outside - sys.stdlib_module_names}
    return key_of(trees, versions, sys.version_info[:2], unicodedata.unidata_version)


def _tree(name: str) -> ast.Module:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that a program made up
        spec = None
    if spec is None or spec.origin is None:
        return ast.Module([], [])
    return ast.parse(Path(spec.origin).read_bytes())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names of modules. Of `from x import y` both x and x.y, where that is a module of this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.partition(".")[0] == PACKAGE:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in inner if _is_module(name))


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = _distributions().get(package)
        return importlib.metadata.version(names[0]) if names else ""


@functools.cache
def _distributions() -> Any:
    """Takes a fifth of a second: for packages whose distributions are called otherwise."""
    return importlib.metadata.packages_distributions()
