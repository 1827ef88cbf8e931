"""BitNet b1.58 beside LLaMA on the same tokens: what ternary weights cost, by size, and what rounding afterwards costs.

    python benchmarks/ternary_twin.py --do=sweep               # learning rates, one seed, the middle size
    python benchmarks/ternary_twin.py --do=train               # all sizes, kinds, seeds; continues where it stopped
    python benchmarks/ternary_twin.py --do=train --share=0/2   # every second run, for two processes side by side
    python benchmarks/ternary_twin.py --do=table

Kinds (arXiv:2402.17764 and its training tips, section 3):
    float     LLaMA: linear decay, weight decay 0.1
    ternary   the same shape with sub-norms, all seven matrices of a block ternary as they train; two stages of learning
              rate and weight decay
    rounded   `float` after training, its seven matrices rounded to ternary, its activations to 8 bits; not trained

A seed gives the initial weights, which both kinds share as far as they have them, and the order of the rows. The text
is that of package_text.py in rows of 256 tokens. Learning rates are those that a sweep found best at the middle size,
and at others in inverse proportion to the width (as Yang et al. 2022, arXiv:2203.03466, find for Adam).
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from own_step import with_huge_pages
from results import append, read, spread
from rows_of_text import Text, encode

VOCAB, LENGTH, ROWS = 2048, 256, 8
SIZES = (64, 128, 256)  # hidden
KINDS: dict[str, dict[str, Any]] = {
    "float": {"optimizer.schedule": "linear", "optimizer.weight_decay": 0.1},
    "ternary": {"model.sub_norms": True, "optimizer.schedule": "two_stage", "optimizer.weight_decay": 0.1,
                "optimizer.stage_weight_decay": 0.0},
}  # fmt: skip
SECOND = 2 / 3  # the second stage's line starts at this share of the first's, as in the paper: 1e-3 of 1.5e-3

DO = flags.DEFINE_enum("do", "table", ["sweep", "train", "table"], "what to do")
FOLDER = flags.DEFINE_string("folder", "runs/ternary_twin", "of the tokenizer and the results")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "to train with, or of the table")
HIDDEN = flags.DEFINE_list("hidden", list(map(str, SIZES)), "sizes to train")
STEPS = flags.DEFINE_integer("steps", 1000, f"of {ROWS} x {LENGTH} tokens")
RATES = flags.DEFINE_list("rates", ["float=4e-3", "ternary=8e-3"], "peak learning rates at the middle size")
SWEEP = flags.DEFINE_list("sweep", ["2e-3", "4e-3", "8e-3", "16e-3"], "peak learning rates of --do=sweep")
PRECISION = flags.DEFINE_string("precision", "bf16", "numerics.precision of both kinds")
SHARE = flags.DEFINE_string("share", "0/1", "i/n: only the runs i, i + n, ... of the list")


def configured(hidden: int, kind: str, seed: int, rate: float) -> Any:
    """The config of a run."""
    from easylm_plus.config import base
    from easylm_plus.numerics.rules import BITNET

    heads = hidden // 32
    config = base(
        "llama-7b", hidden_size=hidden, intermediate_size=3 * hidden, num_layers=4, num_heads=heads,
        num_kv_heads=heads, head_dim=32, vocab_size=VOCAB, max_length=LENGTH, tie_embeddings=True, init="fan_in",
        scan_layers=False, norm_eps=1e-5,
    )  # fmt: skip
    config.update_from_flattened_dict({"train.seed": seed, "objective.chunk": 2048, **KINDS[kind]})
    config.numerics.precision = PRECISION.value
    config.numerics.rules = BITNET if kind == "ternary" else ()
    config.optimizer.update(
        learning_rate=rate, stage_learning_rate=SECOND * rate, warmup_steps=50, b1=0.9, b2=0.95, clip_norm=1.0
    )
    return config


def train_one(hidden: int, kind: str, seed: int, rate: float, text: Text) -> dict[str, Any]:
    """A run, and what came out."""
    import jax

    from data_pipelines.batches.loader import Loader
    from easylm_plus.models.transformer import init_parameters
    from easylm_plus.numerics.rules import BITNET, attach
    from easylm_plus.parallel import sharding
    from easylm_plus.parallel.cluster import use_compilation_cache
    from easylm_plus.parallel.mesh import make_mesh
    from easylm_plus.training.assembly import assemble

    use_compilation_cache()
    config, start = configured(hidden, kind, seed, rate), time.perf_counter()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    parts = assemble(config, mesh, 1, STEPS.value)
    loader = Loader({"text": text.train}, None, encode, batch_size=ROWS, length=LENGTH, packing="none", seed=seed)
    losses = []
    with sharding.use(mesh, parts.rules):
        params = jax.jit(lambda: init_parameters(parts.model, jax.random.key(seed)))()
        state = jax.jit(parts.make_state, out_shardings=parts.shardings)(params)
        for _ in range(STEPS.value):
            state, metrics = parts.step(state, next(loader).arrays)
            losses.append(metrics["loss"])
        row = {
            "hidden": hidden, "kind": kind, "seed": seed, "learning_rate": rate, "steps": STEPS.value,
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "skipped": int(metrics["skipped"]), "train": statistics.mean(map(float, losses[-50:])),
            "heldout": heldout(parts, attach(state.params, config.numerics.rules), text), "data": text.hash,
        }  # fmt: skip
        if kind == "float":
            row["rounded"] = heldout(parts, attach(state.params, BITNET), text)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def heldout(parts: Any, params: Any, text: Text) -> float:
    """Loss in nats a token."""
    from data_pipelines.batches.loader import evaluation_batches
    from easylm_plus.evaluation.loss import make_evaluate

    batches = evaluation_batches({"text": text.heldout}, encode, batch_size=16, length=LENGTH, packing="none")
    return make_evaluate(parts.objective, ["text"])(params, (batch.arrays for batch in batches))["eval/loss"]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return row["hidden"], row["kind"], row["seed"], row["learning_rate"], row["steps"]


def train(folder: Path, todo: list[tuple[int, str, int, float]]) -> None:
    """Trains what the results do not have yet; one line each."""
    share, shares = map(int, SHARE.value.split("/"))
    text = Text(folder, VOCAB, LENGTH)
    for run in todo[share::shares]:
        rows = read(folder / "results.jsonl")
        if other := {row["data"] for row in rows} - {text.hash}:
            sys.exit(f"{folder}: found results on other data ({', '.join(other)}); expected {text.hash}; remove them")
        if (*run, STEPS.value) in map(key, rows):
            continue
        row = train_one(*run, text)
        append(folder / "results.jsonl", row)


def rate(kind: str, hidden: int) -> float:
    """The peak of a size: --rates, in inverse proportion to the width."""
    given = {kind: float(rate) for kind, _, rate in (pair.partition("=") for pair in RATES.value)}
    return given[kind] * SIZES[1] / hidden


def train_all(folder: Path) -> None:
    sizes = list(map(int, HIDDEN.value))
    train(folder, [(h, kind, int(seed), rate(kind, h)) for seed in SEEDS.value for h in sizes for kind in KINDS])


def sweep(folder: Path) -> None:
    train(folder, [(SIZES[1], kind, 0, float(rate)) for rate in SWEEP.value for kind in KINDS])


def table(folder: Path) -> None:
    """The sweep, and held-out losses by size: the gap seed by seed, in nats and as a ratio of perplexities."""
    rows = [row for row in read(folder / "results.jsonl") if row["steps"] == STEPS.value]
    print(f"| peak rate, hidden {SIZES[1]}, seed 0 | float | ternary |\n|---|---|---|")
    middle = {(r["learning_rate"], r["kind"]): r["heldout"] for r in rows if r["hidden"] == SIZES[1] and not r["seed"]}
    for peak in sorted({peak for peak, _ in middle}):
        print(f"| {peak:g} |", " | ".join(f"{middle.get((peak, kind), float('nan')):.4f}" for kind in KINDS), "|")
    print("\n| hidden | parameters | seeds | float | ternary | gap | perplexity | rounded | gap |\n" + "|---" * 9 + "|")
    chosen = [r for r in rows if r["learning_rate"] == rate(r["kind"], r["hidden"]) and str(r["seed"]) in SEEDS.value]
    for hidden in SIZES:
        of = {kind: {r["seed"]: r for r in chosen if (r["hidden"], r["kind"]) == (hidden, kind)} for kind in KINDS}
        seeds = sorted(of["float"].keys() & of["ternary"].keys())
        if not seeds:
            continue
        losses = {kind: [of[kind][seed]["heldout"] for seed in seeds] for kind in KINDS}
        after = [of["float"][seed]["rounded"] for seed in seeds]
        gaps, lost = ([b - a for a, b in zip(losses["float"], other)] for other in (losses["ternary"], after))
        ratio = statistics.mean(2.718281828**gap for gap in gaps)
        cells = [f"{of['float'][seeds[0]]['parameters']:,}", len(seeds), *map(spread, losses.values()), spread(gaps),
                 f"x {ratio:.3f}", spread(after), spread(lost)]  # fmt: skip
        print(f"| {hidden} |", " | ".join(map(str, cells)), "|")


def main(_: list[str]) -> None:
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    {"sweep": sweep, "train": train_all, "table": table}[DO.value](folder)


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from easylm_plus.parallel.cluster import set_backend_flags

    set_backend_flags("bf16", False)
    app.run(main)
