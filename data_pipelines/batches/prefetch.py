"""Makes batches in a background thread while the device works on the last one."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

from data_pipelines.batches.batch_stats import Batch


class _Loader(Protocol):
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...


class Prefetch:
    """Iterates over (batch, state after this batch), up to `depth` batches ahead of the consumer.

    The state belongs to the batch and not to where the thread is by then, so a checkpoint taken with it continues
    with the next batch the consumer would have seen. An exception of the loader is raised where its batch would
    have come. The loader must not be used elsewhere meanwhile. `close`, or leaving a `with` block, ends the thread.
    """

    def __init__(self, loader: _Loader, depth: int = 2):
        self._loader = loader
        self._queue: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(max(1, depth))
        self._closed = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        if self._closed.is_set():
            raise ValueError("the prefetch is closed")
        if self._end is None:
            batch, state, self._end = self._queue.get()
        if self._end is not None:
            raise self._end
        return batch, state

    def close(self) -> None:
        """Ends the thread and waits for it; what it made ahead is dropped. May be called more than once."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)  # makes room, so that a waiting `put` returns
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while not self._closed.is_set():
                batch = next(self._loader)
                self._queue.put((batch, self._loader.get_state(), None))
        except BaseException as error:  # StopIteration too: the consumer's __next__ raises it
            self._queue.put((None, None, error))
