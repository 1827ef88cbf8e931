"""Perplexity against bits and against zeros: post-training quantisation and pruning of a model that is trained here.

    python benchmarks/post_training.py --do=train      # 3.9M weights on package_text.py, some 15 minutes on two cores
    python benchmarks/post_training.py --do=measure    # all schemes; continues where it stopped
    python benchmarks/post_training.py --do=table      # what came out, as Markdown

    python benchmarks/post_training.py --do=measure --run=runs/koala_tiny --folder=runs/post_training_koala_tiny

Only the matrices of the blocks are made smaller (embed=keep), so that the figures are theirs. Calibration reads rows
that the model was trained on, perplexity is that of all tokens of held-out rows.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from own_step import with_huge_pages
from results import append, read
from rows_of_text import Text, encode

VOCAB, LENGTH, ROWS = 2048, 256, 8
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
         "head_dim": 64, "vocab_size": VOCAB, "max_length": LENGTH, "init": "fan_in"}  # fmt: skip
DO = flags.DEFINE_enum("do", "table", ["train", "measure", "table"], "what to do")
FOLDER = flags.DEFINE_string("folder", "runs/post_training", "of the tokenizer, the model and the results")
RUN = flags.DEFINE_string("run", "", "measure this run on its own data, in the place of the model of --do=train")
STEPS = flags.DEFINE_integer("steps", 2000, f"of {ROWS} x {LENGTH} tokens")
ONLY = flags.DEFINE_string("only", "", "regular expression: measure only the schemes that it is found in")
CALIBRATION = flags.DEFINE_integer("calibration", 128, f"rows of {LENGTH} tokens to calibrate with")
HELDOUT = flags.DEFINE_integer("heldout", 128, "held-out rows to measure on")
RATE = flags.DEFINE_float("learning_rate", 2e-3, "the peak; cosine to a tenth after 100 steps of warm-up")

BITS = [f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)]
GROUPED = [
    f"int{bits}:group=64,method={method}{more}"
    for more in ("", ",asym")
    for bits in (4, 3, 2)
    for method in ("rtn", "gptq", "awq")
]
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
PRUNING = ("magnitude", "wanda", "sparsegpt")
SPARSE = [f"sparse:share={share},method={method}" for share in SHARES for method in PRUNING]
FOURS = [f"2:4:method={method}" for method in PRUNING]
COLUMNS = [f"int{bits}:method={method}" for bits in (4, 3) for method in ("gptq", "awq")]
OTHERS = ["nf4", "nf4:double", "fp8", "ternary", *COLUMNS, "int3:group=64,method=gptq,asym,act_order"]
SCHEMES = [*BITS, *GROUPED, *FOURS, *SPARSE, *OTHERS]


def train(folder: Path) -> None:
    """Trains the model and writes it as a checkpoint."""
    import dataclasses

    import jax

    from data_pipelines.batches.loader import Loader, evaluation_batches
    from easylm_plus.config import base
    from easylm_plus.evaluation.loss import make_evaluate
    from easylm_plus.models.families import preset
    from easylm_plus.models.transformer import Transformer, init_parameters, stack_layers
    from easylm_plus.numerics.precision import precision
    from easylm_plus.objectives.lm import LanguageModel
    from easylm_plus.parallel.cluster import use_compilation_cache
    from easylm_plus.training.checkpoint import write_parameters
    from easylm_plus.training.optimizer import adamw
    from easylm_plus.training.state import new_state
    from easylm_plus.training.step import make_train_step

    use_compilation_cache()
    text, config = Text(folder, VOCAB, LENGTH), base()
    print(f"{text.bytes} bytes, {len(text.train):,} rows to train on, {len(text.heldout)} held out, hash {text.hash}")
    rate, steps = RATE.value, STEPS.value
    config.optimizer.update(
        learning_rate=rate, end_learning_rate=rate / 10, warmup_steps=100, b2=0.99, weight_decay=0.1
    )
    model = Transformer(preset("tiny", scan_layers=False, **SHAPE), precision("float32"))
    objective, optimizer = LanguageModel(model, 1), adamw(config.optimizer, steps)
    step = jax.jit(make_train_step(objective, optimizer, config.train), donate_argnums=0)
    state = new_state(init_parameters(model, jax.random.key(0)), optimizer, ema=False)
    loader = Loader({"text": text.train}, None, encode, batch_size=ROWS, length=LENGTH, packing="none", seed=0)
    start = time.perf_counter()
    for n in range(steps):
        state, metrics = step(state, next(loader).arrays)
        if n % 100 == 99:
            print(n + 1, round(float(metrics["loss"]), 4), f"{time.perf_counter() - start:.0f} s", flush=True)
    heldout = [
        batch.arrays
        for batch in evaluation_batches({"text": text.heldout}, encode, batch_size=16, length=LENGTH, packing="none")
    ]
    loss = make_evaluate(objective, ["text"])(state.params, heldout)["eval/loss"]
    params = stack_layers(jax.device_get(state.params))
    described = {
        "model": {**dataclasses.asdict(model.config), "scan_layers": True},
        "numerics": {"precision": "float32", "rules": []},
        "data": {"path": "", "length": LENGTH, "date": "", "template": "text"},
    }
    write_parameters(folder / "model", params, {"config": described, "config.json": None})
    row = {"heldout": loss, "steps": steps, "tokens": steps * ROWS * LENGTH, "data": text.hash}
    (folder / "model" / "trained.json").write_text(json.dumps(row) + "\n")
    print(row, sum(x.size for x in jax.tree.leaves(params)))


def measure(folder: Path) -> None:
    """Adds a line to the results for each scheme that they do not have yet."""
    import jax

    from easylm_plus.compression.schemes import scheme
    from easylm_plus.compression.walk import walk
    from easylm_plus.numerics.formats import decode
    from easylm_plus.numerics.precision import precision
    from easylm_plus.parallel.cluster import use_compilation_cache

    use_compilation_cache()
    results = folder / "results.jsonl"
    weights, calibration, heldout, told = of_a_run(RUN.value) if RUN.value else of_text(folder)
    if other := {row["data"] for row in read(results)} - {told}:
        sys.exit(f"{results}: found results of {', '.join(other)}; expected {told}, or another --folder")
    for asked in SCHEMES:
        if asked in {row["scheme"] for row in read(results)} or not re.search(ONLY.value, asked):
            continue
        chosen, bits, start = scheme(asked), [], time.perf_counter()

        def smaller(name: str, w: Any, seen: Any, chosen: Any = chosen, bits: Any = bits) -> Any:
            """As it multiplies; decoded where that is the same, so that all schemes share compiled programs."""
            leaf = chosen(name, w, seen)
            bits.append((8 * sum(x.nbytes for x in jax.tree.leaves(leaf)), w.size))
            return leaf if chosen.name == "ternary" else decode(leaf)

        result = walk(weights, precision("float32"), smaller, lambda _, w: w, calibration if chosen.calibrated else (),
                      heldout)  # fmt: skip
        row = {
            "scheme": asked, "bits": sum(b for b, _ in bits) / sum(n for _, n in bits), "before": result.before,
            "after": result.after, "seconds": round(time.perf_counter() - start, 1), "data": told,
        }  # fmt: skip
        append(results, row)


def of_text(folder: Path) -> tuple[Any, ...]:
    """(weights, calibration batches, held-out batches, what they are) of the model that was trained here."""
    from data_pipelines.batches.loader import evaluation_batches

    text = Text(folder, VOCAB, LENGTH)
    cut = lambda rows, count: [
        batch.arrays
        for batch in evaluation_batches(
            {"text": rows[:: len(rows) // count][:count]}, encode, batch_size=16, length=LENGTH, packing="none"
        )
    ]
    told = f"{text.hash}, {CALIBRATION.value} and {HELDOUT.value} rows of {LENGTH}"
    return held(folder / "model"), cut(text.train, CALIBRATION.value), cut(text.heldout, HELDOUT.value), told


def of_a_run(path: str) -> tuple[Any, ...]:
    """The same of a run on prepared data, whose examples are conversations and whose answers count."""
    from easylm_plus.compression.quantize import rows_of
    from easylm_plus.training.checkpoint import locate, read_meta

    directory, step = locate(path)
    meta = read_meta(directory, step)
    rows = rows_of(meta["config"], directory / "tokenizer", "", CALIBRATION.value, 100)
    return held(path), rows.calibration, rows.heldout, rows.told


def held(path: Any) -> Any:
    """The weights of a checkpoint, in memory."""
    from easylm_plus.interop.weights import of_params
    from easylm_plus.models.config import ModelConfig
    from easylm_plus.training.checkpoint import locate, read_meta, read_parameters

    place = locate(path)
    config = ModelConfig(**read_meta(*place)["config"]["model"])
    return of_params(config, read_parameters(*place), str(path))


def table(folder: Path) -> None:
    """Prints the results as tables: by bits, and by share of zeros."""
    rows = {row["scheme"]: row for row in read(folder / "results.jsonl")}
    if not rows:
        sys.exit(f"{folder}/results.jsonl: found no results; expected those of --do=measure")
    before = next(iter(rows.values()))["before"]
    print(f"perplexity of the float model {math.exp(before):.4f} (loss {before:.5f})\n")
    print("| scheme | bits a weight | perplexity | against float |\n|---|---|---|---|")
    for name in (*BITS, *GROUPED, *OTHERS):
        if name in rows:
            print(f"| {name} | {rows[name]['bits']:.2f} | {shown(rows[name])} |")
    print("\n| zeros | " + " | ".join(PRUNING) + " |\n|---|---|---|---|")
    for label, names in [("2:4", FOURS), *((f"{s:.0%}", [n for n in SPARSE if f"={s}," in n]) for s in SHARES)]:
        cells = [f"{math.exp(rows[n]['after']):.3f}" if n in rows else "-" for n in names]
        print(f"| {label} | " + " | ".join(cells) + " |")


def shown(row: dict[str, Any]) -> str:
    """Perplexity, and by how much it rose."""
    return f"{math.exp(row['after']):.4f} | {math.expm1(row['after'] - row['before']):+.3%}"


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every file
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    {"train": train, "measure": measure, "table": table}[DO.value](folder)


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    app.run(main)
