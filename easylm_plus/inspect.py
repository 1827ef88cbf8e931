"""List what a checkpoint holds: names, shapes, dtypes and bytes.

python -m easylm_plus.inspect --checkpoint=runs/koala_tiny [--step=1000] [--only=params/]
"""

import math

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
    arrays = {n: info for n, info in read_meta(folder, step)["arrays"].items() if n.startswith(ONLY.value)}
    show = Table("name", "shape", "dtype", "bytes", title=f"{folder}/{step}")
    total = 0
    for name, info in arrays.items():
        size = math.prod(info["shape"]) * np.dtype(info["dtype"]).itemsize
        total += size
        show.add_row(name, "x".join(map(str, info["shape"])) or "scalar", info["dtype"], human(size))
    show.add_section()
    show.add_row(f"{len(arrays)} arrays", "", "", human(total))
    console.print(show)
    console.print(f"steps here: {', '.join(map(str, steps(folder)))}")
    return 0


if __name__ == "__main__":
    run(main)
