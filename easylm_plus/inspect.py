"""List what a checkpoint holds: names, shapes, dtypes and bytes. Codes and their factors are one line.

python -m easylm_plus.inspect --checkpoint=runs/koala_tiny [--step=1000] [--only=params/]
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from rich.table import Table

from easylm_plus.door import console, run
from easylm_plus.planning.memory import human
from easylm_plus.training.checkpoint import locate, read_meta, steps

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a run's folder or its checkpoint folder", required=True)
STEP = flags.DEFINE_integer("step", None, "the last by default")
ONLY = flags.DEFINE_string("only", "", "only arrays whose name starts with this")


def main() -> int:
    """Prints the table; reads no array."""
    folder, step = locate(CHECKPOINT.value, STEP.value)
    meta = read_meta(folder, step)
    found = {name: parts for name, parts in weights(meta).items() if name.startswith(ONLY.value)}
    show = Table("name", "shape", "dtype", "bytes", title=f"{folder}/{step}")
    total = 0
    for name, parts in found.items():
        size = sum(math.prod(info["shape"]) * np.dtype(info["dtype"]).itemsize for info in parts.values())
        total += size
        largest = max(parts.values(), key=lambda info: math.prod(info["shape"]))
        fields = ", ".join(f"{field} {info['dtype']}".strip() for field, info in parts.items())
        kind = f"{meta['leaves'][name]['type']}: {fields}" if name in meta.get("leaves", {}) else fields
        show.add_row(name, "x".join(map(str, largest["shape"])) or "scalar", kind, human(size))
    show.add_section()
    show.add_row(f"{sum(map(len, found.values()))} arrays", "", "", human(total))
    console.print(show)
    console.print(f"steps here: {', '.join(map(str, steps(folder)))}")
    return 0


def weights(meta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> {field: shape and dtype} of every typed leaf, and {"": shape and dtype} of what is a plain array."""
    found: dict[str, dict[str, Any]] = {}
    for name, info in meta["arrays"].items():
        owner, _, field = name.rpartition("/")
        owner, field = (owner, field) if owner in meta.get("leaves", {}) else (name, "")
        found.setdefault(owner, {})[field] = info
    return found


if __name__ == "__main__":
    run(main)
