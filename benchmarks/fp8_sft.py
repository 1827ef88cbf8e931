"""Fine-tuning in bfloat16 and in FP8 (O3) from the same weights: held-out loss, and exact match of greedy answers.

    ./run.sh                                              # trains what both start from, runs/koala_tiny
    python benchmarks/fp8_sft.py --do=train               # all variants and seeds; continues where it stopped
    python benchmarks/fp8_sft.py --do=table

The recipe is that of configs/koala_tiny.py (conversations in a chat template, loss on the answers only, best-fit
packing) for 600 steps more, at half of its learning rate. A seed gives the order of the data; figures are those of
`easylm_plus.evaluate`, on instances that no run has seen.
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
VARIANTS = {"bf16": "none", "O3": "O3"}  # levels; all in bfloat16 beside
DO = flags.DEFINE_enum("do", "table", ["train", "table"], "what to do")
START = flags.DEFINE_string("start", "runs/koala_tiny", "the run whose weights all begin with")
SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "orders of the data")
STEPS = flags.DEFINE_integer("steps", 600, "of fine-tuning")
RATE = flags.DEFINE_float("learning_rate", 1e-3, "the peak; cosine to a tenth")
FOLDER = flags.DEFINE_string("folder", "runs/fp8_sft", "of the runs")


def place(variant: str, seed: str) -> Path:
    return Path(FOLDER.value) / f"{variant}_{seed}"


def train(variant: str, seed: str) -> None:
    """Fine-tunes and evaluates, as a person would."""
    run = place(variant, seed)
    keys: dict[str, Any] = {
        "log.dir": run, "init_from.path": START.value, "train.seed": seed, "train.steps": STEPS.value,
        "optimizer.learning_rate": RATE.value, "optimizer.end_learning_rate": RATE.value / 10,
        "numerics.precision": "bf16", "numerics.fp8_level": VARIANTS[variant],
        "checkpoint.every": STEPS.value, "eval.every": STEPS.value, "eval.samples": 0,
    }  # fmt: skip
    call("easylm_plus.train", "--config=configs/koala_tiny.py", *(f"--config.{k}={v}" for k, v in keys.items()))
    evaluate(run, run / "evaluation.json")


def evaluate(run: Path, output: Path) -> None:
    call("easylm_plus.evaluate", f"--checkpoint={run}", f"--output={output}", "--show=0")


def call(module: str, *arguments: str) -> None:
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, check=True)


def train_all() -> None:
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    evaluate(Path(START.value), folder / "start.json")
    for seed in SEEDS.value:
        for variant in VARIANTS:
            if not (place(variant, seed) / "evaluation.json").exists():
                train(variant, seed)


def table() -> None:
    """Means over seeds and their standard deviations; the gap of O3, seed by seed."""
    read = lambda path: json.loads(path.read_text())
    start = read(Path(FOLDER.value) / "start.json")
    found = {v: [read(place(v, seed) / "evaluation.json") for seed in SEEDS.value] for v in VARIANTS}
    names = [name for name in start if name.startswith("exact/")]
    for figures in (start, *(f for runs in found.values() for f in runs)):
        figures["exact, all tasks"] = statistics.mean(figures[name] for name in names)
    print("| figure | start | bf16 | O3 | O3 - bf16 |\n|---|---|---|---|---|")
    for name in ("eval/loss", "exact, all tasks", *names):
        scale = 100 if "exact" in name else 1
        values = {v: [scale * figures[name] for figures in runs] for v, runs in found.items()}
        gaps = [a - b for a, b in zip(values["O3"], values["bf16"], strict=True)]
        cells = (spread(values["bf16"], scale), spread(values["O3"], scale), spread(gaps, scale, "+"))
        unit = ", %" if scale == 100 else ""
        print(f"| {name}{unit} | {scale * start[name]:{'.1f' if scale == 100 else '.4f'}} | {' | '.join(cells)} |")


def spread(values: list[float], scale: int, sign: str = "") -> str:
    """Mean and standard deviation."""
    digits = 1 if scale == 100 else 4
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"


def main(_: list[str]) -> None:
    {"train": train_all, "table": table}[DO.value]()


if __name__ == "__main__":
    app.run(main)
