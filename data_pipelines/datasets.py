"""Prepared data on disk, and the only code that knows TensorFlow Datasets.

    DIR/manifest.json                     what there is, with counts and hashes
    DIR/<source>/1.0.0/<source>-<split>.array_record-00000 …    one TFDS dataset per source, without TensorFlow
    DIR/rejects.jsonl, DIR/tokenizer/     see `prepare`

A record has one feature, "conversation": the text of `Conversation.to_json`. `tfds.data_source(source, split=…,
data_dir=DIR)` reads it as well. TFDS writes what it needs to know of them; the shards themselves are written here,
since TFDS would hash and shuffle the keys of the examples, and its SequentialWriter, which does not, takes four times
as long over the same bytes: records stay in the order in which they came. Reading does without TFDS, which takes a
third of a second to import.

The manifest, per source: kind, licence, weight, files (path, bytes, sha256); of reading, in rows: rows = kept_rows +
the sum of `rejected` (reason -> rows), repaired (reason -> rows); per stage, in conversations, of which a row may give
several: entered = left + the sum of `dropped` (reason -> conversations), changed, seen (see `chunk.Ledger`); and per
split: examples, characters, sha256 (of the records, each with a line break behind it, so `sha256sum` of the exported
JSON lines gives the same), shards (file -> bytes). What leaves a stage enters the next, and what leaves the last are
the examples of the splits. "hash" covers all of that except the shards, whose bytes depend on the version of the
compression.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.conversation import Conversation
from data_pipelines.disk import array_record_errors
from data_pipelines.errors import InputError, nearest

SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
DATASET_VERSION = "1.0.0"
FEATURE = "conversation"
SHARD = 65_536  # examples
RECORDS = "group_size:1,snappy"  # each alone, so that any can be read; docs/LOG.md has the other ways

Manifest = dict[str, Any]


class DatasetError(InputError):
    """Prepared data that is missing, damaged or does not have what was asked for."""


class Record(NamedTuple):
    """What one sample adds to a split: a line for each conversation, and how many characters their turns have."""

    split: str
    lines: Sequence[str]
    characters: int


def records_of(split: str, conversations: Iterable[Conversation]) -> Iterator[Record]:
    for conversation in conversations:
        yield Record(split, [conversation.to_json()], sum(len(turn.text) for turn in conversation.turns))


def write_source(directory: Path | str, source: str, records: Iterable[Record]) -> dict[str, Any]:
    """Writes the records as they come, and returns per split its examples, characters, sha256 and shards.

    Raises OSError where the disk is full or cannot be written to.
    """
    tfds = _tfds()
    folder = Path(directory) / source / DATASET_VERSION
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=source, version=tfds.core.Version(DATASET_VERSION), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict({FEATURE: tfds.features.Text()}))
    info.set_file_format("array_record")
    splits = {split: _Split(folder, source, split) for split in SPLITS}
    with array_record_errors(folder):
        for split, lines, characters in records:
            splits[split].add(lines, characters)
        for writing in splits.values():
            writing.close()
    infos = [writing.info(tfds) for writing in splits.values() if writing.lengths]  # an empty split is none, for TFDS
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(str(folder))
    return {split: writing.summary() for split, writing in splits.items()}


class _Split:
    """A split as it is written: SHARD examples a file, whose names are TFDS's."""

    def __init__(self, folder: Path, source: str, split: str):
        self.folder, self.source, self.split = folder, source, split
        self.lengths: list[int] = []  # of the shards
        self.digest, self.characters, self.bytes = hashlib.sha256(), 0, 0
        self._writer: Any = None

    def add(self, lines: Iterable[str], characters: int) -> None:
        self.characters += characters
        for line in lines:
            if self._writer is None or self.lengths[-1] == SHARD:
                self.close()
                self._writer = ArrayRecordWriter(str(self._shard(len(self.lengths))), RECORDS)
                self.lengths.append(0)
            content = line.encode()
            record = serialised(content)
            self._writer.write(record)
            self.digest.update(content + b"\n")
            self.bytes += len(record)
            self.lengths[-1] += 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _shard(self, number: int) -> Path:
        return self.folder / f"{self.source}-{self.split}.array_record-{number:05d}"

    def info(self, tfds: Any) -> Any:
        """What TFDS keeps of a split."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=str(self.folder),
            dataset_name=self.source,
            split=self.split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        )
        return tfds.core.SplitInfo(
            name=self.split, shard_lengths=self.lengths, num_bytes=self.bytes, filename_template=template
        )

    def summary(self) -> dict[str, Any]:
        """What the manifest says of it."""
        shards = [self._shard(number) for number in range(len(self.lengths))]
        return {
            "examples": sum(self.lengths),
            "characters": self.characters,
            "sha256": self.digest.hexdigest(),
            "shards": {shard.name: shard.stat().st_size for shard in shards},
        }


def serialised(content: bytes) -> bytes:
    """The tf.train.Example with one feature of one text: bytes within a BytesList within a Feature within an entry of
    a map within a Features within an Example."""
    entry = _NAME + _field(2, _field(1, _field(1, content)))
    return _field(1, _field(1, entry))


def text_of(record: bytes) -> bytes:
    """The text in what `serialised` made. Raises ValueError for other bytes."""
    at = 0
    for start in (b"\n", b"\n", _NAME + b"\x12", b"\n", b"\n"):
        if not record.startswith(start, at):
            raise ValueError(f"found the bytes {record[at : at + 8].hex(' ')}; expected a conversation")
        at, shift, size = at + len(start), 0, 0
        while True:  # a length
            byte = record[at] if at < len(record) else 0
            size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        if at + size != len(record):
            raise ValueError(f"found {len(record) - at} bytes; expected {size}")
    return record[at:]


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf that has a length: number and kind, the length in groups of 7 bits, the content."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes((number << 3 | 2, *length, size)) + content


class SourceDataset(Sequence[Conversation]):
    """The conversations of a split in their order, each read when asked for. Can be pickled."""

    def __init__(self, name: str, records: ArrayRecordDataSource | None):
        self.name, self._records = name, records  # None: no example

    def __len__(self) -> int:
        return 0 if self._records is None else len(self._records)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return self._many(range(*index.indices(len(self))))
        if self._records is None or not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: found index {index}; expected one of {len(self)} examples")
        try:
            return Conversation.from_json(text_of(self._records[index % len(self)]))
        except (RuntimeError, ValueError, KeyError) as error:
            raise DatasetError(f"{self.name}: example {index} is damaged ({error}); {_AGAIN}") from error

    def _many(self, indices: range) -> list[Conversation]:
        """Read together, which takes a sixth of the time."""
        if not indices or self._records is None:
            return []
        try:
            records = self._records.__getitems__(list(indices))
            return [Conversation.from_json(text_of(record)) for record in records]
        except (RuntimeError, ValueError, KeyError):
            return [self[i] for i in indices]  # which names the one that is damaged


class PairDataset(Sequence[tuple[Conversation, Conversation]]):
    """The comparisons of a split as (better, worse), in their order. Both have the same id but for its ending; where
    the worse one repeats turns of the better one, these weigh 0 there (see `sources.comparison`)."""

    def __init__(self, dataset: SourceDataset):
        if len(dataset) % 2:
            raise DatasetError(f"{dataset.name}: found {len(dataset)} examples; expected pairs of them")
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset) // 2

    @overload
    def __getitem__(self, index: int) -> tuple[Conversation, Conversation]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Conversation, Conversation]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[Conversation, Conversation] | list[tuple[Conversation, Conversation]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        better, worse = self._dataset[2 * place], self._dataset[2 * place + 1]
        row = better.id.removesuffix(":chosen")
        if (better.id, worse.id) != (f"{row}:chosen", f"{row}:rejected"):
            found = f"found {better.id} and {worse.id}"
            raise DatasetError(f"{self._dataset.name}: {found}; expected the two halves of a comparison")
        return better, worse


_AGAIN = "prepare the data again with --force"
_NAME = _field(1, FEATURE.encode())


def whole(folder: Path, splits: Mapping[str, Any]) -> bool:
    """Whether all shards are there, as large as `write_source` left them; `folder` is the source's own."""
    sizes = {name: size for entry in splits.values() for name, size in entry["shards"].items()}
    place = folder / DATASET_VERSION
    return all((place / name).is_file() and (place / name).stat().st_size == size for name, size in sizes.items())


def open_source(directory: Path | str, source: str, split: str) -> SourceDataset:
    """Random access to a split. Raises DatasetError where it does not exist or is not what the manifest says."""
    folder = Path(directory) / source / DATASET_VERSION
    sources = read_manifest(directory)["sources"]
    _one_of(source, sources, f"{directory}: source")
    splits = sources[source]["splits"]
    _one_of(split, splits, f"{directory}: split of {source}")
    name = f"{directory}: {source}, {split}"
    for shard, size in splits[split]["shards"].items():
        found = (folder / shard).stat().st_size if (folder / shard).exists() else None
        if found != size:
            state = "no file" if found is None else f"{found:,} bytes"
            raise DatasetError(f"{folder / shard}: found {state}; expected {size:,} bytes; {_AGAIN}")
    if not splits[split]["examples"]:
        return SourceDataset(name, None)
    try:
        records = ArrayRecordDataSource([str(folder / shard) for shard in sorted(splits[split]["shards"])])
    except Exception as error:  # it raises many kinds for files that it cannot make sense of
        raise DatasetError(f"{name}: cannot be read ({error}); {_AGAIN}") from error
    if len(records) != splits[split]["examples"]:
        expected = splits[split]["examples"]
        raise DatasetError(f"{name}: found {len(records)} examples; expected {expected}; {_AGAIN}")
    return SourceDataset(name, records)


def open_pairs(directory: Path | str, source: str, split: str) -> PairDataset:
    """The pairs of a source of comparisons, for learning which answer is preferred. Raises DatasetError as
    `open_source`, and for a source of anything else."""
    return PairDataset(open_source(directory, source, split))


def manifest_hash(manifest: Manifest) -> str:
    """sha256 over version, sources and tokenizer: what decides which examples there are, and in which order."""
    content: Manifest = json.loads(json.dumps({key: manifest.get(key) for key in ("version", "sources", "tokenizer")}))
    for entry in content["sources"].values():
        for split in entry["splits"].values():
            split.pop("shards", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path | str, manifest: Manifest) -> Manifest:
    """Checks the accounts, adds version and hash, writes. Written last: a folder with a manifest is complete."""
    for name, entry in manifest["sources"].items():
        check_accounts(name, entry)
    complete = {"version": MANIFEST_VERSION, **manifest}
    complete["hash"] = manifest_hash(complete)
    text = json.dumps(complete, indent=1, ensure_ascii=False)
    (Path(directory) / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return complete


def check_accounts(name: str, entry: Mapping[str, Any]) -> None:
    """Raises RuntimeError, which is a defect of a stage, if anything came from nowhere, or went there."""
    rows, kept, rejected = entry["rows"], entry["kept_rows"], sum(entry["rejected"].values())
    if rows != kept + rejected:
        raise RuntimeError(f"{name}: {rows} rows, {kept} kept, {rejected} rejected")
    for stage, accounts in entry["stages"].items():
        entered, left, dropped = accounts["entered"], accounts["left"], sum(accounts["dropped"].values())
        if entered != left + dropped:
            raise RuntimeError(f"{name}, {stage}: {entered} entered, {left} left, {dropped} dropped")
    examples = sum(split["examples"] for split in entry["splits"].values())
    for (stage, before), (following, after) in itertools.pairwise(
        [*entry["stages"].items(), ("write", {"entered": examples})]
    ):
        left, entered = before["left"], after["entered"]
        if left != entered:
            raise RuntimeError(f"{name}: {left} left {stage}, {entered} entered {following}")


def read_manifest(directory: Path | str) -> Manifest:
    """Raises DatasetError if there is none, if it was changed by hand, or if it is of another version."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise DatasetError(f"{directory}: found no such folder; expected one that data_pipelines.prepare wrote")
    if not path.exists():
        raise DatasetError(f"{path}: found no file; expected the manifest of prepared data in this folder")
    try:
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
        version, stored = manifest["version"], manifest["hash"]
        actual = manifest_hash(manifest) if version == MANIFEST_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: found a damaged manifest ({error!r}); {_AGAIN}") from error
    if actual is None:
        raise DatasetError(f"{path}: found version {version}; expected {MANIFEST_VERSION}; {_AGAIN}")
    if stored != actual:
        raise DatasetError(f"{path}: found the hash {stored}; expected {actual} for its content; {_AGAIN}")
    return manifest


def _one_of(name: str, known: Iterable[str], what: str) -> None:
    if name not in known:
        raise DatasetError(f"{what}: found {name!r}; expected one of {', '.join(known)}{nearest(name, known)}")


def _tfds() -> Any:
    """TFDS, which takes a second to import, told not to look for Google Cloud."""
    os.environ.setdefault("NO_GCE_CHECK", "true")
    import tensorflow_datasets

    return tensorflow_datasets
