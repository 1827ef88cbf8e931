"""Perplexity against bits: post-training quantisation and pruning of a model that is trained here first.

python benchmarks/post_training.py --do=train      # a model of 4.5M weights on package_text.py, some 20 minutes
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from own_step import with_huge_pages
from rows_of_text import Text, encode

VOCAB, LENGTH, ROWS = 2048, 256, 8
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
         "head_dim": 64, "vocab_size": VOCAB, "max_length": LENGTH, "init": "fan_in"}  # fmt: skip
DO = flags.DEFINE_enum("do", "table", ["train", "measure", "table"], "what to do")
FOLDER = flags.DEFINE_string("folder", "runs/post_training", "of the tokenizer, the model and the results")
STEPS = flags.DEFINE_integer("steps", 2000, f"of {ROWS} x {LENGTH} tokens")
RATE = flags.DEFINE_float("learning_rate", 2e-3, "the peak; cosine to a tenth after 100 steps of warm-up")


def train(folder: Path) -> None:
    """Trains the model and writes it as a checkpoint."""
    import dataclasses

    import jax

    from data_pipelines.loader import Loader, evaluation_batches
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


def main(_: list[str]) -> None:
    folder = Path(FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    {"train": train}[DO.value](folder)


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    app.run(main)
