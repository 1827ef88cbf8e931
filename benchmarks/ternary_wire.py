"""What devices of fsdp send each other of the weights, ternary codes or bfloat16: the real step of BitNet and of LLaMA
in its shape, compiled ahead of time for a machine that is not here (planning/compiled.py).

    python benchmarks/ternary_wire.py [--sizes=700m,3b] [--machine=h100:1x4x8]

Needs the compilers (README.md); a compile takes one to three minutes on a quiet core. Gathers are counted once a round
of every loop, forwards and backwards and for each micro-batch (planning/wire.py). Gradients are not part of this: they
are summed in the compute dtype either way.
"""

import os
from pathlib import Path
from typing import Any

from absl import app, flags

MACHINE = flags.DEFINE_string("machine", "h100:1x4x8", "a name of planning/topology.py")
SIZES = flags.DEFINE_list("sizes", ["700m", "3b"], "of configs/bitnet_3b.py")
PARTS = flags.DEFINE_integer("parts", 2, "micro-batches of one row a device")

ROOT = Path(__file__).parents[1]


def gathered(size: str, twin: bool) -> tuple[dict[str, float], Any]:
    """({dtype: GB that are brought together in a step, as payload}, the compiled step)."""
    from easylm_plus.planning.compiled import compile_step
    from easylm_plus.planning.topology import machine
    from easylm_plus.planning.wire import wire_bytes
    from easylm_plus.training.data import load_config_file

    here = machine(MACHINE.value)
    config = load_config_file(f"{ROOT}/configs/bitnet_3b.py:size={size},twin={str(twin).lower()}")
    config.train.accumulate = PARTS.value
    config.data.batch_size = PARTS.value * len(here.devices)
    step = compile_step(config, here.devices, here.options)
    gathers = {dtype: t.payload / 1e9 for (kind, dtype), t in wire_bytes(step.hlo).items() if kind == "all-gather"}
    return gathers, step


def main(_: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    print("| model | weights | gathered a step, GB, by dtype | in all | matrices alone, against bf16 | peak, GiB |")
    print("|" + "---|" * 6)
    for size in SIZES.value:
        before = 0.0
        for twin in (True, False):
            by_dtype, step = gathered(size, twin)
            shapes = step.assembly.shapes
            ends = sum(x.size for name in ("embed_tokens", "lm_head") for x in jax.tree.leaves(shapes[name]))
            count = sum(x.size for x in jax.tree.leaves(shapes))
            # what is not a code is embedding and head, the same for both
            matrices = by_dtype.get("u8", 0.0) if not twin else 4 * (count - ends) * PARTS.value / 1e9
            ratio = "" if twin else f"1 / {before / matrices:.2f}"
            before = matrices
            text = ", ".join(f"{dtype} {gb:.3f}" for dtype, gb in sorted(by_dtype.items()))
            kind = "LLaMA, bf16" if twin else "BitNet, ternary"
            cells = [f"{size} {kind}", f"{count / 1e9:.3f}B", text, f"{sum(by_dtype.values()):.3f}", ratio,
                     f"{step.memory().peak / 2**30:.1f}"]  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    app.run(main)
