"""What llama.cpp computes from a GGUF file, computed here: the file's numbers, the engine's rounding of activations.

The engine multiplies codes by codes, so it rounds the activations of every matrix first, by the type of its weights:

    f32         not at all
    f16, bf16   to that
    q8_0, q4_0  by blocks of 32 to 8 bits: d = amax / 127, stored as f16
    tq2_0 ...   by blocks of 256 to 8 bits: d = x of largest magnitude / -127, in f32

The rest is float32, as is the cache here. Sums are in another order, which no test can be exact about.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easylm_plus.interop.gguf_names import TABLES
from easylm_plus.interop.translate import their_names
from easylm_plus.interop.weights import indices, piece_shapes, stored
from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics import verbs
from easylm_plus.tree import put

PEER = Path(__file__).with_name("engine_peer.py")
PATIENCE = 300


class Crashed(Exception):
    """The engine ended by a signal."""


def ask(python: Path | str, **request: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(what the engine tells, its arrays): see engine_peer.py."""
    with tempfile.TemporaryDirectory(prefix="engine_") as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        question.write_text(json.dumps({**request, "model": str(request["model"])}))
        run = subprocess.run([python, PEER, question, answer], capture_output=True, text=True, timeout=PATIENCE)
        if run.returncode < 0:
            raise Crashed(f"signal {-run.returncode}: {run.stderr[-2000:]}")
        assert run.returncode == 0, run.stderr[-4000:]
        with np.load(answer) as arrays:
            found = dict(arrays)
    return json.loads(str(found.pop("told"))), found


BLOCKS = {"q8_0": 32, "q4_0": 32, "tq2_0": 256, "tq1_0": 256}  # inputs that share a scale, of weights and activations


@struct.dataclass
class AsEngine:
    """A matrix [D, F] that multiplies as the engine does; an embedding is kept as [D, V] too.

    In blocks: whole numbers, their scales [D / block, F], and gamma, by which the product is multiplied.
    """

    numbers: jax.Array
    scales: jax.Array | None
    gamma: jax.Array
    kind: str = struct.field(pytree_node=False)

    @property
    def weight(self) -> jax.Array:
        """The matrix that is meant."""
        if self.scales is None:
            return self.numbers * self.gamma
        size = self.numbers.shape[0] // self.scales.shape[0]
        return self.numbers * jnp.repeat(self.scales, size, 0) * self.gamma


def in_codes(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Activations x[..., D] as (whole numbers [..., blocks, size], scales [..., blocks])."""
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCKS.get(kind, x.shape[-1]))
    largest = jnp.abs(blocks).max(-1, keepdims=True)
    if BLOCKS.get(kind) == 32:
        factor, d = 127 / jnp.where(largest == 0, 1, largest), (largest / 127).astype(jnp.float16).astype(jnp.float32)
    else:
        signed = jnp.take_along_axis(blocks, jnp.abs(blocks).argmax(-1, keepdims=True), -1)
        factor = -127 / jnp.where(signed == 0, 1, signed)
        d = 1 / factor
    codes = jnp.minimum(jnp.round(blocks * factor), 127)
    return jnp.where(largest == 0, 0, codes), d[..., 0]


def product(x: jax.Array, w: AsEngine) -> jax.Array:
    """x[..., D] times w. Sums of codes in a block are exact, as the engine's are: each rounding of our own that the
    engine does not have is one more chance for an activation behind it to be rounded the other way."""
    if w.kind in ("f16", "bf16"):
        bits = {"f16": (5, 10), "bf16": (8, 7)}[w.kind]
        return verbs.project(jax.lax.reduce_precision(x.astype(jnp.float32), *bits), w.weight)
    if w.kind == "token":  # as ternary training has it
        codes, d = in_codes(x, w.kind)
        return verbs.project((codes * d[..., None]).reshape(x.shape), w.weight)
    if w.scales is None or w.kind not in BLOCKS:
        return verbs.project(x, w.weight)
    codes, d = in_codes(x, w.kind)
    sums = jnp.einsum("...nk,nkf->...nf", codes, w.numbers.reshape(len(w.scales), -1, w.numbers.shape[-1]))
    return (sums * (d[..., None] * w.scales)).sum(-2) * w.gamma


@verbs._project.register
def _(w: AsEngine, x: jax.Array) -> jax.Array:
    return product(x, w)


@verbs._unembed.register
def _(w: AsEngine, x: jax.Array) -> jax.Array:
    return product(x, w)


@verbs._lookup.register
def _(w: AsEngine, ids: jax.Array, dtype: Any, rows: str | None) -> jax.Array:
    return verbs.lookup(ids, w.weight.T, dtype, rows)


def in_blocks(data: np.ndarray, values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(whole numbers [F, D], their scales [F, D / block]) of a tensor's bytes and values; scales None of floats."""
    if kind not in BLOCKS:
        return values, None
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][1])
    at = slice(-2, None) if kind.startswith("tq") else slice(0, 2)
    scales = np.ascontiguousarray(blocks[:, at]).view(np.float16).astype(np.float32).reshape(len(values), -1)
    wide = np.repeat(np.where(scales == 0, 1, scales), BLOCKS[kind], axis=1)
    return np.round(values / wide), scales


def load(path: Path, config: ModelConfig, rounding: bool = True) -> dict[str, Any]:
    """A GGUF file as an unstacked tree that computes what the engine does; without `rounding`, exact activations."""
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tree: dict[str, Any] = {}
    for rule in TABLES[architecture]:
        if rule.ours[0] not in piece_shapes(config):
            continue
        for index in indices(rule.ours[0], config):
            name = their_names(rule, index)[0]
            scale = tensors.get(name.removesuffix("weight") + "scale")
            turn = lambda array, rule=rule: jnp.asarray(rule.read((array,), config)[0], jnp.float32)
            leaf = _leaf(tensors[name], 1.0 if scale is None else scale.data[0], turn, rounding)
            if rule.ours[0].startswith("embed_tokens/"):
                leaf = jax.tree.map(lambda x: x.T, leaf)
            put(tree, stored(rule.ours[0], index, scan=False)[0], leaf)
    return tree


def _leaf(tensor: Any, gamma: float, turn: Callable[[np.ndarray], jax.Array], rounding: bool) -> Any:
    kind = tensor.tensor_type.name.lower()
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
    if values.ndim == 1:
        return turn(values)
    numbers, scales = in_blocks(tensor.data, values, kind)
    turned = None if scales is None else turn(scales)
    return AsEngine(turn(numbers), turned, jnp.float32(gamma), kind if rounding else "f32")


def tie_distance(x: jax.Array, kind: str) -> jax.Array:
    """How far the activation of each row x[B, ...] that is nearest to a tie lies from it, in codes: float32[B]."""
    blocks = jnp.abs(x.astype(jnp.float32)).reshape(x.shape[0], -1, BLOCKS[kind])
    codes = 127 * blocks / jnp.maximum(blocks.max(-1, keepdims=True), 1e-30)
    return jnp.abs(codes - jnp.floor(codes) - 0.5).min((1, 2))


def far_from_ties(model: Any, tree: Any, candidates: np.ndarray, least: float) -> np.ndarray:
    """Those rows of tokens [B, T] none of whose activations the order of a sum can round otherwise.

    In a model of one layer an activation differs by a few 1e-7 of the largest of its block, 1e-4 codes at most; where
    one lies nearer to a tie, the engine may round it the other way, and the logits after it move by a thousandth.
    """
    nearest, really = [], in_codes

    def seen(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
        nearest.append(tie_distance(x, kind))
        return really(x, kind)

    with mock.patch.dict(globals(), in_codes=seen):
        model.apply({"params": tree}, candidates)
    return candidates[np.min(nearest, 0) > least]
