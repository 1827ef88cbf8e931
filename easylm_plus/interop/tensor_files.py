"""Tensors in files: safetensors read without copying, and written shard by shard in any order.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header with the
dtype, shape and byte range of every tensor, then the bytes. A tensor is mapped into memory when it is asked for, so
only what is in use counts; a shard is laid out before its first byte is written, so tensors may come from many threads.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from easylm_plus.errors import UserError
from easylm_plus.interop.copying import contiguous

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


class Tensors(Protocol):
    """A checkpoint of other people: arrays by their names, read one at a time."""

    place: str  # for messages

    def names(self) -> Set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


class Entry(NamedTuple):
    """Where a tensor lies."""

    path: Path
    code: str  # of its dtype
    shape: tuple[int, ...]
    offset: int


class Safetensors:
    """The tensors of some safetensors files; each tensor is in one of them."""

    def __init__(self, paths: Sequence[Path], place: str):
        self.place = place
        self.entries: dict[str, Entry] = {}
        for name, entry in (found for path in paths for found in _entries(path)):
            if name in self.entries:
                found = f"{name} in {self.entries[name].path.name} and in {entry.path.name}"
                raise UserError(f"{place}: found {found}, expected each tensor in one file")
            self.entries[name] = entry

    def names(self) -> Set[str]:
        return self.entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        code = self.entries[name].code
        if code not in DTYPES:
            raise UserError(f"{self.place}: {name} has dtype {code}, expected one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        """The tensor, mapped and read-only; its pages are given back when the last array on it is gone."""
        path, _, shape, offset = self.entries[name]
        return mapped(path, self.dtype(name), shape, offset)


def mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0) -> np.ndarray:
    """An array in a file, without reading it: read-only, and its pages are given back with the last array on it."""
    count = math.prod(shape)
    if not count:
        return np.empty(shape, dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + count * dtype.itemsize
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ)
    return np.frombuffer(pages, dtype, count, offset - start).reshape(shape)


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """The header's entries; the library has checked that they fit the file."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error})") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, info in header.items():
        if name == "__metadata__":
            continue
        yield name, Entry(path, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])


def safetensors_of(folder: Path) -> Safetensors | None:
    """All safetensors of a Hugging Face folder; those that its index names, where it has one; None: there are none."""
    paths, index = sorted(folder.glob("*.safetensors")), folder / INDEX
    if index.is_file():  # beside the parts there may be the same weights in another form
        paths = indexed(index)
    return Safetensors(paths, str(folder)) if paths else None


def indexed(index: Path) -> list[Path]:
    """The files that an index names. They lie beside it: a name that leads elsewhere is an error (a file that is itself
    a link is not, as Hugging Face's cache is made of those)."""
    told = read_json(index)
    weight_map = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: found no weight_map, expected the file of every tensor under that key")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.strip(".") or set(name) & set("/\\\0"):
            raise UserError(f"{index}: found {name!r} in weight_map, expected the name of a file beside it")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    if lost := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{index.parent}: {lost[0]} is not there; {index.name} names {len(paths)} files")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; an error that names it if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON file ({error})") from error


class Layout(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Safetensors files of at most `max_bytes`, laid out at once and filled in any order, from any thread.

    Tensors of one group stay together in one file. As transformers names them: model.safetensors, or
    model-00001-of-00003.safetensors and so on with an index.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[Layout]], max_bytes: int = SHARD_BYTES):
        shards: list[list[Layout]] = [[]]
        for group in groups:
            if shards[-1] and sum(x.nbytes for x in (*shards[-1], *group)) > max_bytes:
                shards.append([])
            shards[-1].extend(group)
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        self.paths = [folder / name for name in (names if len(shards) > 1 else ["model.safetensors"])]
        self._places: dict[str, tuple[int, int, Layout]] = {}
        self._files: list[int] = []
        for path, shard in zip(self.paths, shards, strict=True):
            self._files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            self._lay_out(self._files[-1], shard)
        if len(shards) > 1:
            weight_map = {x.name: path.name for path, shard in zip(self.paths, shards, strict=True) for x in shard}
            total = sum(x.nbytes for shard in shards for x in shard)
            text = json.dumps(
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2
            )
            (folder / INDEX).write_text(text + "\n", encoding="utf-8")

    def _lay_out(self, file: int, shard: Sequence[Layout]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for x in shard:
            header[x.name] = {"dtype": CODES[x.dtype], "shape": x.shape, "data_offsets": [end, end := end + x.nbytes]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        os.pwrite(file, struct.pack("<Q", len(text)) + text, 0)
        for x in shard:
            self._places[x.name] = (file, 8 + len(text) + header[x.name]["data_offsets"][0], x)

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts a tensor in its place; it must be what was announced."""
        file, at, layout = self._places.pop(name)
        if (array.shape, array.dtype) != (layout.shape, layout.dtype):
            raise ValueError(f"{name}: found {array.dtype}{array.shape}, announced {layout.dtype}{layout.shape}")
        rest = memoryview(contiguous(array).reshape(-1).view(np.uint8))
        while rest:
            written = os.pwrite(file, rest, at)
            rest, at = rest[written:], at + written

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the files; an error if all went well and a tensor was not written."""
        for file in self._files:
            os.close(file)
        if self._places and kind is None:
            raise ValueError(f"{min(self._places)} was announced and never written")


class Renamed:
    """Tensors whose names all get a prefix."""

    def __init__(self, tensors: Tensors, prefix: str):
        self.place, self._tensors = tensors.place, tensors
        self._old = {prefix + name: name for name in tensors.names()}

    def names(self) -> Set[str]:
        return self._old.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._old[name])

    def dtype(self, name: str) -> np.dtype:
        return self._tensors.dtype(self._old[name])

    def read(self, name: str) -> np.ndarray:
        return self._tensors.read(self._old[name])
