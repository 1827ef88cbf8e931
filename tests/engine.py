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
from easylm_plus.interop.weights import indices, piece_shapes, put, stored
from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics import verbs

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


@struct.dataclass
class AsEngine:
    """A matrix [D, F], or an embedding [V, D], that multiplies as the engine does."""

    weight: jax.Array
    kind: str = struct.field(pytree_node=False)


def by_blocks(x: jax.Array, size: int, kind: str) -> jax.Array:
    """x[..., D] rounded to 8 bits by blocks of its last axis."""
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, size)
    largest = jnp.abs(blocks).max(-1, keepdims=True)
    if kind == "q8_k":
        signed = jnp.take_along_axis(blocks, jnp.abs(blocks).argmax(-1, keepdims=True), -1)
        factor = -127 / jnp.where(signed == 0, 1, signed)
        d = 1 / factor
    else:
        factor = 127 / jnp.where(largest == 0, 1, largest)
        d = (largest / 127).astype(jnp.float16).astype(jnp.float32)
    codes = jnp.minimum(jnp.round(blocks * factor), 127)
    return jnp.where(largest == 0, 0, codes * d).reshape(x.shape)


def rounded(x: jax.Array, kind: str) -> jax.Array:
    """Activations as they are for a matrix of this type; "token": by token, as ternary training has it."""
    bits = {"f16": (5, 10), "bf16": (8, 7)}
    if kind in bits:
        return jax.lax.reduce_precision(x.astype(jnp.float32), *bits[kind])
    if kind in ("q8_0", "q4_0"):
        return by_blocks(x, 32, "q8_0")
    if kind in ("tq2_0", "tq1_0"):
        return by_blocks(x, 256, "q8_k")
    return by_blocks(x, x.shape[-1], "q8_k") if kind == "token" else x


@verbs._project.register
def _(w: AsEngine, x: jax.Array) -> jax.Array:
    return verbs.project(rounded(x, w.kind), w.weight)


@verbs._unembed.register
def _(w: AsEngine, x: jax.Array) -> jax.Array:
    return verbs.unembed(rounded(x, w.kind), w.weight)


@verbs._lookup.register
def _(w: AsEngine, ids: jax.Array, dtype: Any, rows: str | None) -> jax.Array:
    return verbs.lookup(ids, w.weight, dtype, rows)


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
            tensor = tensors[name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            if (scale := tensors.get(name.removesuffix("weight") + "scale")) is not None:
                values = values * scale.data[0]
            array = jnp.asarray(np.ascontiguousarray(rule.read((values,), config)[0]), jnp.float32)
            kind = tensor.tensor_type.name.lower() if rounding else "f32"
            leaf = AsEngine(array, kind) if array.ndim > 1 else array
            put(tree, stored(rule.ours[0], index, scan=False)[0], leaf)
    return tree


def tie_distance(x: jax.Array, kind: str) -> jax.Array:
    """How far the activation of each row x[B, ...] that is nearest to a tie lies from it, in codes: float32[B]."""
    size = {"q8_0": 32, "q4_0": 32}.get(kind, 256)
    blocks = jnp.abs(x.astype(jnp.float32)).reshape(x.shape[0], -1, size)
    codes = 127 * blocks / jnp.maximum(blocks.max(-1, keepdims=True), 1e-30)
    return jnp.abs(codes - jnp.floor(codes) - 0.5).min((1, 2))


def far_from_ties(model: Any, tree: Any, candidates: np.ndarray, least: float) -> np.ndarray:
    """Those rows of tokens [B, T] none of whose activations the order of a sum can round otherwise.

    In a model of one layer an activation differs by a few 1e-7 of the largest of its block, 1e-4 codes at most; where
    one lies nearer to a tie, the engine may round it the other way, and the logits after it move by a thousandth.
    """
    nearest, really = [], rounded

    def seen(x: jax.Array, kind: str) -> jax.Array:
        if kind not in ("f32", "f16", "bf16"):
            nearest.append(tie_distance(x, kind))
        return really(x, kind)

    with mock.patch.dict(globals(), rounded=seen):
        model.apply({"params": tree}, candidates)
    return candidates[np.min(nearest, 0) > least]
