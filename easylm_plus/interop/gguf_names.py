"""Our models as llama.cpp's architectures: which one holds a model, its hyperparameters, its tensors' names.

    llama    LLaMA and what is LLaMA with other numbers: Koala, Mistral, Skywork; biases if any
    qwen2    biases on queries, keys and values only, and no ternary matrix: it leaves out scales of the feed-forward
    bitnet   BitNet b1.58: a norm before the last matrix of attention and of the feed-forward, SiLU, tied head

What decides is what llama.cpp computes, which is in its source (src/models/{llama,qwen2,bitnet}.cpp) and is compared
with the engine in tests/interop/test_gguf_engine.py. Its `llama` turns neighbouring features of a head (NORM), so the
rows of queries and keys are permuted on the way there, as for Meta's own files; `qwen2` and `bitnet` turn halves
(NEOX), as we do. Rotary scaling of Llama 3.1 is a tensor of factors that the frequencies are divided by. None of them
has a sliding window: up to the window's length it changes nothing, so that is the length that the file states.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.tables import Arrays, Rule, Table, kernel, same
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.rope import frequencies

ROPE_FACTORS = "rope_freqs.weight"
_OURS, _BLOCK = "layers/{i}/", "blk.{i}."


def _paired(array: np.ndarray, heads: int) -> np.ndarray:
    """The last axis, head by head: halves (0, K/2, 1, ...) to neighbours."""
    by_half = array.reshape(*array.shape[:-1], heads, 2, -1)
    return by_half.swapaxes(-1, -2).reshape(array.shape)


def _halved(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_paired`."""
    by_pair = array.reshape(*array.shape[:-1], heads, -1, 2)
    return by_pair.swapaxes(-1, -2).reshape(array.shape)


def _turned(ours: str, theirs: str, heads_key: str) -> Rule:
    """A kernel or bias of queries or keys, whose features `llama` has in another order."""
    heads = lambda config: getattr(config, heads_key)

    def write(arrays: Arrays, config: ModelConfig) -> Arrays:
        return (_paired(arrays[0], heads(config)).T,)  # of a bias, .T is nothing

    def read(arrays: Arrays, config: ModelConfig) -> Arrays:
        return (_halved(arrays[0].T, heads(config)),)

    return Rule((ours,), (theirs,), read, write)


_Q, _K = ("attn_q", "q_proj", "num_heads"), ("attn_k", "k_proj", "num_kv_heads")
_LINEAR = (("attn_v", "self_attn/v_proj"), ("attn_output", "self_attn/o_proj"), ("ffn_gate", "mlp/gate_proj"),
           ("ffn_up", "mlp/up_proj"), ("ffn_down", "mlp/down_proj"))  # fmt: skip
_ENDS: Table = (
    same("embed_tokens/embedding", "token_embd.weight"),
    same("norm/weight", "output_norm.weight"),
    kernel("lm_head/kernel", "output.weight"),
    same(f"{_OURS}input_layernorm/weight", f"{_BLOCK}attn_norm.weight"),
    same(f"{_OURS}post_attention_layernorm/weight", f"{_BLOCK}ffn_norm.weight"),
    *(kernel(f"{_OURS}{ours}/kernel", f"{_BLOCK}{theirs}.weight") for theirs, ours in _LINEAR),
    *(same(f"{_OURS}{ours}/bias", f"{_BLOCK}{theirs}.bias") for theirs, ours in _LINEAR),
)
_HALVES: Table = (
    *(kernel(f"{_OURS}self_attn/{ours}/kernel", f"{_BLOCK}{theirs}.weight") for theirs, ours, _ in (_Q, _K)),
    *(same(f"{_OURS}self_attn/{ours}/bias", f"{_BLOCK}{theirs}.bias") for theirs, ours, _ in (_Q, _K)),
)
_NEIGHBOURS: Table = tuple(
    _turned(f"{_OURS}self_attn/{ours}/{mine}", f"{_BLOCK}{theirs}.{part}", heads)
    for theirs, ours, heads in (_Q, _K)
    for mine, part in (("kernel", "weight"), ("bias", "bias"))
)
_SUB_NORMS: Table = (
    same(f"{_OURS}self_attn/attn_sub_norm/weight", f"{_BLOCK}attn_sub_norm.weight"),
    same(f"{_OURS}mlp/ffn_sub_norm/weight", f"{_BLOCK}ffn_sub_norm.weight"),
)
TABLES: dict[str, Table] = {
    "llama": (*_ENDS, *_NEIGHBOURS),
    "qwen2": (*_ENDS, *_HALVES),
    "bitnet": (*_ENDS, *_HALVES, *_SUB_NORMS),
}

# what all three compute, and nothing else
COMMON = {
    "norm": ("rms",), "parallel_block": (False,), "causal": (True,), "activation": ("silu",), "gated": (True,),
    "num_experts": (0,), "share_qk": (False,), "lfa_variant": ("none",), "positions": ("rotary",),
    "rotary_share": (1.0,), "rope_dtype": ("float32",), "logit_scale": (1.0,),
}  # fmt: skip
OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"sub_norms": (False,)},
    "qwen2": {"o_bias": (False,), "mlp_bias": (False,), "rope_scaling": ("none", "linear", "ntk")},
    "bitnet": {"tie_embeddings": (True,), "qkv_bias": (False,), "o_bias": (False,), "mlp_bias": (False,),
               "rope_scaling": ("none", "linear", "ntk")},
}  # fmt: skip


def architecture_for(config: ModelConfig, place: str, ternary: bool = False) -> str:
    """llama, qwen2 or bitnet. `ternary`: some matrices have a scale beside them.

    Raises UserError naming the first key of the model that llama.cpp cannot hold, and what it holds.
    """
    qwen2 = config.qkv_bias and not (config.o_bias or config.mlp_bias or ternary)
    name = "bitnet" if config.sub_norms else "qwen2" if qwen2 else "llama"
    for key, known in {**COMMON, **OWN[name]}.items():
        if (found := getattr(config, key)) not in known:
            told = " or ".join(repr(value) for value in known)
            raise UserError(f"{place}: model.{key} = {found!r}: llama.cpp's {name} has {told} only")
    if name != "llama" and config.num_heads * config.head_dim != config.hidden_size:
        raise UserError(
            f"{place}: model.head_dim = {config.head_dim}: llama.cpp's {name} expects hidden_size / num_heads = "
            f"{config.hidden_size / config.num_heads:g}"
        )
    return name


def hyperparameters(config: ModelConfig) -> Iterator[tuple[str, str, Any]]:
    """(key behind the architecture's name, its type, value)."""
    length = min(config.max_length, config.sliding_window or config.max_length)
    theta = config.rope_theta
    if config.rope_scaling == "ntk":  # a larger base, as models/rope.py has it
        theta *= config.rope_factor ** (config.rotary_dim / (config.rotary_dim - 2))
    yield from (
        ("vocab_size", "uint32", config.vocab_size),
        ("context_length", "uint32", length),
        ("embedding_length", "uint32", config.hidden_size),
        ("block_count", "uint32", config.num_layers),
        ("feed_forward_length", "uint32", config.intermediate_size),
        ("attention.head_count", "uint32", config.num_heads),
        ("attention.head_count_kv", "uint32", config.num_kv_heads),
        ("attention.key_length", "uint32", config.head_dim),
        ("attention.value_length", "uint32", config.head_dim),
        ("attention.layer_norm_rms_epsilon", "float32", config.norm_eps),
        ("rope.dimension_count", "uint32", config.rotary_dim),
        ("rope.freq_base", "float32", theta),
    )
    if config.rope_scaling == "linear":
        yield from (("rope.scaling.type", "string", "linear"), ("rope.scaling.factor", "float32", config.rope_factor))


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides the frequencies by, float32[R/2]; None where keys say all."""
    if config.rope_scaling != "llama3":
        return None
    plain = frequencies(dataclasses.replace(config, rope_scaling="none"))
    return (plain.astype(np.float64) / frequencies(config)).astype(np.float32)
