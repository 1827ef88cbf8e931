"""Reading: rows of files, or what a source makes up, as chunks of samples, with an account of every row.

This is the first stage. It differs from the others in what it counts: rows, not conversations. A row that does not
fit is repaired if its source knows how, and dropped with its place and a reason otherwise.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from data_pipelines import sources
from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.files import array_records
from data_pipelines.files.records import read_items
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.source import COMMON, PrepareError, Source, own_options

CHUNK = 1024  # rows

Chunk = tuple[list[Sample], Ledger]
Progress = Callable[[int], None]  # bytes read since the last call


@dataclass
class Reader:
    """Iterates over a source, chunk by chunk of CHUNK rows.

    max_turn_chars: of a turn, unless the source says otherwise. strict: raise the first row that does not fit.
    progress: is told of every piece that is read.
    """

    source: Source
    max_turn_chars: int
    strict: bool
    progress: Progress = lambda count: None

    def __post_init__(self) -> None:
        self.module, self.generated = self.source.module, self.source.generated
        own = {*own_options(self.module)} - {*COMMON}
        self.own = {key: value for key, value in self.source.options.items() if key in own}
        self.max_turn_chars = self.source.options.get("max_turn_chars") or self.max_turn_chars
        self.limit = self.source.options.get("limit") or float("inf")

    def chunks(self, files: tuple[str, ...] | None = None) -> Iterator[Chunk]:
        """Of these files, by default all; of a source that makes its text up, everything."""
        if self.generated:
            items = self.made_up()
        else:
            items = (item for file in files or self.source.files for item in self.rows_of(file))
        samples, ledger, kept = list[Sample](), Ledger(), 0
        for item in items:
            ledger.entered += 1
            if isinstance(item, DataError):
                self.reject(item, ledger)
            else:
                sample, repairs = item
                samples.append(sample)
                ledger.left, kept = ledger.left + 1, kept + 1
                ledger.changed.update(repairs)
            if ledger.entered == CHUNK or kept >= self.limit:
                yield samples, ledger
                samples, ledger = [], Ledger()
            if kept >= self.limit:
                return
        if ledger.entered:
            yield samples, ledger

    def rows_of(self, file: str) -> Iterator[tuple[Sample, list[str]] | DataError]:
        """A sample and its repairs, or an error, for every row."""
        separator: Any = self.source.options.get("separator") or getattr(self.module, "SEPARATOR", 1)
        local = self.source.folder.local(file)
        with _Watched(self.source.folder.open(file), self.progress) as raw:
            for item in read_items(file, name=file, raw=cast(BinaryIO, raw), local=local, separator=separator):
                yield item if isinstance(item, DataError) else self.sample(*item)
            raw.finish()
        if local and array_records.NAME.search(file):  # read past the watched file
            self.progress(self.source.folder.stamp(file)["bytes"])

    def sample(self, where: Where, row: sources.Row) -> tuple[Sample, list[str]] | DataError:
        try:
            conversations, repairs = self.convert(row, where)
            self.check(conversations, where)
        except DataError as error:
            return error
        return Sample(sources.row_id(where), self.named(conversations)), repairs

    def made_up(self) -> Iterator[tuple[Sample, list[str]] | DataError]:
        try:
            for number, made in enumerate(self.module.generate(**self.own), start=1):
                split, conversation = made if isinstance(made, tuple) else (None, made)
                try:
                    self.check([conversation], Where(f"<{self.source.name}>", number))
                except DataError as error:
                    yield error
                else:
                    yield Sample(conversation.id, self.named([conversation]), split), []
        except (ValueError, FileNotFoundError) as error:
            raise PrepareError(f"sources.{self.source.name}: {error}") from error

    def named(self, conversations: list[Conversation]) -> tuple[Conversation, ...]:
        return tuple(Conversation(self.source.name, c.id, c.turns, c.tools) for c in conversations)

    def convert(self, row: sources.Row, where: Where) -> tuple[list[Conversation], list[str]]:
        """Conversations, and the repairs that made them fit; DataError if nothing does."""
        repairs: Mapping[str, Callable[[sources.Row], sources.Row]] = {}
        if self.source.options.get("repair", True):
            repairs = getattr(self.module, "REPAIRS", {})
        done: list[str] = []
        while True:
            try:
                return self.module.convert(row, where, **self.own), done
            except DataError as error:
                if error.reason not in repairs or error.reason in done:
                    raise
                row = repairs[error.reason](row)
                done.append(error.reason)
            except Exception as error:
                error.add_note(f"while {self.module.__name__} converted {where}")
                raise

    def check(self, conversations: list[Conversation], where: Where) -> None:
        for conversation in conversations:
            sources.check(conversation, where, self.max_turn_chars)

    def reject(self, error: DataError, ledger: Ledger) -> None:
        if self.strict and not isinstance(error, sources.Filtered):
            raise error
        ledger.dropped[error.reason] += 1
        ledger.drops.append(dict(error.to_dict()))


class _Watched(io.RawIOBase):
    """A raw file that tells how much of it has been read. Where its end was sought, parts may be read twice or not at
    all: when it is finished all of its bytes have been told, and no more."""

    def __init__(self, raw: BinaryIO, progress: Progress):
        self._raw, self._progress = raw, progress
        self._size: int | None = None
        self._told = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._raw.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = self._raw.seek(offset, whence)
        if whence == io.SEEK_END:
            self._size = place - offset
        return place

    def readinto(self, buffer: Any) -> int:
        count: int = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._tell(count)
        return count

    def finish(self) -> None:
        if self._size is not None:
            self._tell(self._size)

    def _tell(self, count: int) -> None:
        more = count if self._size is None else min(count, self._size - self._told)
        self._told += more
        self._progress(more)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()
        super().close()
