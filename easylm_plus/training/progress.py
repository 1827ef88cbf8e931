"""How far a run is: a live line in a terminal, a line now and then in a file."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS = 20.0  # between lines where there is no terminal


class ProgressLine:
    """Steps done, time used and left, and the last row of the log."""

    def __init__(self, console: Console, start: int, steps: int, enabled: bool):
        self._console, self._steps, self._enabled = console, steps, enabled
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not enabled or not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, shown="")
        self._first, self._began = start, time.monotonic()
        self._printed = self._began

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Shows that `step` steps are done; `row` is the last one written to the log."""
        self._bar.update(self._task, completed=step, shown=_shown(row))
        now = time.monotonic()
        if self._enabled and not self._console.is_terminal and (now - self._printed > SECONDS or step == self._steps):
            left = (now - self._began) / (step - self._first) * (self._steps - step)
            self._console.print(f"step {step}/{self._steps}  {left:,.0f} s left  {_shown(row)}", soft_wrap=True)
            self._printed = now

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def _shown(row: dict[str, Any]) -> str:
    if not row:
        return ""
    mfu = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    return f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"
