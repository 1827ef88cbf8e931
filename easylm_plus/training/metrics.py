"""Where a run's numbers go: a JSONL file and TensorBoard, both readable while it runs.

Every JSONL row has "step", and each (step, kind) stands there once, also after restarts: a resumed run first drops
the rows later than the checkpoint it starts from, since it will write them again.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter


class MetricsLog:
    """Writes rows of numbers and texts. On all processes but the first it swallows everything."""

    def __init__(self, directory: str | Path, start_step: int, owes_evaluation: bool = False, enabled: bool = True):
        self.enabled = enabled
        if not enabled:
            return
        self.path = Path(directory) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(self.path, start_step, owes_evaluation)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory), purge_step=start_step + 1)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """One row; numbers also go to TensorBoard. A value that is not finite is written as null."""
        if not self.enabled:
            return
        clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        self._file.write(json.dumps({"step": step, **clean}, ensure_ascii=False) + "\n")
        self._file.flush()  # so that the file can be followed
        for key, value in row.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def details(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers for TensorBoard only: too many for a row."""
        if self.enabled:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text for TensorBoard only, shown verbatim."""
        if self.enabled:
            self._board.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def flush(self) -> None:
        """Everything written so far is on disk: called before a checkpoint, which must not know more than the log."""
        if self.enabled:
            self._file.flush()
            self._board.flush()

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off within the JSON, or within a character
            break
    return rows


def _truncate(path: Path, last_step: int, owes_evaluation: bool) -> None:
    """Drops the rows after `last_step`, and that step's evaluation if it is still to be made.

    By way of a file beside it, so that a crash here loses nothing. A run that starts at 0 keeps none: there is no
    checkpoint at step 0, so it writes that step's rows again.
    """
    again = lambda row: owes_evaluation and row["step"] == last_step and any(key.startswith("eval/") for key in row)
    kept = [row for row in read_rows(path) if row["step"] <= last_step and not again(row)] if last_step else []
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    beside.replace(path)
