"""What fine-tuning LLaMA at the Koala recipe takes on one GPU with adapters on a base in bfloat16, in NF4, and in NF4
with rounded absmaxes: memory by part, of the real step compiled ahead of time (planning/compiled.py).

    python benchmarks/qlora_memory.py --do=compile
    python benchmarks/qlora_memory.py --do=table

The step is that of configs/koala13b_qlora.py: rank 64 beside all linear layers, rows of 2048 tokens, blocks recomputed.
Needs the compiler for GPUs (README.md). The one that is compiled for has more memory than the 24 GB that are asked
about; the compiler's plan does not depend on it.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from absl import app, flags
from results import append, read

DO = flags.DEFINE_enum("do", "table", ["compile", "table"], "what to do")
MACHINE = flags.DEFINE_string("machine", "h100:1x1x1", "a name of planning/topology.py")
SIZES = flags.DEFINE_list("sizes", ["7b", "13b"], "of LLaMA")
BASES = flags.DEFINE_list("bases", ["bf16", "nf4", "nf4_double"], "what the base is kept as")
ROWS = flags.DEFINE_list("rows", ["1", "2", "4"], "of a micro-batch")
FOLDER = flags.DEFINE_string("folder", "runs/qlora_memory", "of the results")

ROOT = Path(__file__).parents[1]
CARD = 24e9  # bytes
PARTS = ("weights", "optimizer", "gradients", "vocabulary", "rest", "peak")


def experiment(size: str, base: str, rows: int) -> Any:
    """The config, with so many rows a micro-batch."""
    from easylm_plus.training.data import load_config_file

    config = load_config_file(f"{ROOT}/configs/koala13b_qlora.py:size={size}")
    config.numerics.rules = () if base == "bf16" else (f"layers={base}",)
    config.train.accumulate = config.data.batch_size // rows
    return config


def results() -> Path:
    return Path(FOLDER.value) / "results.jsonl"


def compile_one(**key: Any) -> None:
    """Adds what is found of a key to the results, if it is not there."""
    import jax

    from easylm_plus.parallel import sharding
    from easylm_plus.planning.compiled import compile_step
    from easylm_plus.planning.memory import estimate
    from easylm_plus.planning.topology import machine

    if any(known["key"] == key for known in read(results())):
        return
    here, config = machine(MACHINE.value), experiment(key["size"], key["base"], key["rows"])
    step = compile_step(config, here.devices, here.options)
    a, mesh = step.assembly, jax.tree.leaves(step.assembly.shardings.params)[0].mesh
    with sharding.use(mesh, a.rules):
        tokens = config.data.batch_size * config.data.length
        guess = estimate(a.state, a.shardings, a.model.config, a.model.precision, tokens, config.train.accumulate,
                         config.objective.chunk, a.numerics)  # fmt: skip
    found = {"key": key, "memory": dataclasses.asdict(step.memory()), "estimate": guess.total}
    jax.clear_caches()
    Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
    append(results(), found)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def table() -> None:
    """GiB by part; the card's 24 GB are 22.35 GiB."""
    columns = ["machine", "LLaMA", "base", "rows", *PARTS, "estimate", "24 GB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for found in read(results()):
        key, memory = found["key"], found["memory"]
        fits = "fits" if memory["peak"] < CARD else "does not"
        names = [str(key[name]) for name in ("machine", "size", "base", "rows")]
        print(f"| {' | '.join([*names, *(gib(memory[part]) for part in PARTS), gib(found['estimate']), fits])} |")


def main(_: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if DO.value == "table":
        table()
        return
    for size in SIZES.value:
        for base in BASES.value:
            for rows in ROWS.value:
                compile_one(machine=MACHINE.value, size=size, base=base, rows=int(rows))


if __name__ == "__main__":
    app.run(main)
