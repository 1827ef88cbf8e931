"""Fine-tuning with LoRA on a base in bfloat16 and in NF4 (QLoRA) from the same weights: held-out loss.

    ./run.sh                                              # trains what both start from, runs/koala_tiny
    python benchmarks/qlora_sft.py --do=train             # both and all seeds; continues where it stopped
    python benchmarks/qlora_sft.py --do=table

The recipe is that of configs/koala_tiny.py (conversations in a chat template, loss on the answers only, best-fit
packing), with adapters of rank 16 beside all linear layers of the blocks and nothing else learning. A seed gives the
order of the data and the adapters' start. The loss is that of instances that no run has seen, before the first step and
after the last. That of the base in codes before the first step is what rounding costs where nothing makes up for it.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).parents[1]
VARIANTS = {"lora": "()", "qlora": "('layers=nf4_double',)"}  # numerics.rules
DO = flags.DEFINE_enum("do", "table", ["train", "table"], "what to do")
START = flags.DEFINE_string("start", "runs/koala_tiny", "the run whose weights all begin with")
SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "orders of the data")
STEPS = flags.DEFINE_integer("steps", 400, "of fine-tuning")
RANK = flags.DEFINE_integer("rank", 16, "of the adapters")
RATE = flags.DEFINE_float("learning_rate", 4e-3, "the peak; cosine to a tenth")
FOLDER = flags.DEFINE_string("folder", "runs/qlora_sft", "of the runs")


def place(variant: str, seed: str) -> Path:
    return Path(FOLDER.value) / f"{variant}_{seed}"


def train(variant: str, seed: str) -> None:
    keys: dict[str, Any] = {
        "log.dir": place(variant, seed), "init_from.path": START.value, "train.seed": seed, "train.steps": STEPS.value,
        "optimizer.learning_rate": RATE.value, "optimizer.end_learning_rate": RATE.value / 10,
        "optimizer.weight_decay": 0.0, "optimizer.warmup_steps": 20, "numerics.precision": "bf16",
        "numerics.rules": VARIANTS[variant], "numerics.lora": f"('layers={RANK.value}',)",
        "numerics.lora_alpha": float(RANK.value), "checkpoint.every": STEPS.value, "eval.every": STEPS.value,
        "eval.samples": 0,
    }  # fmt: skip
    arguments = ["--config=configs/koala_tiny.py", *(f"--config.{key}={value}" for key, value in keys.items())]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    subprocess.run([sys.executable, "-m", "easylm_plus.train", *arguments], cwd=ROOT, env=environment, check=True)


def train_all() -> None:
    for seed in SEEDS.value:
        for variant in VARIANTS:
            if not (place(variant, seed) / "checkpoints" / str(STEPS.value)).exists():
                train(variant, seed)


def losses(variant: str, seed: str) -> dict[int, float]:
    """Step -> held-out loss."""
    rows = map(json.loads, (place(variant, seed) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}


def table() -> None:
    """Seed by seed, and means with standard deviations."""
    print("| seed | LoRA, before | QLoRA, before | LoRA | QLoRA | QLoRA / LoRA |\n|---|---|---|---|---|---|")
    found = []
    for seed in SEEDS.value:
        lora, qlora = losses("lora", seed), losses("qlora", seed)
        found.append((lora[0], qlora[0], lora[STEPS.value], qlora[STEPS.value], qlora[STEPS.value] / lora[STEPS.value]))
        print(f"| {seed} | {' | '.join(f'{value:.4f}' for value in found[-1][:4])} | {found[-1][4] - 1:+.2%} |")
    means = [statistics.mean(column) for column in zip(*found, strict=True)]
    spread = [statistics.stdev(column) for column in zip(*found, strict=True)]
    cells = [f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in zip(means[:4], spread[:4], strict=True)]
    print(f"| mean | {' | '.join(cells)} | {means[4] - 1:+.2%} ± {spread[4]:.2%} |")


def main(_: list[str]) -> None:
    {"train": train_all, "table": table}[DO.value]()


if __name__ == "__main__":
    app.run(main)
