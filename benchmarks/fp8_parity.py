"""Does FP8 train as well as bfloat16? FP8-LM's levels, its ablation of the optimizer's precision (arXiv:2310.18313,
table 6 and figure 8), sums of gradients and rounding of masters, at a size that a CPU trains.

    python benchmarks/fp8_parity.py --do=train                # all variants and seeds; continues where it stopped
    python benchmarks/fp8_parity.py --do=train --share=0/2    # every second run, for two processes side by side
    python benchmarks/fp8_parity.py --do=low                  # a trained model goes on at a low learning rate
    python benchmarks/fp8_parity.py --do=table

FP8-LM's GPT at 4 layers of 64 (0.33M parameters), with the paper's betas and weight decay, on the text of
package_text.py. A seed gives the initial weights and the order of the rows, the same for all variants, which are
compared seed by seed; no hyper-parameter differs between them.
CPUs have no FP8 products: codes are rounded as on a GPU, and multiplied in bfloat16, which holds them exactly, with
sums in float32.
"""

import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from own_step import with_huge_pages
from results import append, read, spread
from rows_of_text import Text, encode

NEAREST = {"optimizer.rounding": "nearest"}
O2 = {"numerics.fp8_level": "O2"}
RANKS = {"mesh.replica": 8, "mesh.fsdp": 1}
PARTS = {"train.accumulate": 8}
# config keys of each variant; #n are the rows of table 6, rounded to nearest as in the released code
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "O1": {"numerics.fp8_level": "O1"},
    "O2": O2,
    "O3": {"numerics.fp8_level": "O3"},
    "O3, window 16": {"numerics.fp8_level": "O3", "numerics.fp8_window": 16},
    "#2a: master FP16, m E4M3, v FP16": O2 | NEAREST,
    "#2b: master BF16": O2 | NEAREST | {"optimizer.master": "bf16"},
    "#3: master E4M3": O2 | NEAREST | {"optimizer.master": "e4m3"},
    "#4: v E4M3": O2 | NEAREST | {"optimizer.second_moment": "e4m3"},
    "8 ranks: bf16": RANKS,
    "8 ranks: O3, two shots": RANKS | {"numerics.fp8_level": "O3"},
    "8 ranks: O3, ring and mu": RANKS | {"numerics.fp8_level": "O3", "numerics.fp8_reduction": "ring"},
    "8 parts: bf16": PARTS,
    "8 parts: O3, sums float32": PARTS | {"numerics.fp8_level": "O3"},
    "8 parts: O3, sums E4M3": PARTS | {"numerics.fp8_level": "O3", "numerics.fp8_accumulate": "e4m3"},
}
# at the low rate, from the weights of the bf16 run
LOW: dict[str, dict[str, Any]] = {
    "bf16": {},
    "O2, stochastic": O2,
    "O2, nearest": O2 | NEAREST,
    "O2, master BF16, nearest": O2 | NEAREST | {"optimizer.master": "bf16"},
    "O2, master BF16, stochastic": O2 | {"optimizer.master": "bf16"},
}
VOCAB, LENGTH, ROWS = 2048, 128, 8
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
         "head_dim": 16, "vocab_size": VOCAB, "max_length": LENGTH, "init": "fan_in", "scan_layers": False}  # fmt: skip

DO = flags.DEFINE_enum("do", "table", ["train", "low", "table"], "what to do")
FOLDER = flags.DEFINE_string("folder", "runs/fp8_parity", "of the tokenizer and the results")
ONLY = flags.DEFINE_string("only", "", "variants with this in their name")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "to train with, or of the table")
STEPS = flags.DEFINE_integer("steps", 800, f"of {ROWS} x {LENGTH} tokens")
RATE = flags.DEFINE_float("learning_rate", 3e-3, "the peak; cosine to a tenth after 60 steps of warm-up")
LOW_RATE = flags.DEFINE_float("low_rate", 1e-5, "of --do=low, constant")
SHARE = flags.DEFINE_string("share", "0/1", "i/n: only the runs i, i + n, ... of the list")


class Run:
    """A model in training."""

    def __init__(self, keys: dict[str, Any], seed: int, text: Text, **optimizer: Any):
        import jax

        from data_pipelines.batches.loader import Loader
        from easylm_plus.config import base
        from easylm_plus.models.transformer import init_parameters
        from easylm_plus.parallel import sharding
        from easylm_plus.parallel.mesh import make_mesh
        from easylm_plus.training.assembly import assemble

        config = base("gpt-fp8-125m", **SHAPE)
        config.update_from_flattened_dict({"train.seed": seed, "objective.chunk": 2048, **keys})
        config.optimizer.update({"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, **optimizer})
        self.mesh = make_mesh(config.mesh, jax.devices()[: keys.get("mesh.replica", 1)])
        self.parts = assemble(config, self.mesh, 1, STEPS.value)
        self.use = lambda: sharding.use(self.mesh, self.parts.rules)
        self.text, self.losses = text, []
        self.loader = Loader(
            {"text": text.train}, None, encode, batch_size=ROWS, length=LENGTH, packing="none", seed=seed
        )
        with self.use():
            params = jax.jit(lambda: init_parameters(self.parts.model, jax.random.key(seed)))()
        self.start(params)

    def start(self, params: Any) -> None:
        """Begins with these parameters, which are as the model has them."""
        import jax

        with self.use():
            self.state = jax.jit(self.parts.make_state, out_shardings=self.parts.shardings)(params)

    def train(self, steps: int) -> None:
        with self.use():
            for _ in range(steps):
                self.state, metrics = self.parts.step(self.state, next(self.loader).arrays)
                self.losses.append(metrics["loss"])
                assert metrics["ok"], "a step was skipped"

    def heldout(self) -> float:
        """Loss of the masters."""
        from data_pipelines.batches.loader import evaluation_batches
        from easylm_plus.evaluation.loss import make_evaluate

        batches: Iterator = evaluation_batches(
            {"text": self.text.heldout}, encode, batch_size=16, length=LENGTH, packing="none"
        )
        with self.use():
            evaluate = make_evaluate(self.parts.objective, ["text"])
            return evaluate(self.state.params, (batch.arrays for batch in batches))["eval/loss"]


def train_one(variant: str, seed: int, text: Text) -> dict[str, Any]:
    """A run from random weights."""
    start = time.perf_counter()
    run = Run(
        VARIANTS[variant], seed, text, learning_rate=RATE.value, end_learning_rate=RATE.value / 10, warmup_steps=60
    )
    run.train(STEPS.value)
    tail = [float(loss) for loss in run.losses[-50:]]
    return {
        "variant": variant, "seed": seed, "learning_rate": RATE.value, "steps": STEPS.value,
        "train": statistics.mean(tail), "heldout": run.heldout(), "seconds": round(time.perf_counter() - start, 1),
        "data": text.hash,
    }  # fmt: skip


def low_one(seed: int, text: Text) -> Iterator[dict[str, Any]]:
    """All variants of LOW go on from the same trained weights, on the same rows."""
    first = Run({}, seed, text, learning_rate=RATE.value, end_learning_rate=RATE.value / 10, warmup_steps=60)
    first.train(STEPS.value)
    import jax
    import numpy as np

    weights, before = jax.device_get(first.state.params), first.heldout()
    for variant, keys in LOW.items():
        run = Run(keys, seed + 100, text, learning_rate=LOW_RATE.value, schedule="constant")
        run.start(jax.tree.map(np.asarray, weights))
        run.train(STEPS.value // 2)
        yield {
            "variant": variant, "seed": seed, "learning_rate": LOW_RATE.value, "steps": STEPS.value // 2,
            "before": before, "heldout": run.heldout(), "data": text.hash,
        }  # fmt: skip


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return row["variant"], row["seed"], row["learning_rate"], row["steps"]


def train_all(folder: Path) -> None:
    """Trains what the results do not have yet; one line each."""
    share, shares = map(int, SHARE.value.split("/"))
    todo = [(name, int(seed)) for seed in SEEDS.value for name in VARIANTS if ONLY.value in name]
    text = Text(folder, VOCAB, LENGTH)
    for run in todo[share::shares]:
        if (*run, RATE.value, STEPS.value) not in map(key, read(folder / "results.jsonl")):
            append(folder / "results.jsonl", train_one(*run, text))


def low_all(folder: Path) -> None:
    text = Text(folder, VOCAB, LENGTH)
    for seed in map(int, SEEDS.value):
        if not any(row["seed"] == seed for row in read(folder / "low.jsonl")):
            for row in low_one(seed, text):
                append(folder / "low.jsonl", row)


def table(folder: Path) -> None:
    """Prints the results: the gap to bf16 on as many ranks, seed by seed, and the spread of seeds."""
    rows = [row for row in read(folder / "results.jsonl") if key(row)[2:] == (RATE.value, STEPS.value)]
    losses = {name: {r["seed"]: r["heldout"] for r in rows if r["variant"] == name} for name in VARIANTS}
    print("| variant | seeds | held-out loss | against bf16 | in % |\n|---|---|---|---|---|")
    for name, mine in losses.items():
        base = losses[f"{name[:7]}: bf16" if name.startswith("8 ") else "bf16"]
        gaps = [mine[seed] - base[seed] for seed in mine if seed in base]
        if gaps:
            percent = 100 * statistics.mean(gaps) / statistics.mean(base.values())
            print(f"| {name} | {len(mine)} | {spread(mine.values(), '')} | {spread(gaps, '+')} | {percent:+.2f} |")
    rows = read(folder / "low.jsonl")
    print("\n| at the low rate | seeds | change of the held-out loss |\n|---|---|---|")
    for name in LOW:
        if changes := [row["heldout"] - row["before"] for row in rows if row["variant"] == name]:
            print(f"| {name} | {len(changes)} | {spread(changes, '+')} |")


def main(_: list[str]) -> None:
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    {"train": train_all, "low": low_all, "table": table}[DO.value](folder)


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from easylm_plus.parallel.cluster import set_backend_flags

    set_backend_flags("bf16", False)
    app.run(main)
