"""config.json of Hugging Face -> ModelConfig. What we cannot express is an error that names the key, never dropped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easylm_plus.errors import UserError
from easylm_plus.interop.tables import ARCHITECTURES
from easylm_plus.interop.tensor_files import read_json
from easylm_plus.models.config import ModelConfig

Raw = dict[str, Any]

REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
NEEDED = {"GPT2LMHeadModel": (), "StableLmForCausalLM": ("layer_norm_eps", "intermediate_size")}  # beside these
# GPT-2's names of the keys that all have
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_config(folder: str | Path, **overrides: Any) -> ModelConfig:
    """config.json -> ModelConfig; `overrides` replace its keys."""
    path = Path(folder) / "config.json"
    return parse_config(read_raw(folder), str(path), **overrides)


def read_raw(folder: str | Path) -> Raw:
    """The keys of config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the config.json of a Hugging Face model")
    return read_json(path)


def architecture(raw: Mapping[str, Any], place: str) -> str:
    """Which of the architectures that we know a config names; `model_type` is no guide: Yuan's says llama."""
    found = (raw.get("architectures") or ["none"])[0]
    if found not in ARCHITECTURES:
        raise UserError(f"{place}: found architecture {found}, expected one of {', '.join(ARCHITECTURES)}")
    return found


def parse_config(raw: Raw, place: str, **overrides: Any) -> ModelConfig:
    """The keys of a config.json -> ModelConfig. `place` is for messages."""
    name = architecture(raw, place)
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unnamed")
        raise UserError(f"{place}: found quantization_config of method {method!r}, expected plain weights")
    if name == "GPT2LMHeadModel":
        raw = {**raw, **{key: raw[theirs] for key, theirs in GPT2_KEYS.items() if theirs in raw}}
    needed = (*REQUIRED, *NEEDED.get(name, ("rms_norm_eps", "intermediate_size")))
    if absent := [key for key in needed if key not in raw]:
        raise UserError(f"{place}: found no {GPT2_KEYS.get(absent[0], absent[0])}, which {name} needs")
    act = raw.get("hidden_act", "gelu_new" if name == "GPT2LMHeadModel" else "silu")
    if act not in ACTIVATIONS:
        raise UserError(f"{place}: found hidden_act {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    heads = raw["num_attention_heads"]
    values = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": raw["hidden_size"] // heads,
        "max_length": raw["max_position_embeddings"],
        "activation": ACTIVATIONS[act],
    }
    return ModelConfig(**{**values, **READERS[name](raw, place), **overrides})


def _read_llama(raw: Raw, place: str) -> Raw:
    """LLaMA and what differs from it by a switch."""
    name = architecture(raw, place)
    values = {
        "intermediate_size": raw["intermediate_size"],
        "norm_eps": raw["rms_norm_eps"],
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "num_kv_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "sliding_window": raw.get("sliding_window") or 0,
        **_read_rope(raw, place),
    }
    if raw.get("head_dim"):
        values["head_dim"] = raw["head_dim"]
    if name in ("LlamaForCausalLM", "BitNetForCausalLM"):
        values |= {"qkv_bias": raw.get("attention_bias", False), "o_bias": raw.get("attention_bias", False)}
    if name == "LlamaForCausalLM":
        values["mlp_bias"] = raw.get("mlp_bias", False)
    if name == "BitNetForCausalLM":
        values["sub_norms"] = True
    if name == "MixtralForCausalLM":
        values |= {"num_experts": raw["num_local_experts"], "experts_per_token": raw["num_experts_per_tok"]}
    if name == "Qwen2ForCausalLM":
        values["qkv_bias"] = True
        # a window is stated also where none is used
        values["sliding_window"] = values["sliding_window"] if raw.get("use_sliding_window", False) else 0
        if values["sliding_window"] and raw.get("max_window_layers", 28) > 0:
            found = f"found max_window_layers {raw.get('max_window_layers', 28)}"
            raise UserError(f"{place}: {found}, expected a window in all layers (0)")
    return values


def _read_yuan(raw: Raw, place: str) -> Raw:
    """Yuan 2.0, and 2.0-M32 where there is a moe_config. The released code turns hidden / heads features of a head,
    all of them unless attention_projection_size makes heads wider; M32's has its tables of angles in bfloat16."""
    if raw.get("attention_bias"):
        raise UserError(f"{place}: found attention_bias, which is not supported for YuanForCausalLM")
    heads, experts = raw["num_attention_heads"], raw.get("moe_config")
    head_dim = (raw.get("attention_projection_size") or raw["hidden_size"]) // heads
    values = {
        "intermediate_size": raw["intermediate_size"],
        "norm_eps": raw["rms_norm_eps"],
        "tie_embeddings": raw.get("tie_word_embeddings", True),
        "head_dim": head_dim,
        "causal": raw.get("causal_mask", True),
        "share_qk": raw.get("use_shareqk", False),
        "lfa_variant": "none" if raw.get("use_shareqk") else "yuan",
        "rotary_share": raw["hidden_size"] // heads / head_dim,
        "rope_theta": float(raw.get("rotary_base") or raw.get("rope_theta") or 10000.0),
    }
    if experts:
        if not experts.get("gated_linear_unit", True):
            raise UserError(f"{place}: found gated_linear_unit false in moe_config, expected true")
        values |= {
            "intermediate_size": experts["ffn_hidden_size"],
            "num_experts": experts["moe_num_experts"],
            "experts_per_token": experts["moe_top_k"],
            "norm_topk": experts.get("norm_topk_prob", True),
            "router": "attention",
            "rope_dtype": "bfloat16",
        }
    return values


def _read_stablelm(raw: Raw, place: str) -> Raw:
    for key in ("qk_layernorm", "use_parallel_residual"):
        if raw.get(key):
            raise UserError(f"{place}: found {key}, which is not supported for StableLmForCausalLM")
    return {
        "intermediate_size": raw["intermediate_size"],
        "norm": "layer",
        "norm_eps": raw["layer_norm_eps"],
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "num_kv_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "qkv_bias": raw.get("use_qkv_bias", False),
        "rotary_share": raw.get("partial_rotary_factor", 0.25),
        **_read_rope(raw, place),
    }


def _read_gpt2(raw: Raw, place: str) -> Raw:
    for key, value in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if raw.get(key, value) != value:
            raise UserError(f"{place}: found {key} {raw[key]}, expected {value}")
    return {
        "intermediate_size": raw.get("intermediate_size") or 4 * raw["hidden_size"],
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
        "norm": "layer",
        "positions": "learned",
        "gated": False,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    }


def _read_rope(raw: Mapping[str, Any], place: str) -> Raw:
    """rope_parameters (transformers 5) or rope_theta and rope_scaling (before) -> our keys."""
    new = raw.get("rope_parameters") or {}
    scaling = {**(raw.get("rope_scaling") or {}), **new}
    theta = float(new.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise UserError(f"{place}: found rope scaling {kind!r}, expected default, linear or llama3")
    keys = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": float(scaling["factor"])}
    if kind == "llama3":
        keys |= {
            "rope_low_freq_factor": float(scaling["low_freq_factor"]),
            "rope_high_freq_factor": float(scaling["high_freq_factor"]),
            "rope_original_length": int(scaling["original_max_position_embeddings"]),
        }
    return keys


READERS: dict[str, Callable[[Raw, str], Raw]] = {
    **dict.fromkeys(ARCHITECTURES, _read_llama),
    "YuanForCausalLM": _read_yuan,
    "GPT2LMHeadModel": _read_gpt2,
    "StableLmForCausalLM": _read_stablelm,
}
