"""Hugging Face folders: config.json and safetensors -> ModelConfig and parameters.

One table says which of their tensors is which of ours; kernels are [out, in] there and [in, out] here. Tensors are
read one at a time, so host memory holds one stacked weight, never the model. Weights in PyTorch's own format are
refused: unpickling runs code.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.numerics.precision import POLICIES
from easylm_plus.tree import path_name


class Source(NamedTuple):
    """Where one of our weights comes from: their tensors, and how they become ours. {i} is the layer."""

    theirs: tuple[str, ...]
    ours: Callable[[list[np.ndarray], ModelConfig], np.ndarray]


def _as_it_is(name: str) -> Source:
    return Source((name,), lambda arrays, _: arrays[0])


def _kernel(name: str) -> Source:
    return Source((name,), lambda arrays, _: arrays[0].T)


LLAMA = {
    "embed_tokens/embedding": _as_it_is("model.embed_tokens.weight"),
    "norm/weight": _as_it_is("model.norm.weight"),
    "lm_head/kernel": _kernel("lm_head.weight"),
    "layers/{i}/input_layernorm/weight": _as_it_is("model.layers.{i}.input_layernorm.weight"),
    "layers/{i}/post_attention_layernorm/weight": _as_it_is("model.layers.{i}.post_attention_layernorm.weight"),
    **{f"layers/{{i}}/self_attn/{p}_proj/kernel": _kernel(f"model.layers.{{i}}.self_attn.{p}_proj.weight")
       for p in "qkvo"},
    **{f"layers/{{i}}/self_attn/{p}_proj/bias": _as_it_is(f"model.layers.{{i}}.self_attn.{p}_proj.bias")
       for p in "qkv"},
    **{f"layers/{{i}}/mlp/{p}_proj/kernel": _kernel(f"model.layers.{{i}}.mlp.{p}_proj.weight")
       for p in ("gate", "up", "down")},
}  # fmt: skip


def _interleaved(part: int) -> Source:
    """Yuan's q (part 0) or k (1). Its q_proj and k_proj are the halves of one fused matrix, in which every head has its
    query rows and then its key rows: the first half of the heads lies in q_proj, the rest in k_proj."""

    def ours(arrays: list[np.ndarray], config: ModelConfig) -> np.ndarray:
        fused = np.concatenate(arrays).reshape(config.num_heads, 2, config.head_dim, -1)
        return fused[:, part].reshape(-1, fused.shape[-1]).T

    return Source(tuple(f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qk"), ours)


def _convolution(name: str) -> Source:
    """[out, in, taps, 1] -> [taps * in, out], the oldest tap first."""
    return Source((name,), lambda arrays, _: arrays[0][..., 0].transpose(2, 1, 0).reshape(-1, arrays[0].shape[0]))


_GATE = "model.layers.{i}.self_attn.lf_gate."
YUAN = {
    **LLAMA,
    "layers/{i}/self_attn/q_proj/kernel": _interleaved(0),
    "layers/{i}/self_attn/k_proj/kernel": _interleaved(1),
    # Yuan applies silu to what it calls up_proj
    "layers/{i}/mlp/gate_proj/kernel": _kernel("model.layers.{i}.mlp.up_proj.weight"),
    "layers/{i}/mlp/up_proj/kernel": _kernel("model.layers.{i}.mlp.gate_proj.weight"),
    "layers/{i}/self_attn/lf_gate/output_layernorm/weight": _as_it_is(_GATE + "output_layernorm.weight"),
    **{f"layers/{{i}}/self_attn/lf_gate/conv{n}/kernel": _convolution(f"{_GATE}conv{n}.weight") for n in (1, 2)},
    **{f"layers/{{i}}/self_attn/lf_gate/conv{n}/bias": _as_it_is(f"{_GATE}conv{n}.bias") for n in (1, 2)},
}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "YuanForCausalLM")

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)

Place = Callable[[str, np.ndarray], Any]  # puts a host array where the parameter of that name lives


def read_config(folder: str | Path, **overrides: Any) -> ModelConfig:
    """config.json -> ModelConfig. What we cannot represent is an error, never dropped."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the config.json of a Hugging Face model")
    raw = _json(path)
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: found architecture {architecture}, expected one of {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: found hidden_act {raw['hidden_act']!r}, expected 'silu'")
    if absent := [key for key in REQUIRED if key not in raw]:
        raise UserError(f"{path}: found no {absent[0]}, which {architecture} needs")
    heads, qwen, yuan = raw["num_attention_heads"], "Qwen2" in architecture, "Yuan" in architecture
    for key in ("use_shareqk", "attention_bias"):
        if yuan and raw.get(key):
            raise UserError(f"{path}: found {key}, which is not supported for {architecture}")
    # Qwen2 states a window that it uses only where use_sliding_window says so
    window = raw.get("sliding_window") if raw.get("use_sliding_window", not qwen) else None
    if window and qwen and raw.get("max_window_layers", 0) > 0:
        raise UserError(
            f"{path}: found max_window_layers {raw['max_window_layers']}, expected a window in all layers (0)"
        )
    values = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "max_length": raw["max_position_embeddings"],
        "norm_eps": raw["rms_norm_eps"],
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "qkv_bias": raw.get("attention_bias", qwen),
        "sliding_window": window or 0,
        "lfa_variant": "yuan" if yuan else "none",
        **_rope(raw, path),
    }
    return ModelConfig(**{**values, **overrides})


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON file ({error})") from error


def _rope(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """rope_parameters (transformers 5) or rope_theta and rope_scaling (before) -> our keys."""
    new = raw.get("rope_parameters") or {}
    scaling = {**(raw.get("rope_scaling") or {}), **new}
    theta = float(new.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise UserError(f"{path}: found rope scaling {kind!r}, expected default, linear or llama3")
    keys = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": float(scaling["factor"])}
    if kind == "llama3":
        keys |= {
            "rope_low_freq_factor": float(scaling["low_freq_factor"]),
            "rope_high_freq_factor": float(scaling["high_freq_factor"]),
            "rope_original_length": int(scaling["original_max_position_embeddings"]),
        }
    return keys


def load_hf(folder: str | Path, dtype: Any = jnp.float32, **overrides: Any) -> tuple[Transformer, Any]:
    """A Hugging Face folder -> (model, params). `overrides` replace keys of the ModelConfig.

    `model.apply({"params": params}, tokens)` gives float32 logits [B, T, V].
    """
    config = read_config(folder, **overrides)
    policy = POLICIES["float32" if jnp.dtype(dtype) == jnp.float32 else "bf16_pure"]
    model = Transformer(config, policy)
    return model, load_parameters(folder, model, lambda _, array: jnp.asarray(array, dtype))


def load_parameters(folder: str | Path, model: Transformer, place: Place) -> Any:
    """The weights of a folder in the shape of `model`'s tree, each handed to `place` as soon as it is read."""
    files = _files(Path(folder))
    shapes, _ = abstract_parameters(model)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    unread = {name for name in files if not name.endswith("rotary_emb.inv_freq")}  # follows from theta
    unread -= {"lm_head.weight"} if model.config.tie_embeddings else set()  # a copy
    table = LLAMA if model.config.lfa_variant == "none" else YUAN

    def read(ours: str, layer: str, shape: tuple[int, ...]) -> np.ndarray:
        source = table[ours]
        names = [name.format(i=layer) for name in source.theirs]
        unread.difference_update(names)
        ours = ours.format(i=layer)
        found = [_read(files, name, ours, shape, Path(folder)) for name in names]
        try:
            array = source.ours(found, model.config)
        except (ValueError, IndexError) as error:  # shapes that cannot even be rearranged
            sizes = " and ".join(f"{name} {list(x.shape)}" for name, x in zip(names, found))
            raise UserError(f"{folder}: found {sizes}, which do not make our {ours} {list(shape)}") from error
        if array.shape != shape:
            wrong = f"{names[0]} has shape {list(array.shape)}"
            raise UserError(f"{folder}: {wrong}, our {ours} expects {list(shape)}")
        return array

    values = []
    for path, leaf in leaves:
        name = path_name(path)
        values.append(place(name, _assemble(name, leaf.shape, model.config, read)))
    if unread:
        raise UserError(f"{folder}: found {min(unread)} ({len(unread)} such), for which this model has no place")
    return jax.tree_util.tree_unflatten(treedef, values)


def _assemble(name: str, shape: tuple[int, ...], config: ModelConfig, read: Callable) -> np.ndarray:
    """One of our arrays: a tensor of theirs, or one per layer stacked."""
    if not name.startswith("layers/"):
        return read(name, "", shape)
    if config.scan_layers:
        ours = "layers/{i}/" + name.removeprefix("layers/")
        return np.stack([read(ours, str(i), shape[1:]) for i in range(config.num_layers)])
    _, layer, rest = name.split("/", 2)
    return read("layers/{i}/" + rest, layer, shape)


def _read(files: Mapping[str, Path], theirs: str, ours: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    if theirs not in files:
        raise UserError(f"{folder}: found no tensor {theirs}, which is our {ours} {list(shape)}")
    with safe_open(files[theirs], framework="flax") as tensors:
        return np.asarray(tensors.get_tensor(theirs))


def _files(folder: Path) -> dict[str, Path]:
    """tensor name -> file that holds it."""
    paths, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if index.is_file():  # beside the parts there may be the same weights in another form
        paths = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
        if lost := [path.name for path in paths if not path.is_file()]:
            raise UserError(f"{folder}: {lost[0]} is not there; {index.name} names {len(paths)} files")
    if not paths:
        other = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
        found = f"only {other[0]}, which can run code when read" if other else "no weights"
        raise UserError(f"{folder}: found {found}; expected *.safetensors")
    return dict(_names(paths))


def _names(paths: list[Path]) -> Iterator[tuple[str, Path]]:
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as tensors:
                yield from ((name, path) for name in tensors.keys())  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged safetensors file ({error})") from error
