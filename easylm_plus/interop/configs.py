"""config.json of Hugging Face -> ModelConfig. What we cannot express is an error that names the key, never dropped."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easylm_plus.errors import UserError
from easylm_plus.interop.bitnet import form_of
from easylm_plus.interop.keys import optional, required
from easylm_plus.interop.tables import ARCHITECTURES
from easylm_plus.interop.tensor_files import read_json
from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics.rules import BITNET

Raw = dict[str, Any]

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
# What transformers takes where the key is absent.
DEFAULT_ACTIVATIONS = {"GPT2LMHeadModel": "gelu_new", "BitNetForCausalLM": "relu2"}
DEFAULT_THETAS = {"MixtralForCausalLM": 1e6, "BitNetForCausalLM": 5e5}
# transformers' classes of the others know no window and ignore the key.
WINDOWED = ("MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM")
# Keys of Yuan's moe_config that would change what its experts compute, and those that only training reads.
ROUTING, TRAINING = re.compile("rout|gat|shared|capacity|drop|norm|scal"), re.compile("loss|jitter")


def read_config(folder: str | Path, **overrides: Any) -> ModelConfig:
    """config.json -> ModelConfig; `overrides` replace its keys."""
    path = Path(folder) / "config.json"
    return parse_config(read_raw(folder), str(path), **overrides)


def read_raw(folder: str | Path) -> Raw:
    """The keys of config.json."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the config.json of a Hugging Face model")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}, expected an object of keys")
    return raw


def architecture(raw: Mapping[str, Any], place: str) -> str:
    """Which of the architectures that we know a config names; `model_type` is no guide: Yuan's says llama."""
    found = (optional(raw, "architectures", list, place, None) or ["none"])[0]
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise UserError(f"{place}: found architecture {found}, expected one of {', '.join(ARCHITECTURES)}")
    return found


def stated_rules(raw: Mapping[str, Any], place: str) -> Sequence[str]:
    """The rules (numerics/rules.py) that a config.json states for its weights: BITNET where they are ternary, none
    elsewhere.

    Raises UserError for any other quantisation.
    """
    return BITNET if stated_form(raw, place) else ()


def stated_form(raw: Mapping[str, Any], place: str) -> str:
    """The form that a config.json's ternary weights are stored in (bitnet.py); "" where they are not ternary."""
    found, name = optional(raw, "quantization_config", dict, place, None), architecture(raw, place)
    biased = name == "Qwen2ForCausalLM" or bool(raw.get("attention_bias") or raw.get("mlp_bias"))
    return form_of(found, name, biased, place)


def parse_config(raw: Raw, place: str, **overrides: Any) -> ModelConfig:
    """The keys of a config.json -> ModelConfig. `place` is for messages."""
    name = architecture(raw, place)
    stated_rules(raw, place)  # an error for what we cannot read

    def key(common: str) -> str:
        theirs = GPT2_KEYS.get(common, common)
        return theirs if name == "GPT2LMHeadModel" and (theirs in raw or common not in raw) else common

    act = optional(raw, key("hidden_act"), str, place, DEFAULT_ACTIVATIONS.get(name, "silu"))
    if act not in ACTIVATIONS:
        raise UserError(f"{place}: found hidden_act {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    heads = required(raw, key("num_attention_heads"), int, place)
    hidden = required(raw, key("hidden_size"), int, place)
    values = {
        "vocab_size": required(raw, "vocab_size", int, place),
        "hidden_size": hidden,
        "num_layers": required(raw, key("num_hidden_layers"), int, place),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_length": required(raw, key("max_position_embeddings"), int, place),
        "activation": ACTIVATIONS[act],
    }
    if name == "GPT2LMHeadModel":
        values["intermediate_size"] = optional(raw, key("intermediate_size"), int, place, 4 * hidden)
    else:
        values["intermediate_size"] = required(raw, "intermediate_size", int, place)
    return ModelConfig(**{**values, **READERS[name](raw, place), **overrides})


def _read_llama(raw: Raw, place: str) -> Raw:
    """LLaMA and what differs from it by a switch."""
    name, heads = architecture(raw, place), required(raw, "num_attention_heads", int, place)
    values = {
        "norm_eps": required(raw, "rms_norm_eps", float, place),
        "tie_embeddings": optional(raw, "tie_word_embeddings", bool, place, False),
        "num_kv_heads": optional(raw, "num_key_value_heads", int, place, heads),
        **_read_rope(raw, place),
    }
    if (share := _rotary_share(raw, place, 1.0)) != 1:
        raise UserError(f"{place}: found partial_rotary_factor {share}, expected 1, as {name} has it")
    if raw.get("head_dim"):
        values["head_dim"] = required(raw, "head_dim", int, place)
    if raw.get("sliding_window") and name in WINDOWED:
        values["sliding_window"] = required(raw, "sliding_window", int, place)
    if name in ("LlamaForCausalLM", "BitNetForCausalLM"):
        bias = optional(raw, "attention_bias", bool, place, False)
        values |= {"qkv_bias": bias, "o_bias": bias}
    if name == "LlamaForCausalLM":
        values["mlp_bias"] = optional(raw, "mlp_bias", bool, place, False)
    if name == "BitNetForCausalLM":
        values["sub_norms"] = True
    if name == "MixtralForCausalLM":
        values["num_experts"] = required(raw, "num_local_experts", int, place)
        values["experts_per_token"] = required(raw, "num_experts_per_tok", int, place)
    if name == "Qwen2ForCausalLM":
        values["qkv_bias"] = True
        if not optional(raw, "use_sliding_window", bool, place, False):
            values["sliding_window"] = 0  # a window is stated also where none is used
        elif (first := optional(raw, "max_window_layers", int, place, 28, least=0)) and values.get("sliding_window"):
            raise UserError(f"{place}: found max_window_layers {first}, expected a window in all layers (0)")
    return values


def _read_yuan(raw: Raw, place: str) -> Raw:
    """Yuan 2.0, and 2.0-M32 where there is a moe_config. The released code turns hidden / heads features of a head,
    all of them unless attention_projection_size makes heads wider; M32's has its tables of angles in bfloat16."""
    if raw.get("attention_bias"):
        raise UserError(f"{place}: found attention_bias, which is not supported for YuanForCausalLM")
    heads, hidden = (required(raw, key, int, place) for key in ("num_attention_heads", "hidden_size"))
    head_dim = optional(raw, "attention_projection_size", int, place, hidden) // heads
    share_qk = optional(raw, "use_shareqk", bool, place, False)
    theta = optional(raw, "rope_theta", float, place, 10000.0)
    values = {
        "norm_eps": required(raw, "rms_norm_eps", float, place),
        "tie_embeddings": optional(raw, "tie_word_embeddings", bool, place, True),
        "head_dim": head_dim,
        "causal": optional(raw, "causal_mask", bool, place, True),
        "share_qk": share_qk,
        "lfa_variant": "none" if share_qk else "yuan",
        "rotary_share": hidden // heads / max(head_dim, 1),  # ModelConfig names a head_dim of 0
        "rope_theta": optional(raw, "rotary_base", float, place, theta),
    }
    if experts := optional(raw, "moe_config", dict, place, None):
        values |= _read_yuan_experts(experts, f"{place}: moe_config")
    return values


def _read_yuan_experts(raw: Raw, place: str) -> Raw:
    values = {
        "intermediate_size": required(raw, "ffn_hidden_size", int, place),
        "num_experts": required(raw, "moe_num_experts", int, place),
        "experts_per_token": required(raw, "moe_top_k", int, place),
        "norm_topk": optional(raw, "norm_topk_prob", bool, place, True),
        "router": "attention",
        "rope_dtype": "bfloat16",
    }
    for key, value in (("gated_linear_unit", True), ("router_type", "attn_router")):
        if optional(raw, key, type(value), place, value) != value:
            raise UserError(f"{place}: found {key} {raw[key]!r}, expected {value!r}")
    for key in sorted(raw.keys() - {"norm_topk_prob", "gated_linear_unit", "router_type"}):
        if raw[key] and ROUTING.search(key) and not TRAINING.search(key):
            raise UserError(f"{place}: found {key} = {raw[key]!r}, which is not supported")
    return values


def _read_stablelm(raw: Raw, place: str) -> Raw:
    for key in ("qk_layernorm", "use_parallel_residual"):
        if raw.get(key):
            raise UserError(f"{place}: found {key}, which is not supported for StableLmForCausalLM")
    heads = required(raw, "num_attention_heads", int, place)
    return {
        "norm": "layer",
        "norm_eps": required(raw, "layer_norm_eps", float, place),
        "tie_embeddings": optional(raw, "tie_word_embeddings", bool, place, False),
        "num_kv_heads": optional(raw, "num_key_value_heads", int, place, heads),
        "qkv_bias": optional(raw, "use_qkv_bias", bool, place, False),
        "rotary_share": _rotary_share(raw, place, 0.25),
        **_read_rope(raw, place),
    }


def _read_gpt2(raw: Raw, place: str) -> Raw:
    for key, value in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if raw.get(key, value) != value:
            raise UserError(f"{place}: found {key} {raw[key]}, expected {value}")
    return {
        "norm_eps": optional(raw, "layer_norm_epsilon", float, place, 1e-5),
        "tie_embeddings": optional(raw, "tie_word_embeddings", bool, place, True),
        "norm": "layer",
        "positions": "learned",
        "gated": False,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    }


def _rotary_share(raw: Mapping[str, Any], place: str, default: float) -> float:
    """partial_rotary_factor, beside the other keys (transformers 4) or in rope_parameters (5)."""
    old = optional(raw, "partial_rotary_factor", float, place, default)
    return optional(optional(raw, "rope_parameters", dict, place, {}), "partial_rotary_factor", float, place, old)


def _read_rope(raw: Mapping[str, Any], place: str) -> Raw:
    """rope_parameters (transformers 5) or rope_theta and rope_scaling (before) -> our keys."""
    new = optional(raw, "rope_parameters", dict, place, {})
    scaling = {**optional(raw, "rope_scaling", dict, place, {}), **new}
    theta = optional(raw, "rope_theta", float, place, DEFAULT_THETAS.get(architecture(raw, place), 10000.0))
    theta = optional(new, "rope_theta", float, place, theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3"):
        raise UserError(f"{place}: found rope scaling {kind!r}, expected default, linear or llama3")
    place = f"{place}: rope scaling {kind}"
    keys = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": required(scaling, "factor", float, place)}
    if kind == "llama3":
        keys |= {
            "rope_low_freq_factor": required(scaling, "low_freq_factor", float, place),
            "rope_high_freq_factor": required(scaling, "high_freq_factor", float, place),
            "rope_original_length": required(scaling, "original_max_position_embeddings", int, place),
        }
    return keys


READERS: dict[str, Callable[[Raw, str], Raw]] = {
    **dict.fromkeys(ARCHITECTURES, _read_llama),
    "YuanForCausalLM": _read_yuan,
    "GPT2LMHeadModel": _read_gpt2,
    "StableLmForCausalLM": _read_stablelm,
}
