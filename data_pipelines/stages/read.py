"""Reading: rows of files, or what a source makes up, as chunks of samples, with an account of every row.

This is the first stage. It differs from the others in what it counts: rows, not conversations. A row that does not
fit is repaired if its source knows how, and dropped with its place and a reason otherwise.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

from data_pipelines import sources
from data_pipelines.chunk import Ledger, Sample
from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.records import read_rows
from data_pipelines.settings import COMMON, PrepareError, Source

CHUNK = 1024  # rows

Sink = Callable[[list[Sample], Ledger], None]
Progress = Callable[[int], None]  # bytes read since the last call


@dataclass
class Reader:
    """Reads a source and hands chunks of CHUNK rows to `sink`.

    strict: raise the first row that does not fit. max_turn_chars: of a turn, unless the source says otherwise.
    """

    source: Source
    max_turn_chars: int
    strict: bool
    sink: Sink
    progress: Progress = lambda count: None
    kept: int = 0  # rows, of all chunks
    _samples: list[Sample] = field(default_factory=list)
    _ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.max_turn_chars = self.source.options.get("max_turn_chars") or self.max_turn_chars
        self.limit = self.source.options.get("limit") or float("inf")

    def read(self, files: tuple[str, ...] | None = None) -> None:
        """Reads these files, by default all; of a source that makes its text up, everything."""
        if self.source.generated:
            samples = self.generated()
        else:
            samples = (sample for file in files or self.source.files for sample in self.rows_of(file))
        for sample in samples:
            self.kept += 1
            self._samples.append(sample)
            self._ledger.left += 1
            self._full()
            if self.kept >= self.limit:
                break
        if self._ledger.entered:
            self._hand_over()

    def rows_of(self, file: str) -> Iterator[Sample]:
        separator: Any = self.source.options.get("separator") or getattr(self.source.module, "SEPARATOR", 1)
        with _Watched(self.source.folder.open(file), self.progress) as raw:
            stream = cast(BinaryIO, raw)
            rows = read_rows(file, name=file, raw=stream, on_error=self.unreadable, separator=separator)
            for where, row in rows:
                self._ledger.entered += 1
                try:
                    conversations, repairs = self.convert(row, where)
                    self.check(conversations, where)
                except DataError as error:
                    self.reject(error)
                    continue
                self._ledger.changed.update(repairs)
                yield Sample(sources.row_id(where), self.named(conversations))

    def generated(self) -> Iterator[Sample]:
        options = {key: value for key, value in self.source.options.items() if key not in COMMON}
        try:
            for number, made in enumerate(self.source.module.generate(**options), start=1):
                self._ledger.entered += 1
                split, conversation = made if isinstance(made, tuple) else (None, made)
                try:
                    self.check([conversation], Where(f"<{self.source.name}>", number))
                except DataError as error:
                    self.reject(error)
                    continue
                yield Sample(conversation.id, self.named([conversation]), split)
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, DataError):
                raise
            raise PrepareError(f"sources.{self.source.name}: {error}") from error

    def named(self, conversations: list[Conversation]) -> tuple[Conversation, ...]:
        return tuple(replace(conversation, source=self.source.name) for conversation in conversations)

    def convert(self, row: sources.Row, where: Where) -> tuple[list[Conversation], list[str]]:
        """Conversations, and the repairs that made them fit; DataError if nothing does."""
        repairs: Mapping[str, Callable[[sources.Row], sources.Row]] = {}
        if self.source.options.get("repair", True):
            repairs = getattr(self.source.module, "REPAIRS", {})
        done: list[str] = []
        while True:
            try:
                return self.source.module.convert(row, where), done
            except DataError as error:
                if error.reason not in repairs or error.reason in done:
                    raise
                row = repairs[error.reason](row)
                done.append(error.reason)
            except Exception as error:
                error.add_note(f"while {self.source.module.__name__} converted {where}")
                raise

    def check(self, conversations: list[Conversation], where: Where) -> None:
        for conversation in conversations:
            sources.check(conversation, where, self.max_turn_chars)

    def unreadable(self, error: DataError) -> None:
        self._ledger.entered += 1
        self.reject(error)

    def reject(self, error: DataError) -> None:
        if self.strict and not isinstance(error, sources.Filtered):
            raise error
        self._ledger.dropped[error.reason] += 1
        self._ledger.drops.append(dict(error.to_dict()))
        self._full()

    def _full(self) -> None:
        if self._ledger.entered >= CHUNK:
            self._hand_over()

    def _hand_over(self) -> None:
        samples, ledger = self._samples, self._ledger
        self._samples, self._ledger = [], Ledger()
        self.sink(samples, ledger)


class _Watched(io.RawIOBase):
    """A raw file that tells how much of it has been read."""

    def __init__(self, raw: BinaryIO, progress: Progress):
        self._raw, self._progress = raw, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._progress(count)
        return count

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()
        super().close()
