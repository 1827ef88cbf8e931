"""A model made smaller block by block: memory holds one block of it, what is made of all, and the hidden states of all
rows.

Weights come piece by piece (interop/weights.py), from any checkpoint. Each block runs as the model runs it. Its
matrices are done in the order in which they multiply; what a matrix sees, calibration notes with the matrices before
it, of this block and of all blocks before, already done (numerics/watched.py). So errors do not add up unseen: each
matrix is fitted to the inputs that it will have. Matrices that see the same (q, k and v; gate and up) share one
observation.

Held-out rows go through the model twice, side by side: through the weights as they were and as they have become. So
the loss before and after comes out of the same walk.

Experts are calibrated on the rows that the router sends them; one that gets none, as if its inputs were all alike.

Legend: B rows, T length, D embed.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.interop.weights import LAYER, Weights, holds_ternary, stack_sizes
from easylm_plus.models.attention import Layout
from easylm_plus.models.norms import norm
from easylm_plus.models.rope import rotations
from easylm_plus.models.transformer import Block, Transformer, stack_layers
from easylm_plus.numerics.deploy import HEAD, TABLE
from easylm_plus.numerics.precision import Precision
from easylm_plus.numerics.rules import MATRIX
from easylm_plus.numerics.ternary import Ternary
from easylm_plus.numerics.watched import Seen, Watched, new_tap
from easylm_plus.objectives.cross_entropy import blocked_cross_entropy
from easylm_plus.tree import at, put, replaced

Batch = Mapping[str, Any]
Tree = dict[str, Any]
# (name with a star for the layer, weight [D, F] or [E, D, F], what was seen of its inputs or None) -> leaf
Compress = Callable[[str, Any, Seen | None], Any]

# the order in which a block multiplies by its matrices; those of a line see the same inputs, or so they may
STAGES = (
    r"self_attn/lf_gate/conv1/",
    r"self_attn/lf_gate/conv2/",
    r"self_attn/(q|k|v|qk)_proj/",
    r"self_attn/o_proj/",
    r"mlp/(experts/)?(gate|up)_proj/",
    r"mlp/(experts/)?down_proj/",
)
CHUNK = 1024  # tokens whose logits exist at a time


class Result(NamedTuple):
    """A model made smaller."""

    params: Tree  # on the host, stacked or not as the config has it
    before: float  # mean loss a held-out token, in nats; NaN where there are none
    after: float
    weights: int  # how many numbers the model has
    matrices: int  # and those of its matrices that were done
    matrix_bytes: tuple[int, int]  # of these, before and after
    total_bytes: tuple[int, int]  # of all weights


def walk(
    weights: Weights,
    precision: Precision,
    compress: Compress,
    ends: Callable[[str, Any], Any],
    calibration: Sequence[Batch] = (),
    heldout: Sequence[Batch] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Result:
    """Makes all matrices of the blocks smaller; of a model that has ternary ones, those.

    Args:
      compress: what becomes of a matrix; it is handed an observation if there are calibration rows.
      ends: the same for embeddings and head.
      calibration, heldout: batches of arrays [B, T] as the training step takes them; of calibration rows only inputs,
        positions and segment_ids are read.
      tell: told a line a block.
    """
    model = Transformer(weights.config, precision).roomy()
    run, scan, some_ternary = Runner(model), weights.config.scan_layers, holds_ternary(weights)
    before = {name: weights.read((name,), ())[0] for name in _single(weights)}
    after = {name: ends(name, w) if name in (TABLE, HEAD) else w for name, w in before.items()}
    old, new = nested(before), nested(after)
    count = Count()
    for name in before:
        count(before[name], after[name])
    layouts = {kind: [run.layout(batch) for batch in batches] for kind, batches in
               (("calibration", calibration), ("heldout", heldout))}  # fmt: skip
    seen_x = [run.embed(new, batch) for batch in calibration]
    new_x = [run.embed(new, batch) for batch in heldout]
    old_x = [run.embed(old, batch) for batch in heldout]
    done: list[Tree] = []
    for i in range(weights.config.num_layers):
        block = {name: _layer(weights, name, i) for name in _layered(weights)}
        ternary = {name for name in block if weights.is_ternary(name, (i, 0))}
        leaves = {name: Ternary(jnp.asarray(w)) if name in ternary else jnp.asarray(w) for name, w in block.items()}
        plain = nested({name.removeprefix(LAYER): leaf for name, leaf in leaves.items()})
        old_x = [run.block(plain, x, layout) for x, layout in zip(old_x, layouts["heldout"], strict=True)]
        names = [name for name in block if re.search(MATRIX, _flat(name)) and (name in ternary or not some_ternary)]
        smaller = _block(run, block, names, plain, compress, seen_x, layouts["calibration"])
        for name, w in block.items():
            count(w, at(smaller, name.removeprefix(LAYER)), bool(re.search(MATRIX, _flat(name))))
        seen_x = [run.block(smaller, x, layout) for x, layout in zip(seen_x, layouts["calibration"], strict=True)]
        new_x = [run.block(smaller, x, layout) for x, layout in zip(new_x, layouts["heldout"], strict=True)]
        done.append(jax.tree.map(np.asarray, smaller))
        tell(f"layer {i + 1} of {weights.config.num_layers}")
    losses = run.loss(old, old_x, heldout), run.loss(new, new_x, heldout)
    params = {**jax.tree.map(np.asarray, new), "layers": {str(i): block for i, block in enumerate(done)}}
    params = stack_layers(params) if scan else params
    return Result(params, *losses, count.weights, count.matrices, count.matrix_bytes, count.total_bytes)


def _block(run: "Runner", block: Tree, names: list[str], plain: Tree, compress: Compress, seen_x: Sequence[Any],
           layouts: Sequence[Layout]) -> Tree:  # fmt: skip
    """The leaves of a block, its matrices of these names done stage by stage."""
    tree = plain
    for stage in STAGES:
        own = [name for name in names if re.search(stage, name)]
        watched = {name.removeprefix(LAYER) for name in own} if seen_x else set()
        seen = run.seen(tree, watched, seen_x, layouts) if watched else {}
        for name in own:
            inner = name.removeprefix(LAYER)
            tree = replaced(tree, inner, compress(_flat(name), block[name], seen.get(inner)))
            names.remove(name)
    assert not names, f"no stage has {names}"
    return tree


class Runner:
    """The parts of a model, each compiled once: its ends, and a block with whatever leaves it has."""

    def __init__(self, model: Transformer):
        self.model, self.config, self.precision = model, model.config, model.precision
        self._block = jax.jit(self._apply)
        self._watch = jax.jit(self._observe, static_argnames="names")

    def layout(self, batch: Batch) -> Layout:
        positions_BT = jnp.asarray(batch["positions"])
        turned = self.config.positions == "rotary"
        cos, sin = rotations(positions_BT, self.config) if turned else (None, None)
        return Layout(cos, sin, jnp.asarray(batch["segment_ids"]))

    def embed(self, ends: Tree, batch: Batch) -> jax.Array:
        """The first block's input [B, T, D]."""

        def first(model: Any, tokens: Any, positions: Any) -> Any:
            x_BTD = model.embed_tokens(tokens)
            return x_BTD + model.embed_positions(positions) if model.config.positions == "learned" else x_BTD

        inputs = jnp.asarray(batch["inputs"]), jnp.asarray(batch["positions"])
        return self.model.apply({"params": ends}, *inputs, method=first)  # type: ignore[return-value]

    def block(self, block: Tree, x_BTD: jax.Array, layout: Layout) -> jax.Array:
        """A block's output."""
        return self._block(block, x_BTD, layout)

    def _apply(self, block: Tree, x_BTD: jax.Array, layout: Layout) -> jax.Array:
        with jax.default_matmul_precision(self.precision.matmul):
            out: Any = Block(self.config, self.precision).apply({"params": block}, x_BTD, layout, None)
        return out[0]

    def seen(self, block: Tree, names: set[str], xs: Sequence[Any], layouts: Sequence[Layout]) -> dict[str, Seen]:
        """name -> what the matrices of these names see, summed over the batches, on the host in float64."""
        first = {name: shared(name, names, self.config.lfa_variant != "none") for name in sorted(names)}
        watched = tuple(sorted(set(first.values())))
        sums: dict[str, Seen] = {}
        for x, layout in zip(xs, layouts, strict=True):
            found = jax.tree.map(lambda a: np.asarray(a, np.float64), self._watch(block, x, layout, names=watched))
            sums = jax.tree.map(np.add, sums, found) if sums else found
        return {name: sums[first[name]] for name in names}

    def _observe(self, block: Tree, x_BTD: jax.Array, layout: Layout, names: tuple[str, ...]) -> dict[str, Seen]:
        counts = (layout.segments_BT != 0).reshape(-1).astype(jnp.float32)  # type: ignore[union-attr]

        def run(taps: dict[str, Seen]) -> jax.Array:
            tree = block
            for name, tap in taps.items():
                tree = replaced(tree, name, Watched(at(block, name), tap, counts))
            return self._apply(tree, x_BTD, layout)

        out, pull = jax.vjp(run, {name: new_tap(at(block, name).shape) for name in names})
        return pull(jnp.zeros_like(out))[0]

    def loss(self, ends: Tree, xs: Sequence[Any], batches: Sequence[Batch]) -> float:
        """The mean over tokens that carry loss."""
        sums = [jax.device_get(self._loss(ends, x, batch)) for x, batch in zip(xs, batches, strict=True)]
        total = sum(float(tokens) for _, tokens in sums)
        return sum(float(nll) for nll, _ in sums) / total if total else math.nan

    @functools.cached_property
    def _loss(self) -> Any:
        def loss(ends: Tree, x_BTD: jax.Array, batch: Batch) -> Any:
            with jax.default_matmul_precision(self.precision.matmul):
                hidden: Any = norm(self.config, self.precision).apply({"params": ends["norm"]}, x_BTD)
            head: Any = lambda p, x: self.model.apply({"params": p}, x, method="head")
            weights = jnp.asarray(batch["loss_weights"])
            arguments = (hidden, batch["targets"], weights, jnp.zeros_like(weights), CHUNK)
            total = blocked_cross_entropy(head, self.model.head_parameters(ends), *arguments)[0]
            return total, weights.sum()

        return jax.jit(loss)


class Count:
    """What weights take, before and after."""

    def __init__(self) -> None:
        self.weights, self.matrices, self.matrix_bytes, self.total_bytes = 0, 0, (0, 0), (0, 0)

    def __call__(self, before: Any, after: Any, matrix: bool = False) -> None:
        size = sum(x.nbytes for x in jax.tree.leaves(after))
        add = lambda pair: (pair[0] + before.nbytes, pair[1] + size)
        self.weights, self.total_bytes = self.weights + before.size, add(self.total_bytes)
        if matrix:
            self.matrices, self.matrix_bytes = self.matrices + before.size, add(self.matrix_bytes)


def shared(name: str, names: set[str], filtered: bool) -> str:
    """Which matrix of a stage is watched for this one: the first of those with the same inputs. Queries and keys of a
    filter have inputs of their own."""
    for own, other in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("v_proj", "qk_proj"), ("up_proj", "gate_proj")):
        twin = name.replace(f"/{own}/", f"/{other}/")
        if twin != name and twin in names and not (filtered and own == "v_proj"):
            return twin
    return name


def nested(arrays: Mapping[str, Any]) -> Tree:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: Tree = {}
    for name, leaf in arrays.items():
        put(tree, name, leaf)
    return tree


def _single(weights: Weights) -> list[str]:
    return [name for group in weights.groups for name in group if not name.startswith(LAYER)]


def _layered(weights: Weights) -> list[str]:
    return [name for group in weights.groups for name in group if name.startswith(LAYER)]


def _layer(weights: Weights, name: str, i: int) -> Any:
    """A weight of a block, [D, F] or so; of experts stacked."""
    if len(stack_sizes(name, weights.config)) == 1:
        return weights.read((name,), (i,))[0]
    return np.stack([weights.read((name,), (i, e))[0] for e in range(weights.config.num_experts)])


def _flat(name: str) -> str:
    """As rules write it."""
    return "layers/" + name.removeprefix(LAYER)
