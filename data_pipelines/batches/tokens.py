"""Examples tokenised once and kept: what the loader would otherwise make of the conversations anew in every run.

    DIR/tokens/<source>/<split>-<key>/tokens-00000.array_record …    a record an example, `part_size` of them a file
                                      lengths.npy                    int32[n, 2]: ids, loss tokens; 0 0: nothing learned
                                      meta.json                      counts, files, what the key was made of

The key is a hash of what decides which ids an example has: the split's records (their sha256 in the manifest), the
template (name, text, longest example), the tokenizer (model and special tokens), the code of all of these
(`addresses.code_of`). A store whose key is another one is not found, so tokens are never stale; delete DIR/tokens to
free its space. Lengths alone tell how examples are packed (packing.py), so a loader reads the tokens of a batch when it
makes it and no sooner.

What changes from epoch to epoch (text_objective.py) cannot be kept, and is tokenised as it is drawn.

A record, little-endian: uint32[4] (ids n, runs of equal weights r, ids that were cut off, bytes of the name b);
uint32[r] lengths of the runs, float32[r] their weights; n ids, uint16 or, for vocabularies above 65,536, uint32; b
bytes of the conversation's id in UTF-8. Records are neither grouped nor compressed (docs/LOG.md), and TFDS is not
needed to read them. A damaged one does not go unnoticed: the format has a hash of each.

`write_part` makes one file from a range of the conversations, for as many processes as one likes; what a killed run has
finished is kept. `finish` puts the parts together; a folder without ".tmp" is complete.
"""

import collections
import io
import json
import os
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines.addresses import code_of, key_of
from data_pipelines.conversation import Conversation
from data_pipelines.datasets import DatasetError
from data_pipelines.disk import array_record_errors, write_whole
from data_pipelines.templates.template import Example, Template
from data_pipelines.tokenizers.tokenizer import Ids

VERSION = 1
FOLDER = "tokens"
SMALLEST, PART = 512, 65_536  # examples of a file, at least and at most
_BATCH = 512  # conversations tokenised together
_OPEN_FILES = 256
_HEAD = struct.Struct("<IIII")
_U4, _F4 = np.dtype("<u4"), np.dtype("<f4")
_AGAIN = "delete it and run python -m data_pipelines.tokenize again"


def store_path(directory: Path | str, source: str, split: str, split_hash: str, template: Template) -> Path:
    """Where the tokens of a split lie, or would. split_hash: sha256 of its records, as the manifest has it."""
    return Path(directory) / FOLDER / source / f"{split}-{key_of(_described(split_hash, template))[:16]}"


def _described(split_hash: str, template: Template) -> dict[str, Any]:
    return {
        "version": VERSION,
        "parts": [SMALLEST, PART],
        "split": split_hash,
        "template": template.fingerprint,
        "tokenizer": template.tokenizer.fingerprint,
        "special_tokens": sorted(template.tokenizer.special_tokens.items()),
        "code": code_of("data_pipelines.templates.template"),
    }


def to_record(conversation_id: str, example: Example | None, dtype: npt.DTypeLike) -> bytes:
    """The bytes of an example; None: nothing of it carries loss."""
    name = conversation_id.encode()
    if example is None:
        return _HEAD.pack(0, 0, 0, len(name)) + name
    weights = example.weights
    bounds = np.concatenate(((0,), np.flatnonzero(weights[1:] != weights[:-1]) + 1, (len(weights),)))
    starts, ends = bounds[:-1], bounds[1:]
    runs = (ends - starts).astype(_U4).tobytes(), weights[starts].astype(_F4).tobytes()
    head = _HEAD.pack(len(example.ids), len(ends), example.cut, len(name))
    return b"".join((head, *runs, example.ids.astype(dtype).tobytes(), name))


def from_record(record: bytes, dtype: np.dtype[Any]) -> tuple[str, Example]:
    """(conversation id, example); one without ids where nothing carries loss. Raises ValueError for other bytes."""
    if len(record) < _HEAD.size:
        raise ValueError(f"found {len(record)} bytes; expected {_HEAD.size} or more")
    size, count, cut, name = _HEAD.unpack_from(record)
    at = _HEAD.size + 8 * count
    expected = at + size * dtype.itemsize + name
    if len(record) != expected:
        raise ValueError(f"found {len(record)} bytes; expected {expected}")
    lengths = np.frombuffer(record, _U4, count, _HEAD.size)
    if (total := int(lengths.sum(dtype=np.int64))) != size:  # before as much memory as it says is taken
        raise ValueError(f"found runs of {total} weights; expected {size}")
    weights = np.frombuffer(record, _F4, count, _HEAD.size + 4 * count).repeat(lengths)
    ids = np.frombuffer(record, dtype, size, at).astype(np.int32)
    return record[expected - name :].decode(), Example(ids, weights, cut)


def part_size(examples: int) -> int:
    """Examples of a file, of so many in all: a sixteenth, so that processes share even a small split evenly."""
    return min(PART, max(SMALLEST, -(-examples // 16)))


def parts(examples: int) -> range:
    """The numbers of the parts of so many examples."""
    return range(-(-examples // part_size(examples)))


def write_part(
    conversations: Sequence[Conversation],
    template: Template,
    path: Path,
    part: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Tokenises the part-th `part_size` of the conversations into the unfinished store `path`, unless it was
    done before. progress: told how many more conversations are done. Raises OSError where the disk is full."""
    folder = _unfinished(path)
    folder.mkdir(parents=True, exist_ok=True)
    size = part_size(len(conversations))
    wanted = range(len(conversations))[part * size : (part + 1) * size]
    if _lengths_of(folder, part).is_file():
        progress(len(wanted))
        return
    dtype, lengths = _dtype(template), np.zeros((len(wanted), 2), np.int32)
    scratch = folder / f"{_file(part)}.{os.getpid()}"
    with array_record_errors(folder):
        writer = ArrayRecordWriter(str(scratch), "group_size:1,uncompressed")
        for start in range(0, len(wanted), _BATCH):
            some = conversations[wanted.start + start : min(wanted.start + start + _BATCH, wanted.stop)]
            for row, (conversation, example) in enumerate(zip(some, template.encode_many(some)), start):
                writer.write(to_record(conversation.id, example, dtype))
                if example is not None:
                    lengths[row] = len(example.ids), np.count_nonzero(example.row()[2])
            progress(len(some))
        writer.close()
    scratch.replace(folder / _file(part))
    write_whole(_lengths_of(folder, part), _array_bytes(lengths))  # last: a part with lengths is complete


def finish(path: Path, split_hash: str, template: Template, examples: int) -> None:
    """Puts the parts together, all of which must have been written, and gives the store its name."""
    folder = _unfinished(path)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [np.load(_lengths_of(folder, part)) for part in parts(examples)]
    write_whole(folder / "lengths.npy", _array_bytes(np.concatenate([np.zeros((0, 2), np.int32), *lengths])))
    files = {_file(part): (folder / _file(part)).stat().st_size for part in parts(examples)}
    meta = {
        **_described(split_hash, template),
        "max_length": template.max_length,
        "examples": examples,
        "ids": int(sum(part[:, 0].sum(dtype=np.int64) for part in lengths)),
        "dtype": _dtype(template).str,
        "part": part_size(examples),
        "files": files,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    folder.rename(path)
    for stray in set(path.iterdir()) - {path / name for name in ("meta.json", "lengths.npy", *files)}:
        stray.unlink()


def write_tokens(conversations: Sequence[Conversation], template: Template, path: Path, split_hash: str) -> None:
    """The whole store in this process, unless it is there. `path`: see store_path."""
    if not path.is_dir():
        for part in parts(len(conversations)):
            write_part(conversations, template, path, part)
        finish(path, split_hash, template, len(conversations))


class TokenStore:
    """The examples of a split, each read when asked for. Raises DatasetError for a store that is damaged."""

    def __init__(self, path: Path):
        self.path = path
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            lengths = np.load(path / "lengths.npy", mmap_mode="r", allow_pickle=False)
            self._dtype, self._part, files = np.dtype(meta["dtype"]), int(meta["part"]), dict(meta["files"])
            if lengths.shape != (meta["examples"], 2) or lengths.dtype != np.int32:
                raise ValueError(f"lengths {lengths.dtype}{lengths.shape} of {meta['examples']} examples")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path}: found damaged tokens ({error}); {_AGAIN}") from error
        for name, size in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise DatasetError(f"{path / name}: expected a file of {size:,} bytes; {_AGAIN}")
        self.ids: int = meta["ids"]
        self._lengths, self._files, self._lock = lengths, list(files), threading.Lock()
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._lengths)

    def positions(self, indices: npt.NDArray[np.int64]) -> Ids:
        """int32[n]: the positions that examples take, 0 where nothing carries loss."""
        ids, loss_tokens = self._lengths[indices].T
        return np.where(loss_tokens > 0, ids - 1, 0)

    def read(self, index: int) -> tuple[str, Example]:
        """(conversation id, example)."""
        part, row = divmod(index, self._part)
        try:
            with self._lock:  # a reader has one position
                reader = self._readers.get(part) or self._open(part)
                reader.seek(row)
                record = reader.read()
            return from_record(record, self._dtype)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DatasetError(f"{self.path}: example {index} is damaged ({error}); {_AGAIN}") from error

    def _open(self, part: int) -> Any:
        if len(self._readers) >= _OPEN_FILES:
            self._readers.popitem(last=False)[1].close()
        options = "readahead_buffer_size:0,max_parallelism:0"  # without them every seek reads megabytes
        self._readers[part] = ArrayRecordReader(str(self.path / self._files[part]), options)
        return self._readers[part]


def find(directory: Path | str, source: str, split: str, split_hash: str, template: Template) -> TokenStore | None:
    """The tokens of a split, if they lie beside its conversations."""
    if not stored(directory, source, split):
        return None  # the key takes a third of a second
    path = store_path(directory, source, split, split_hash, template)
    return TokenStore(path) if path.is_dir() else None


def stored(directory: Path | str, source: str, split: str) -> list[Path]:
    """All stores of a split, whatever they were made of."""
    found = (Path(directory) / FOLDER / source).glob(f"{split}-*")
    return sorted(path for path in found if path.suffix != ".tmp")


def _dtype(template: Template) -> np.dtype[Any]:
    return np.dtype("<u2" if template.tokenizer.vocab_size <= 1 << 16 else "<u4")


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _file(part: int) -> str:
    return f"tokens-{part:05d}.array_record"


def _lengths_of(folder: Path, part: int) -> Path:
    return folder / f"lengths-{part:05d}.npy"


def _array_bytes(array: Ids) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
