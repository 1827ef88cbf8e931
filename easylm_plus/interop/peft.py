"""Low-rank adapters in the files of Hugging Face's PEFT, both ways: adapter_config.json and adapter_model.safetensors.

    ours          y = base(x) + scale (x a) b          a [in, R], b [R, out]
    PEFT          y = base(x) + alpha / r B (A x)      lora_A [r, in], lora_B [out, r], so A = a^T and B = b^T

A tensor is called base_model.model.<module>.lora_A.weight, where the module is that of the base in transformers; which
is which of ours the tables say (tables.py). An adapter goes beside one linear layer of theirs that is one of ours
transposed. Where theirs is made of several of ours, or of parts of them (Yuan's queries and keys, GPT-2's attention),
it has no place, and that is an error.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.configs import architecture
from easylm_plus.interop.copying import compact
from easylm_plus.interop.keys import optional, required
from easylm_plus.interop.tables import ARCHITECTURES, Rule
from easylm_plus.interop.tensor_files import Layout, Safetensors, ShardWriter, read_json
from easylm_plus.interop.translate import rules_for, their_names
from easylm_plus.interop.weights import (
    Derived,
    Index,
    Names,
    Weights,
    indices,
    piece_shapes,
    stored,
)
from easylm_plus.interop.write_configs import architecture_of
from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.lora import LowRank
from easylm_plus.tree import at, replaced

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Piece = tuple[str, Index]  # one of our weights of one layer
Adapters = dict[Piece, LowRank]  # each without its base: arrays of the host
# What PEFT's adapters may have beyond a and b, none of which ours do; and what it takes for an absent key.
BEYOND: dict[str, Any] = {
    "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None,
    "layer_replication": None, "target_parameters": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}  # fmt: skip
# Ways to start adapters that leave the base as it is; others (PiSSA, OLoRA, LoftQ ...) also take something from it.
STARTS = (True, False, "gaussian", "orthogonal", "eva")


def modules_of(config: ModelConfig, original: Mapping[str, Any] | None, place: str) -> dict[str, Piece]:
    """Their module -> the piece of ours that it is, transposed; of those that can have an adapter.

    `original`: the config.json of the model, if it has one.
    """
    name = architecture(original, place) if original else architecture_of(config)
    shapes = piece_shapes(config)
    rules = [rule for rule in rules_for(ARCHITECTURES[name], shapes, place) if _transposes(rule, shapes, config)]
    return {
        their_names(rule, index)[0].removesuffix(".weight"): (rule.ours[0], index)
        for rule in rules
        for index in indices(rule.ours[0], config)
    }


def by_piece(leaves: Mapping[str, LowRank], config: ModelConfig) -> Adapters:
    """Those of a parameter tree, by their names there, stacked or not as the config says."""
    found: Adapters = {}
    for name in piece_shapes(config):
        for index in indices(name, config):
            key, inner = stored(name, index, config.scan_layers)
            if key in leaves:
                leaf = leaves[key]
                found[name, index] = LowRank(None, leaf.a[inner], leaf.b[inner], leaf.scale)
    return found


def _transposes(rule: Rule, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> bool:
    """Whether a rule's tensor is a kernel of ours with its sides exchanged, and nothing more: seen on its strides."""
    if len(rule.ours) + len(rule.theirs) > 2 or not rule.ours[0].endswith("/kernel"):
        return False
    D, F = shapes[rule.ours[0]]
    probe = np.broadcast_to(np.arange(D, dtype=np.int32)[:, None], (D, F)), np.broadcast_to(np.arange(F), (D, F))
    return all(np.array_equal(rule.write((x,), config)[0], x.T) for x in probe)


# --- out ---


def write_adapters(
    adapters: Adapters, config: ModelConfig, original: Mapping[str, Any] | None, base: str, folder: Path, place: str
) -> None:
    """Writes adapters into a folder that is there; adapter_config.json last.

    Args:
      original: the base's config.json, if it has one; else its architecture is that which `architecture_of` finds.
      base: where PEFT is told that the base is.

    Raises UserError for an adapter that has no place there.
    """
    modules = modules_of(config, original, place)
    module_of = {piece: module for module, piece in modules.items()}
    for name, index in adapters:
        if (name, index) not in module_of:
            found = f"an adapter of {stored(name, index, scan=False)[0]}"
            raise UserError(f"{place}: found {found}, which is no linear layer of its own in Hugging Face's files")
    arrays: dict[str, np.ndarray] = {}
    for piece, leaf in adapters.items():
        for key, factor in (("A", leaf.a), ("B", leaf.b)):
            arrays[f"{PREFIX}{module_of[piece]}.lora_{key}.weight"] = compact(np.asarray(factor).T)
    layouts = [[Layout(name, array.dtype, array.shape) for name, array in sorted(arrays.items())]]
    with ShardWriter(folder, layouts, sum(x.nbytes for x in layouts[0])) as shards:
        for layout in layouts[0]:
            shards.write(layout.name, arrays[layout.name])
    (folder / "model.safetensors").rename(folder / TENSORS)
    raw = _describe({module_of[piece]: leaf for piece, leaf in adapters.items()}, set(modules), base)
    (folder / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _describe(adapters: Mapping[str, LowRank], modules: set[str], base: str) -> dict[str, Any]:
    """adapter_config.json."""
    ranks = {module: leaf.a.shape[-1] for module, leaf in adapters.items()}
    alphas = {module: round(leaf.scale * ranks[module], 6) for module, leaf in adapters.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": sorted(_short(dict.fromkeys(adapters, True), modules)),
        "rank_pattern": _short({module: rank for module, rank in ranks.items() if rank != r}, modules),
        "alpha_pattern": _short({module: a for module, a in alphas.items() if a != alpha}, modules),
        **BEYOND,
    }


def _short(values: Mapping[str, Any], modules: set[str]) -> dict[str, Any]:
    """By the last parts of names where all modules that end so have the same value, by whole names elsewhere."""
    short: dict[str, Any] = {}
    for module, value in values.items():
        last = module.rpartition(".")[2]
        alike = {values.get(other) for other in modules if other.endswith(f".{last}")} == {value}
        short[last if alike else module] = value
    return short


# --- in ---


def read_adapters(folder: str | Path, config: ModelConfig, original: Mapping[str, Any] | None = None) -> Adapters:
    """The adapters of a PEFT folder, for a model of this config.

    Raises UserError for what is no LoRA, or LoRA with something more, and for tensors that have no place.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: found no {CONFIG} with {TENSORS}, expected a folder that PEFT has saved")
    place, raw = f"{folder}/{CONFIG}", read_json(folder / CONFIG)
    if not isinstance(raw, dict) or (kind := raw.get("peft_type")) != "LORA":
        raise UserError(f"{place}: found peft_type {kind if isinstance(raw, dict) else raw!r}, expected LORA")
    for key, value in BEYOND.items():
        if (raw.get(key) or value) != value:
            raise UserError(f"{place}: found {key} = {raw[key]!r}, which is not supported; expected {value!r}")
    if (start := raw.get("init_lora_weights", True)) not in STARTS:
        told = f"found init_lora_weights = {start!r}, adapters to a base that was changed as they began"
        raise UserError(f"{place}: {told}; expected one of {', '.join(map(repr, STARTS))}")
    tensors, modules = Safetensors([folder / TENSORS], str(folder)), modules_of(config, original, str(folder))
    found: Adapters = {}
    unread = set(tensors.names())
    for module, (name, index) in modules.items():
        pair = [f"{PREFIX}{module}.lora_{key}.weight" for key in "AB"]
        if not unread & set(pair):
            continue
        A, B = (_tensor(tensors, key) for key in pair)
        D, F = piece_shapes(config)[name]
        if A.shape[1:] != (D,) or B.shape != (F, len(A)):
            shapes = f"{list(A.shape)} and {list(B.shape)}"
            raise UserError(f"{folder}: {module}: found {shapes}, expected [r, {D}] and [{F}, r]")
        a, b = (x.T.astype(np.float32) for x in (A, B))
        found[name, index] = LowRank(None, a, b, _scale(raw, module, len(A), place))  # type: ignore[arg-type]
        unread -= set(pair)
    if unread:
        raise UserError(f"{folder}: found {min(unread)} ({len(unread)} such), for which this model has no place")
    if not found:
        raise UserError(f"{folder}: found no adapters")
    return found


def _tensor(tensors: Safetensors, name: str) -> np.ndarray:
    if name not in tensors.names():
        raise UserError(f"{tensors.place}: found no tensor {name}, expected lora_A with every lora_B")
    return tensors.read(name)


def _scale(raw: Mapping[str, Any], module: str, rank: int, place: str) -> float:
    """What PEFT multiplies a module's product by."""
    expected = _of_pattern(raw, "rank_pattern", module, required(raw, "r", int, place), place)
    if expected != rank:
        raise UserError(f"{place}: found rank {expected} for {module}, whose tensors have {rank}")
    alpha = _of_pattern(raw, "alpha_pattern", module, required(raw, "lora_alpha", float, place), place)
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(f"{place}: found alpha {alpha!r} for {module}, expected a positive number")
    return alpha / (rank**0.5 if optional(raw, "use_rslora", bool, place, False) else rank)


def _of_pattern(raw: Mapping[str, Any], key: str, module: str, default: Any, place: str) -> Any:
    """A module's entry: the first whose key, a regular expression, is the module or its last parts."""
    for pattern, value in (optional(raw, key, dict, place, None) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise UserError(f"{place}: {key}: found {pattern!r}, not a regular expression ({error})") from None
    return default


class Adapted(Derived):
    """Weights with adapters merged into them, piece by piece, in the dtype that each has."""

    def __init__(self, weights: Weights, adapters: Adapters):
        super().__init__(weights)
        self._adapters = adapters
        if ternary := sorted(name for name, index in adapters if self.is_ternary(name, index)):
            raise UserError(f"{self.place}: found {ternary[0]} ternary; an adapter cannot be merged with it")

    def read(self, names: Names, index: Index) -> Sequence[np.ndarray]:
        pieces = zip(names, self._weights.read(names, index), strict=True)
        return [self._merged(name, index, piece) for name, piece in pieces]

    def _merged(self, name: str, index: Index, piece: np.ndarray) -> np.ndarray:
        if (leaf := self._adapters.get((name, index))) is None:
            return piece
        return decode(leaf.replace(base=piece)).astype(piece.dtype)  # type: ignore[attr-defined]


def beside(params: Any, adapters: Adapters, config: ModelConfig) -> Any:
    """A tree of weights as a model uses them, of any kind, with adapters around those that have one.

    Those of stacked layers are one leaf: its rank is the largest, and a layer's missing rows are zeros.
    """
    trees: dict[str, dict[Index, LowRank]] = {}
    for (name, index), leaf in adapters.items():
        key, inner = stored(name, index, config.scan_layers)
        trees.setdefault(key, {})[inner] = leaf
    for key, leaves in trees.items():
        base = at(params, key)
        scale, rank = next(iter(leaves.values())).scale, max(leaf.a.shape[-1] for leaf in leaves.values())
        *stack, D, F = base.shape
        a, b = np.zeros((*stack, D, rank), np.float32), np.zeros((*stack, rank, F), np.float32)
        for inner, leaf in leaves.items():
            own = leaf.a.shape[-1]
            a[inner][..., :own] = leaf.a
            b[inner][..., :own, :] = np.asarray(leaf.b) * np.float32(leaf.scale / scale)
        params = replaced(params, key, LowRank(base, a, b, scale))  # type: ignore[arg-type]
    return params
