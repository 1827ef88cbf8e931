"""Results of long measurements: a line of JSON a run, so that what was stopped goes on where it was."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to the file, and prints it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean and standard deviation; `sign`: "+" writes that of a positive mean too."""
    values = list(values)
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):{sign}.4f} ± {deviation}"
