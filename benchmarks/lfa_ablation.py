"""Yuan 2.0's Table 1 (arXiv:2311.15786) at a size that a CPU trains: which filter of queries and keys lowers the loss.

    python benchmarks/lfa_ablation.py --do=train                  # all variants and seeds; continues where it stopped
    python benchmarks/lfa_ablation.py --do=train --share=0/2      # every second run, for two processes side by side
    python benchmarks/lfa_ablation.py --do=time                   # a step of each variant, alternately
    python benchmarks/lfa_ablation.py --do=table                  # the table, beside the paper's

The model is Yuan's (LLaMA's with tied embeddings and a feedforward of 4 H) with 4 layers of 64; the text is that of
package_text.py in rows of 256 tokens of one file each. A seed gives the initial weights, which variants share as far
as they have them, and the order of the rows; so variants are compared seed by seed. All train with one learning rate;
--variants=none --learning_rate=... is a sweep, whose runs the table leaves out.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from own_step import OwnStep, with_huge_pages
from results import append, read, spread
from rows_of_text import Text, encode

# the paper's rows, in its order: parameters in millions, ms an iteration, test loss
PAPER = {
    "none": (160.3, 577, 1.251),
    "ema": (160.6, 745, 1.2309),
    "conv1": (163.9, 596, 1.2444),
    "conv2": (167.4, 602, 1.2194),
    "conv3": (171.0, 605, 1.2171),
    "conv7": (185.1, 621, 1.2093),
    "two_convs": (167.4, 618, 1.2122),
    "yuan": (167.4, 631, 1.2069),
}
# what is trained: the paper's rows, and one convolution with the norm that the paper gives to the pair only
FILTERS: dict[str, dict[str, Any]] = {name: {"lfa_variant": name} for name in PAPER}
FILTERS["conv2_norm"] = {"lfa_variant": "conv2", "lfa_norm": True}
VOCAB, LENGTH, ROWS = 2048, 256, 4
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
         "head_dim": 16, "vocab_size": VOCAB, "max_length": LENGTH, "init": "fan_in", "scan_layers": False}  # fmt: skip

DO = flags.DEFINE_enum("do", "table", ["train", "time", "table"], "what to do")
FOLDER = flags.DEFINE_string("folder", "runs/lfa_ablation", "of the tokenizer and the results")
VARIANTS = flags.DEFINE_list("variants", list(FILTERS), "to train or time")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "to train with, or of the table")
STEPS = flags.DEFINE_integer("steps", 800, f"of {ROWS} x {LENGTH} tokens")
RATE = flags.DEFINE_float("learning_rate", 4e-3, "the peak; cosine to a tenth after 100 steps of warm-up")
SHARE = flags.DEFINE_string("share", "0/1", "i/n: only the runs i, i + n, ... of the list")
ROUNDS = flags.DEFINE_integer("rounds", 15, "alternations of --do=time")


def make_model(variant: str) -> Any:
    """The model with this filter."""
    from easylm_plus.models.families import preset
    from easylm_plus.models.transformer import Transformer
    from easylm_plus.numerics.precision import precision

    return Transformer(preset("yuan-2b", **FILTERS[variant], **SHAPE), precision("float32"))


def train_one(variant: str, seed: int, text: Text) -> dict[str, Any]:
    """A run: what it was and what came out."""
    import jax

    from data_pipelines.batches.loader import Loader, evaluation_batches
    from easylm_plus.config import base
    from easylm_plus.evaluation.loss import make_evaluate
    from easylm_plus.models.transformer import init_parameters
    from easylm_plus.objectives.lm import LanguageModel
    from easylm_plus.parallel.cluster import use_compilation_cache
    from easylm_plus.training.optimizer import adamw
    from easylm_plus.training.state import new_state
    from easylm_plus.training.step import make_train_step

    use_compilation_cache()
    steps, rate = STEPS.value, RATE.value
    config = base()
    config.optimizer.update(
        learning_rate=rate, end_learning_rate=rate / 10, warmup_steps=100, b2=0.99, weight_decay=0.1
    )
    model = make_model(variant)
    objective, optimizer = LanguageModel(model, 1), adamw(config.optimizer, steps)
    step = jax.jit(make_train_step(objective, optimizer, config.train), donate_argnums=0)
    state = new_state(init_parameters(model, jax.random.key(seed)), optimizer, ema=False)
    loader = Loader({"text": text.train}, None, encode, batch_size=ROWS, length=LENGTH, packing="none", seed=seed)
    evaluate = make_evaluate(objective, ["text"])
    heldout = lambda: (
        batch.arrays
        for batch in evaluation_batches({"text": text.heldout}, encode, batch_size=16, length=LENGTH, packing="none")
    )
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, next(loader).arrays)
        losses.append(metrics["loss"])
    return {
        "variant": variant, "seed": seed, "learning_rate": rate, "steps": steps, "tokens": steps * ROWS * LENGTH,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)), "train": float(sum(losses[-100:]) / 100),
        "heldout": evaluate(state.params, heldout())["eval/loss"],
        "seconds": round(time.perf_counter() - start, 1), "data": text.hash,
    }  # fmt: skip


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return row["variant"], row["seed"], row["learning_rate"], row["steps"]


def train_all(folder: Path) -> None:
    """Trains what the results do not have yet; one line each."""
    results = folder / "results.jsonl"
    share, shares = map(int, SHARE.value.split("/"))
    todo = [(variant, int(seed), RATE.value, STEPS.value) for seed in SEEDS.value for variant in VARIANTS.value]
    text = Text(folder, VOCAB, LENGTH)
    print(f"{text.bytes} bytes, {len(text.train):,} rows to train on, {len(text.heldout)} held out, hash {text.hash}")
    for run in todo[share::shares]:
        rows = read(results)
        if other := {row["data"] for row in rows} - {text.hash}:
            sys.exit(f"{results}: found results on other data ({', '.join(other)}); expected {text.hash}; remove it")
        if run in map(key, rows):
            continue
        append(results, train_one(*run[:2], text))


def time_all(folder: Path) -> None:
    """Seconds of a step by variant, all in turns in one process; the machine's load goes into the file."""
    import jax
    import numpy as np

    from easylm_plus.models.transformer import init_parameters

    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
    models = {variant: make_model(variant) for variant in VARIANTS.value}
    steps = {name: OwnStep(model, init_parameters(model, jax.random.key(0)), tokens) for name, model in models.items()}
    for run in steps.values():
        run(2)
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(ROUNDS.value):
        for variant, run in steps.items():
            times[variant].append(statistics.median(run(6)["seconds"][1:]))
    row = {"seconds": times, "load": os.getloadavg(), "cores": len(os.sched_getaffinity(0))}
    (folder / "times.json").write_text(json.dumps(row) + "\n")
    print("load", row["load"], "cores", row["cores"])
    for variant, seconds in times.items():
        print(f"{variant:10} best {min(seconds) * 1e3:.1f} ms, median {statistics.median(seconds) * 1e3:.1f} ms")


def table(folder: Path) -> None:
    """Prints the results of --steps, --learning_rate and --seeds as a table."""
    chosen = lambda row: key(row)[2:] == (RATE.value, STEPS.value) and str(row["seed"]) in SEEDS.value
    rows = list(filter(chosen, read(folder / "results.jsonl")))
    times = folder / "times.json"
    seconds = json.loads(times.read_text())["seconds"] if times.exists() else {}
    losses = {v: {r["seed"]: r["heldout"] for r in rows if r["variant"] == v} for v in FILTERS}
    sizes = {r["variant"]: r["parameters"] for r in rows}
    print("| filter | seeds | parameters | held-out loss | against none | step | paper: loss | against none | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variant, mine in losses.items():
        base = losses["none"]
        differences = [mine[seed] - base[seed] for seed in mine if seed in base]
        if not differences:
            continue
        ratios = [a / b for a, b in zip(seconds[variant], seconds["none"], strict=True)] if variant in seconds else []
        cells = [
            variant, len(mine), f"{sizes[variant]:,}", spread(list(mine.values()), ""), spread(differences, "+"),
            f"{statistics.median(ratios):.2f}" if ratios else "-", *printed(variant),
        ]  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|")


def printed(variant: str) -> tuple[str, ...]:
    """The paper's loss, its difference to the row without a filter, and the ratio of their times."""
    if variant not in PAPER:
        return "-", "-", "-"
    (_, ms, loss), (_, first_ms, first) = PAPER[variant], PAPER["none"]
    return f"{loss:.4f}", f"{loss - first:+.4f}", f"{ms / first_ms:.2f}"


def main(_: list[str]) -> None:
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    if unknown := set(VARIANTS.value) - set(FILTERS):
        sys.exit(f"--variants: found {', '.join(sorted(unknown))}; expected some of {', '.join(FILTERS)}")
    {"train": train_all, "time": time_all, "table": table}[DO.value](folder)


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    app.run(main)
