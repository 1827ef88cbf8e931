"""Runs one function over many tasks: in this process, or on several, with a progress bar either way.

Processes are started afresh rather than forked: a fork of a process that runs JAX, or any other threads, may hang.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from data_pipelines.errors import InputError

REFRESH = 0.2  # seconds between two looks at how far the workers are
WORTH_A_LINE = 60  # seconds of a step after which a log, which shows no bars, is told that it is done

_advance: Callable[[int], None] = lambda count: None


def cores() -> int:
    """Those that this process may use, which a job's may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def advance(count: int) -> None:
    """Tells the bar that a task whose `total` is given came so much further. For use within a task."""
    _advance(count)


def _start(counter: Any) -> None:
    """Runs first in each process. A process ends with the one that started it, however that ends: otherwise it would
    wait for work for ever where that was killed."""
    global _advance
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def add(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _advance = add


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Workers:
    """`count` processes, started when first needed; 1: everything happens in this one. To be used in a `with` block."""

    def __init__(self, count: int):
        self.count = count
        self._counter: Any = None
        self._pool: ProcessPoolExecutor | None = None
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Starts the processes, which get ready while this one does."""
        if self.count > 1:
            for _ in range(self.count):
                self._started().submit(os.getpid)

    def run(
        self, title: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], total: int | None = None
    ) -> list[Any]:
        """`function(*task)` for each task, in their order. `total`: of what the tasks report by `advance`; without
        it the bar counts tasks. The first task, in their order, that raises ends the run with what it raised."""
        begun = time.monotonic()
        bar = self.bars.add_task(title, total=total or len(tasks))
        if self.count == 1 or len(tasks) < 2:
            results = list(self._here(function, tasks, bar, total))
        else:
            results = self._there(function, tasks, bar, total)
        self.bars.update(bar, completed=total or len(tasks))
        seconds = time.monotonic() - begun
        if self.bars.disable and seconds > WORTH_A_LINE:
            print(f"{title}: {len(tasks):,} tasks in {seconds:,.0f} s", file=sys.stderr, flush=True)
        return results

    def _here(
        self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], bar: TaskID, total: int | None
    ) -> Iterable[Any]:
        global _advance
        _advance = (lambda count: self.bars.advance(bar, count)) if total else (lambda count: None)
        for task in tasks:
            yield function(*task)
            if not total:
                self.bars.advance(bar)

    def _there(
        self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], bar: TaskID, total: int | None
    ) -> list[Any]:
        pool = self._started()
        self._counter.value = 0
        futures = [pool.submit(function, *task) for task in tasks]
        results = []
        for done, future in enumerate(futures):
            while not _finished(future):
                self.bars.update(bar, completed=self._counter.value if total else done)
            results.append(future.result())
        return results

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._counter = context.Value("q", 0)
            self._pool = ProcessPoolExecutor(self.count, context, _start, (self._counter,))
        return self._pool


def _finished(future: Future[Any]) -> bool:
    """Waits a moment for the future; whether it has a result, or an error, which is raised."""
    try:
        future.result(REFRESH)
    except TimeoutError:
        return future.done()
    except BrokenProcessPool as error:
        raise InputError("found a worker killed, perhaps for want of memory; expected room for --workers") from error
    return True
