"""Ternary weights against bfloat16 by shape: bytes of the weights, bytes a token reads, and the speed they bound.

    python benchmarks/ternary_bytes.py
    python benchmarks/ternary_bytes.py --bandwidth_gb=3350 --memory_gb=80

Every weight is counted as a leaf of ours has it (`abstract_parameters`, nothing is allocated): in bfloat16 all of them;
ternary the linear layers of the blocks as `PackedTernary` (2 bits, in-features padded to blocks of 256), or in a file
five digits a byte (1.6 bits) with a float32 scale a matrix; embedding and head in int8 with a float32 a row, norms in
bfloat16. A token reads all weights but the embedding, of which it reads a row; a tied head is read.

The shapes are those of presets; 700M to 3B those of the paper's table 1, the larger ones those of LLaMA, as the paper
has them (arXiv:2402.17764, figure 2 and table 3). A bound is bandwidth / bytes for one sequence and no cache: nothing
measured. The paper's times are of whole systems and of kernels for these shapes, so bounds are not to be compared with
its speeds but with its ratios. The last table is its largest batch of 70B on two 80 GB cards: weights and cache of keys
and values (bfloat16, 512 positions) have to fit; what is worked in is not counted, so batches are bounds, too.
"""

import math
from typing import Any, NamedTuple

from absl import app, flags

BANDWIDTH = flags.DEFINE_float("bandwidth_gb", 2039.0, "10^9 bytes a second; A100 80 GB by default")
MEMORY = flags.DEFINE_float("memory_gb", 80.0, "10^9 bytes of a card, of which two hold 70B")
LENGTH = flags.DEFINE_integer("length", 512, "positions of the cache")

SHAPES = {
    "700M": "bitnet-700m", "1.3B": "bitnet-1.3b", "3B": "bitnet-3b", "3.9B": "bitnet-3.9b", "7B": "llama-7b",
    "13B": "llama-13b", "30B": "llama-30b", "65B": "llama-65b", "70B (GQA)": "llama2-70b", "2B4T": "bitnet-2b4t",
}  # fmt: skip
PAIRS = (("13B", "3B"), ("30B", "7B"), ("70B (GQA)", "13B"))  # ternary, and bfloat16 that is said to cost more
PAPER = {"700M": (2.08, 0.80), "1.3B": (3.34, 1.14), "3B": (7.89, 2.22), "3.9B": (None, 2.38)}  # GB, its table 1
PAPER_BATCH = {"bfloat16": 16, "ternary": 176}
FORMS = ("bfloat16", "2 bits", "1.6 bits")


class Bytes(NamedTuple):
    """What a model's weights take, and what a token reads of them."""

    weights: int
    held: dict[str, int]
    read: dict[str, int]


def of_matrix(shape: tuple[int, ...], form: str) -> int:
    """Bytes of matrices [..., D, F] that are ternary."""
    import jax
    import jax.numpy as jnp

    from easylm_plus.numerics.packed_ternary import packed

    if form == "1.6 bits":
        stack = math.prod(shape[:-2])
        return stack * (math.ceil(math.prod(shape[-2:]) / 5) + 4)
    leaf = jax.eval_shape(packed, jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def count(name: str) -> Bytes:
    import dataclasses

    import jax

    from easylm_plus.models.families import preset
    from easylm_plus.models.transformer import Transformer, abstract_parameters
    from easylm_plus.numerics.rules import BITNET, assign
    from easylm_plus.tree import path_name

    config = dataclasses.replace(preset(name), scan_layers=True)
    shapes = abstract_parameters(Transformer(config))[0]
    ternary = assign(shapes, BITNET)
    held, read, weights = dict.fromkeys(FORMS, 0), dict.fromkeys(FORMS, 0), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        key = path_name(path)
        weights += leaf.size
        looked_up = key.startswith("embed_tokens/") and not config.tie_embeddings
        for form in FORMS:
            size = own_bytes(key, leaf.shape, form, ternary[key] == "ternary")
            held[form] += size
            read[form] += size // leaf.shape[0] if looked_up else size
    return Bytes(weights, held, read)


def own_bytes(key: str, shape: tuple[int, ...], form: str, ternary: bool) -> int:
    """Bytes of a weight."""
    if form != "bfloat16" and ternary:
        return of_matrix(shape, form)
    if form != "bfloat16" and key.startswith(("embed_tokens/", "lm_head/")):  # int8, a float32 a token
        rows, features = shape if key.startswith("embed_tokens/") else shape[::-1]
        return rows * (features + 4)
    return 2 * math.prod(shape)


def cache_bytes(name: str, length: int) -> int:
    """Keys and values of one sequence in bfloat16, as the model's cache has them."""
    import jax

    from easylm_plus.models.families import preset
    from easylm_plus.models.transformer import Transformer
    from easylm_plus.numerics.precision import POLICIES

    model = Transformer(preset(name), POLICIES["bf16_pure"])
    cache: Any = jax.eval_shape(lambda: model.init_cache(1, length).layers)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def head(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def main(_: list[str]) -> None:
    found = {size: count(name) for size, name in SHAPES.items()}
    gb = lambda n: f"{n / 1e9:.2f}"
    bound = lambda n: f"{BANDWIDTH.value * 1e9 / n:,.0f}"
    print(f"bandwidth {BANDWIDTH.value:,.0f} GB/s, sizes in 10^9 bytes")
    head("shape", "weights", *(f"held, {form}" for form in FORMS), "ratio", "paper, bf16 / ternary",
         *(f"read a token, {form}" for form in FORMS[:2]), *(f"bound tok/s, {form}" for form in FORMS[:2]))  # fmt: skip
    for size, b in found.items():
        paper = " / ".join(str(x) if x else "-" for x in PAPER[size]) if size in PAPER else ""
        ratio = f"{b.held['bfloat16'] / b.held['2 bits']:.2f}"
        row(size, f"{b.weights / 1e9:.2f}B", *(gb(b.held[form]) for form in FORMS), ratio, paper,
            *(gb(b.read[form]) for form in FORMS[:2]), *(bound(b.read[form]) for form in FORMS[:2]))  # fmt: skip
    head("ternary", "bfloat16", "held, ternary", "held, bf16", "read, ternary", "read, bf16", "ternary reads")
    for large, small in PAIRS:
        t, b = found[large], found[small]
        cells = (gb(t.held["2 bits"]), gb(b.held["bfloat16"]), gb(t.read["2 bits"]), gb(b.read["bfloat16"]))
        row(large, small, *cells, f"{t.read['2 bits'] / b.read['bfloat16']:.2f} of it")
    head("on two cards", "weights, bf16 / ternary", f"cache, {LENGTH.value} positions", "batch, bf16", "batch, ternary",
         "ratio", "paper")  # fmt: skip
    for size in ("65B", "70B (GQA)"):
        b, cache = found[size], cache_bytes(SHAPES[size], LENGTH.value)
        batch = {form: int((2e9 * MEMORY.value - b.held[form]) // cache) for form in FORMS[:2]}
        paper = f"{PAPER_BATCH['bfloat16']} to {PAPER_BATCH['ternary']} (11.0)"
        ratio = f"{batch['2 bits'] / max(1, batch['bfloat16']):.1f}"
        both = f"{gb(b.held['bfloat16'])} / {gb(b.held['2 bits'])}"
        row(size, both, gb(cache), batch["bfloat16"], batch["2 bits"], ratio, paper)


if __name__ == "__main__":
    app.run(main)
