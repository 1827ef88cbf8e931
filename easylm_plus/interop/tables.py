"""Which of other people's tensors is which of ours: one table a family, read in both directions.

A rule links some of our weights with some of their tensors. `read` turns theirs into ours and `write` is its exact
inverse: both only reorder numbers, so what goes there and back is the same bit for bit. {i} stands for the layer and
{e} for the expert; a rule is about one layer (and one expert), and our weights of all are stacked in that order.

Kernels are [out, in] in PyTorch's Linear and [in, out] here; GPT-2's Conv1D has [in, out] already.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from easylm_plus.interop.copying import compact
from easylm_plus.models.config import ModelConfig

Arrays = tuple[np.ndarray, ...]
Change = Callable[[Arrays, ModelConfig], Arrays]


class Rule(NamedTuple):
    """Our weights and their tensors that hold the same numbers, and the way from each to the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Change
    write: Change


Table = tuple[Rule, ...]


def same(ours: str, theirs: str) -> Rule:
    """The same array."""
    keep: Change = lambda arrays, _: arrays
    return Rule((ours,), (theirs,), keep, keep)


def kernel(ours: str, theirs: str) -> Rule:
    """[in, out] here, [out, in] there."""
    turn: Change = lambda arrays, _: (arrays[0].T,)
    return Rule((ours,), (theirs,), turn, turn)


def split_rows(ours: tuple[str, ...], theirs: str) -> Rule:
    """Kernels of ours [in, out] whose [out, in] lie one below the other in one tensor of theirs."""
    read: Change = lambda arrays, _: tuple(part.T for part in np.split(arrays[0], len(ours)))
    write: Change = lambda arrays, _: (np.concatenate([compact(x.T) for x in arrays]),)
    return Rule(ours, (theirs,), read, write)


def split_columns(ours: tuple[str, ...], theirs: str) -> Rule:
    """Arrays of ours that lie side by side in one tensor of theirs."""
    read: Change = lambda arrays, _: tuple(np.split(arrays[0], len(ours), axis=-1))
    write: Change = lambda arrays, _: (np.concatenate(arrays, axis=-1),)
    return Rule(ours, (theirs,), read, write)


def _yuan_read(arrays: Arrays, config: ModelConfig) -> Arrays:
    """Yuan's q_proj and k_proj are the halves of one fused matrix, in which every head has its query rows and then its
    key rows: the first half of the heads lies in q_proj, the rest in k_proj."""
    fused = np.concatenate(arrays).reshape(config.num_heads, 2, config.head_dim, -1)
    return tuple(fused[:, part].reshape(-1, fused.shape[-1]).T for part in (0, 1))


def _yuan_write(arrays: Arrays, config: ModelConfig) -> Arrays:
    by_head = [compact(x.T).reshape(config.num_heads, config.head_dim, -1) for x in arrays]
    fused = np.stack(by_head, axis=1).reshape(-1, by_head[0].shape[-1])
    return tuple(np.split(fused, 2))


def convolution(ours: str, theirs: str, taps: int = 2) -> Rule:
    """[taps * in, out] here, the oldest tap first; [out, in, taps, 1] there."""
    read: Change = lambda arrays, _: (arrays[0][..., 0].transpose(2, 1, 0).reshape(-1, arrays[0].shape[0]),)
    write: Change = lambda arrays, _: (
        arrays[0].reshape(taps, -1, arrays[0].shape[-1]).transpose(2, 1, 0)[..., np.newaxis],
    )
    return Rule((ours,), (theirs,), read, write)


_OURS, _THEIRS = "layers/{i}/", "model.layers.{i}."
_MLP = ("gate", "up", "down")
_EXPERTS = tuple(f"{_OURS}mlp/experts/{p}_proj/kernel" for p in _MLP)

_ENDS: Table = (
    same("embed_tokens/embedding", "model.embed_tokens.weight"),
    same("norm/weight", "model.norm.weight"),
    kernel("lm_head/kernel", "lm_head.weight"),
)
_NORMS: Table = tuple(
    same(f"{_OURS}{name}/weight", f"{_THEIRS}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
)
_ATTENTION: Table = (
    *(kernel(f"{_OURS}self_attn/{p}_proj/kernel", f"{_THEIRS}self_attn.{p}_proj.weight") for p in "qkvo"),
    *(same(f"{_OURS}self_attn/{p}_proj/bias", f"{_THEIRS}self_attn.{p}_proj.bias") for p in "qkvo"),
)
LLAMA: Table = (
    *_ENDS,
    *_NORMS,
    *_ATTENTION,
    *(kernel(f"{_OURS}mlp/{p}_proj/kernel", f"{_THEIRS}mlp.{p}_proj.weight") for p in _MLP),
    *(same(f"{_OURS}mlp/{p}_proj/bias", f"{_THEIRS}mlp.{p}_proj.bias") for p in _MLP),
)
BITNET: Table = (
    *LLAMA,
    same(f"{_OURS}self_attn/attn_sub_norm/weight", f"{_THEIRS}self_attn.attn_sub_norm.weight"),
    same(f"{_OURS}mlp/ffn_sub_norm/weight", f"{_THEIRS}mlp.ffn_sub_norm.weight"),
)
STABLELM: Table = (
    *LLAMA,
    same("norm/bias", "model.norm.bias"),
    *(same(f"{_OURS}{n}/bias", f"{_THEIRS}{n}.bias") for n in ("input_layernorm", "post_attention_layernorm")),
)
MIXTRAL: Table = (
    *_ENDS,
    *_NORMS,
    *_ATTENTION,
    kernel(f"{_OURS}mlp/router/kernel", f"{_THEIRS}block_sparse_moe.gate.weight"),
    *(
        kernel(ours, f"{_THEIRS}block_sparse_moe.experts.{{e}}.w{n}.weight")
        for ours, n in zip(_EXPERTS, (1, 3, 2), strict=True)
    ),
)
_GATE = "self_attn.lf_gate."
YUAN: Table = (
    *_ENDS,
    *_NORMS,
    *(kernel(f"{_OURS}self_attn/{p}_proj/kernel", f"{_THEIRS}self_attn.{p}_proj.weight") for p in "vo"),
    Rule(
        tuple(f"{_OURS}self_attn/{p}_proj/kernel" for p in "qk"),
        tuple(f"{_THEIRS}self_attn.{p}_proj.weight" for p in "qk"),
        _yuan_read,
        _yuan_write,
    ),
    *(convolution(f"{_OURS}self_attn/lf_gate/conv{n}/kernel", f"{_THEIRS}{_GATE}conv{n}.weight") for n in (1, 2)),
    *(same(f"{_OURS}self_attn/lf_gate/conv{n}/bias", f"{_THEIRS}{_GATE}conv{n}.bias") for n in (1, 2)),
    same(f"{_OURS}self_attn/lf_gate/output_layernorm/weight", f"{_THEIRS}{_GATE}output_layernorm.weight"),
    # the variant whose queries and keys share a projection
    kernel(f"{_OURS}self_attn/qk_proj/kernel", f"{_THEIRS}self_attn.qk_proj.weight"),
    *(same(f"{_OURS}self_attn/qk_{p}", f"{_THEIRS}self_attn.qk_{p}") for p in ("weight", "bias")),
    # dense: silu stands on what is called up_proj there
    kernel(f"{_OURS}mlp/gate_proj/kernel", f"{_THEIRS}mlp.up_proj.weight"),
    kernel(f"{_OURS}mlp/up_proj/kernel", f"{_THEIRS}mlp.gate_proj.weight"),
    kernel(f"{_OURS}mlp/down_proj/kernel", f"{_THEIRS}mlp.down_proj.weight"),
    # M32: silu stands on the first half of w1
    *(
        kernel(f"{_OURS}mlp/router/{p}/kernel", f"{_THEIRS}mlp.gate.{p}.weight") for p in ("query", "key", "value")
    ),
    split_rows(_EXPERTS[:2], f"{_THEIRS}mlp.experts.{{e}}.w1.weight"),
    kernel(_EXPERTS[2], f"{_THEIRS}mlp.experts.{{e}}.w2.weight"),
)  # fmt: skip
_H = "transformer.h.{i}."
GPT2: Table = (
    same("embed_tokens/embedding", "transformer.wte.weight"),
    same("embed_positions/embedding", "transformer.wpe.weight"),
    *(same(f"norm/{part}", f"transformer.ln_f.{part}") for part in ("weight", "bias")),
    *(same(f"{_OURS}input_layernorm/{part}", f"{_H}ln_1.{part}") for part in ("weight", "bias")),
    *(same(f"{_OURS}post_attention_layernorm/{part}", f"{_H}ln_2.{part}") for part in ("weight", "bias")),
    *(
        split_columns(tuple(f"{_OURS}self_attn/{p}_proj/{ours}" for p in "qkv"), f"{_H}attn.c_attn.{theirs}")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
    *(
        same(f"{_OURS}{ours}_proj/{mine}", f"{_H}{theirs}.{part}")
        for ours, theirs in (("self_attn/o", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj"))
        for mine, part in (("kernel", "weight"), ("bias", "bias"))
    ),
    kernel("lm_head/kernel", "lm_head.weight"),
)

# The released models and derivatives: Llama 1 to 3.2, Code Llama, Koala, Phind (Llama); the others by their names.
ARCHITECTURES: dict[str, Table] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "SkyworkForCausalLM": LLAMA,
    "YuanForCausalLM": YUAN,
    "StableLmForCausalLM": STABLELM,
    "MixtralForCausalLM": MIXTRAL,
    "GPT2LMHeadModel": GPT2,
    "BitNetForCausalLM": BITNET,
}
# Tensors that follow from the config: tables of angles, masks.
DERIVED = r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$"
