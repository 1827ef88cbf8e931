"""What localized filtering costs: a training step with it against one without, alternately in one process.

    python benchmarks/lfa_step.py --shape=paper --precision=float32

The paper's Table 1 (arXiv:2311.15786) gives 631 ms against 577, a ratio of 1.094, on GPUs; the layers of Yuan 2B have
11 % more FLOPs in matrices with it.
"""

import os
import statistics
import sys
from pathlib import Path

from absl import app, flags
from own_step import OwnStep, with_huge_pages

SHAPES = {
    "paper": {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 6, "num_heads": 12, "head_dim": 64},
    "2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 2, "num_heads": 32, "head_dim": 64},
}
SHAPE = flags.DEFINE_enum("shape", "paper", list(SHAPES), "of the layers")
VOCAB = flags.DEFINE_integer("vocab", 135040, "of the model; 2b without its head: 128")
PRECISION = flags.DEFINE_enum("precision", "float32", ["float32", "bf16"], "of both")
VARIANTS = flags.DEFINE_list("variants", ["none", "yuan"], "to compare, the first is the measure")
ROWS = flags.DEFINE_integer("rows", 2, "rows a batch")
LENGTH = flags.DEFINE_integer("length", 512, "tokens a row")
ROUNDS = flags.DEFINE_integer("rounds", 7, "alternations")


def make_step(variant: str) -> OwnStep:
    """A step of the model with this filter."""
    import jax
    import numpy as np

    from easylm_plus.models.families import preset
    from easylm_plus.models.transformer import Transformer, init_parameters
    from easylm_plus.numerics.precision import precision

    shape = SHAPES[SHAPE.value]
    config = preset("yuan-2b", lfa_variant=variant, vocab_size=VOCAB.value, num_kv_heads=shape["num_heads"],
                    scan_layers=False, **shape)  # fmt: skip
    model = Transformer(config, precision(PRECISION.value))
    tokens = np.random.default_rng(0).integers(0, VOCAB.value, (ROWS.value, LENGTH.value + 1), np.int32)
    return OwnStep(model, init_parameters(model, jax.random.key(0)), tokens)


def main(_: list[str]) -> None:
    from easylm_plus.parallel.cluster import set_backend_flags

    set_backend_flags(PRECISION.value, deterministic=False)
    steps = {variant: make_step(variant) for variant in VARIANTS.value}
    for run in steps.values():
        run(1)
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(ROUNDS.value):
        for variant, run in steps.items():
            times[variant] += run(1)["seconds"]
    first = times[VARIANTS.value[0]]
    for variant, seconds in times.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, first, strict=True)]
        print(
            f"{variant:10} best {min(seconds):.3f} s  median {statistics.median(seconds):.3f} s  "
            f"ratio best {min(seconds) / min(first):.3f}  median of rounds {statistics.median(ratios):.3f}"
        )


if __name__ == "__main__":
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    app.run(main)
