"""ModelConfig -> config.json of Hugging Face.

What the architecture cannot express is an error that names the key: `export_config` reads what it wrote and compares.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from easylm_plus.errors import UserError
from easylm_plus.interop.bitnet import quantization_config
from easylm_plus.interop.configs import ACTIVATIONS, GPT2_KEYS, Raw, architecture, parse_config, stated_form
from easylm_plus.models.config import ModelConfig

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "SkyworkForCausalLM": "skywork",
    "YuanForCausalLM": "yuan",
    "StableLmForCausalLM": "stablelm",
    "MixtralForCausalLM": "mixtral",
    "GPT2LMHeadModel": "gpt2",
    "BitNetForCausalLM": "bitnet",
}
# Keys of ModelConfig that say how a model is trained or run, and have no place in other people's configs.
OWN = ("init", "attention", "grouped", "scan_layers", "remat", "kv_cache", "lfa_reset", "capacity_factor")
# Keys of theirs that ours replace as a whole when a model goes back to where it came from; auto_map names Python files
# beside the original's weights, which are not copied.
REPLACED = ("rope_parameters", "rope_scaling", "rope_theta", "torch_dtype", "dtype", "head_dim", "auto_map",
            "rotary_base", "attention_projection_size", "moe_config", "sliding_window", "use_sliding_window",
            "layer_types", "max_window_layers", "attention_bias", "mlp_bias", "partial_rotary_factor",
            "transformers_version")  # fmt: skip
# Keys that released code asks for without a default, and that say nothing about the weights.
_YUAN_FLAGS = ("use_flash_attention", "use_loss_mask", "reset_attention_mask", "reset_position_ids")
ASKED_FOR: dict[str, Raw] = {"YuanForCausalLM": dict.fromkeys(_YUAN_FLAGS, False)}

# Ids that transformers' classes have defaults for, which are LLaMA's or GPT-2's own: null where nothing tells them.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def architecture_of(config: ModelConfig) -> str:
    """The architecture that a model of our own is exported as; `export_config` checks that it fits in all keys."""
    c = config
    tests = (
        (c.lfa_variant == "yuan" or c.share_qk, "YuanForCausalLM"),
        (c.positions == "learned", "GPT2LMHeadModel"),
        (c.norm == "layer", "StableLmForCausalLM"),
        (c.sub_norms, "BitNetForCausalLM"),
        (c.num_experts > 0, "MixtralForCausalLM"),
        (c.qkv_bias and not c.o_bias, "Qwen2ForCausalLM"),
        (c.sliding_window > 0, "MistralForCausalLM"),
    )
    return next((name for found, name in tests if found), "LlamaForCausalLM")


def write_config(config: ModelConfig, name: str) -> Raw:
    """ModelConfig -> the keys of a config.json that transformers (4 and 5) and `parse_config` read."""
    raw = {
        "architectures": [name],
        "model_type": MODEL_TYPES[name],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_length,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "tie_word_embeddings": config.tie_embeddings,
    }
    raw |= WRITERS[name](config, name)
    return {GPT2_KEYS.get(key, key): value for key, value in raw.items()} if name == "GPT2LMHeadModel" else raw


def _write_gpt2(config: ModelConfig, name: str) -> Raw:
    return {"layer_norm_epsilon": config.norm_eps}


def _write_stablelm(config: ModelConfig, name: str) -> Raw:
    return {
        "num_key_value_heads": config.num_kv_heads,
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.qkv_bias,
        "partial_rotary_factor": config.rotary_share,
        **_write_rope(config),
    }


def _write_rope(config: ModelConfig) -> Raw:
    raw: Raw = {"rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        raw["rope_scaling"] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        raw["rope_scaling"] |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_length,
        }
    return raw


def _write_llama(config: ModelConfig, name: str) -> Raw:
    raw = {
        "rms_norm_eps": config.norm_eps,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        **_write_rope(config),
    }
    if name in ("LlamaForCausalLM", "BitNetForCausalLM"):
        raw["attention_bias"] = config.o_bias
    if name == "LlamaForCausalLM":
        raw["mlp_bias"] = config.mlp_bias
    if name == "Qwen2ForCausalLM":
        raw |= {"use_sliding_window": config.sliding_window > 0, "max_window_layers": 0}
    if name in ("MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM"):
        raw["sliding_window"] = config.sliding_window or None
    if name == "MixtralForCausalLM":
        raw |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    return raw


def _write_yuan(config: ModelConfig, name: str) -> Raw:
    raw: Raw = {
        "rms_norm_eps": config.norm_eps,
        "causal_mask": config.causal,
        "use_shareqk": config.share_qk,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        raw["attention_projection_size"] = config.head_dim * config.num_heads
    if config.rope_theta != 10000.0:
        raw["rotary_base"] = config.rope_theta
    if config.num_experts:
        raw["moe_config"] = {
            "moe_num_experts": config.num_experts,
            "moe_top_k": config.experts_per_token,
            "ffn_hidden_size": config.intermediate_size,
            "norm_topk_prob": config.norm_topk,
            "gated_linear_unit": True,
        }
    return raw


WRITERS: dict[str, Callable[[ModelConfig, str], Raw]] = {
    **dict.fromkeys(MODEL_TYPES, _write_llama),
    "YuanForCausalLM": _write_yuan,
    "GPT2LMHeadModel": _write_gpt2,
    "StableLmForCausalLM": _write_stablelm,
}


def export_config(config: ModelConfig, original: Mapping[str, Any] | None, place: str, form: str | None = None) -> Raw:
    """The config.json of a model on its way out.

    Args:
      original: that of the model it came from, whose other keys stay.
      form: of ternary weights (bitnet.py); "": they are not ternary; None: what the original says.

    Raises UserError naming a key that the architecture has no place for.
    """
    if config.lfa_variant == "yuan":
        config = dataclasses.replace(config, lfa_norm=False)  # it has the norm either way
    name = architecture(original, place) if original else architecture_of(config)
    written = write_config(config, name)
    if original:
        kept = {key: value for key, value in original.items() if key not in (*REPLACED, "quantization_config")}
        written |= {key: original[key] for key in ("model_type",) if key in original}
        if "moe_config" in written:
            written["moe_config"] = {**(original.get("moe_config") or {}), **written["moe_config"]}
    else:
        kept = dict.fromkeys(TOKEN_IDS)
    stated = stated_form(original, place) if original else ""
    if form is None or (form and form == stated):
        kept |= {key: value for key, value in (original or {}).items() if key == "quantization_config"}
    elif form:
        kept["quantization_config"] = quantization_config(form)
    raw = {**ASKED_FOR.get(name, {}), **kept, **written}
    try:
        back = parse_config(raw, place)
    except UserError as error:
        raise UserError(f"{place}: {name} has no place for this model: read back, {error}") from error
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(back, field.name)
        if field.name not in OWN and ours != theirs:
            raise UserError(f"{place}: model.{field.name} = {ours!r}: {name} has no place for it ({theirs!r} there)")
    return raw
