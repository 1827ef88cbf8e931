"""The model families as rows of values. `preset("llama-7b")` is a ModelConfig; a config file overrides its keys.

Sources: LLaMA (arXiv:2302.13971, table 2), Llama 2 (arXiv:2307.09288, table 1), Llama 3 (arXiv:2407.21783, table 3),
Llama 3.1 and 3.2 (their model cards), Code Llama (arXiv:2308.12950; Phind's 34B is it fine-tuned), Mistral
(arXiv:2310.06825, table 1; the first version, which has a window), Mixtral (arXiv:2401.04088, table 1), Skywork
(arXiv:2310.19341, table 3, and the released config), Koala (BAIR blog, 2023-04-03: LLaMA weights fine-tuned), Qwen2
(arXiv:2407.10671, table 1), Yuan 2.0 (arXiv:2311.15786, table 4, and the released scripts), Yuan 2.0-M32
(arXiv:2405.17976 and the released config), PaLM (arXiv:2204.02311, table 1), GPT-3 (arXiv:2005.14165, table 2.1; its
alternating sparse attention is left out), FP8-LM (arXiv:2310.18313, table 1), Switch (arXiv:2101.03961), BitNet b1.58
(arXiv:2402.17764, training tips) and 2B4T (arXiv:2504.12285), Stable LM 2 (arXiv:2402.17834, table 2).
"""

import dataclasses
import difflib
from typing import Any

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None, **rest: object) -> ModelConfig:
    return ModelConfig(
        **{  # type: ignore[arg-type]
            "vocab_size": 32000,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads or heads,
            "head_dim": hidden // heads,
            **rest,
        }
    )


_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "max_length": 8192, "norm_eps": 1e-5, "rope_theta": 500000.0}
_LLAMA31 = {**_LLAMA3, "max_length": 131072, "rope_scaling": "llama3", "rope_factor": 32.0}
_CODE: dict[str, Any] = {"max_length": 16384, "norm_eps": 1e-5, "rope_theta": 1e6}

PRESETS = {
    # A few thousand parameters: for tests and for stepping through the code.
    "debug": _llama(64, 128, 2, 4, 2, vocab_size=512, max_length=256, scan_layers=False),
    # About a million: learns the embedded tasks on a laptop CPU. Unrolled, because XLA:CPU gains from it.
    "tiny": _llama(128, 384, 4, 4, vocab_size=1024, max_length=512, tie_embeddings=True, scan_layers=False),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-30b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64, norm_eps=1e-5),
    "llama2-7b": _llama(4096, 11008, 32, 32, max_length=4096, norm_eps=1e-5),
    "llama2-13b": _llama(5120, 13824, 40, 40, max_length=4096, norm_eps=1e-5),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, max_length=4096, norm_eps=1e-5),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, **_LLAMA3),
    "llama3.1-8b": _llama(4096, 14336, 32, 32, 8, **{**_LLAMA31, "rope_factor": 8.0}),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, tie_embeddings=True, **_LLAMA31),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, 8, tie_embeddings=True, **_LLAMA31),
    "codellama-7b": _llama(4096, 11008, 32, 32, **{**_CODE, "vocab_size": 32016}),
    "codellama-34b": _llama(8192, 22016, 48, 64, 8, **_CODE),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, max_length=32768, norm_eps=1e-5, sliding_window=4096),
    "mixtral-8x7b": _llama(
        4096, 14336, 32, 32, 8, max_length=32768, norm_eps=1e-5, rope_theta=1e6, num_experts=8, experts_per_token=2
    ),
    "skywork-13b": _llama(4608, 12288, 52, 36, vocab_size=65519, max_length=4096),
    "qwen2-7b": _llama(3584, 18944, 28, 28, 4, vocab_size=152064, max_length=32768, rope_theta=1e6, qkv_bias=True),
}
PRESETS["stablelm2-1.6b"] = _llama(2048, 5632, 24, 32, vocab_size=100352, max_length=4096, norm="layer", norm_eps=1e-5,
                                   qkv_bias=True, rotary_share=0.25)  # fmt: skip
PRESETS |= {"koala-7b": PRESETS["llama-7b"], "koala-13b": PRESETS["llama-13b"], "phind-34b": PRESETS["codellama-34b"]}

_YUAN: dict[str, Any] = {"vocab_size": 135040, "max_length": 4096, "tie_embeddings": True, "lfa_variant": "yuan"}
PRESETS |= {
    "yuan-2b": _llama(2048, 8192, 24, 32, **{**_YUAN, "max_length": 8192}),
    "yuan-51b": _llama(8192, 32768, 42, 64, **_YUAN),
    "yuan-102b": _llama(8192, 32768, 84, 64, **_YUAN),
    "yuan-m32": _llama(2048, 8192, 24, 16, head_dim=256, rotary_share=0.5, rope_dtype="bfloat16", num_experts=32,
                       experts_per_token=2, router="attention", **_YUAN),
}  # fmt: skip

_BITNET: dict[str, Any] = {"norm_eps": 1e-5, "sub_norms": True}
PRESETS |= {
    "bitnet-700m": _llama(1536, 4096, 24, 24, **_BITNET),
    "bitnet-1.3b": _llama(2048, 5460, 24, 32, **_BITNET),
    "bitnet-3b": _llama(3200, 8640, 26, 32, **_BITNET),
    "bitnet-3.9b": _llama(3200, 12800, 26, 32, **_BITNET),
    "bitnet-2b4t": _llama(2560, 6912, 30, 20, 5, vocab_size=128256, max_length=4096, rope_theta=5e5, activation="relu2",
                          tie_embeddings=True, **_BITNET),
}  # fmt: skip

_PALM: dict[str, Any] = {"vocab_size": 256000, "head_dim": 256, "tie_embeddings": True, "norm": "layer_no_bias",
                         "parallel_block": True, "init": "palm"}  # fmt: skip
PRESETS |= {
    "palm-8b": _llama(4096, 16384, 32, 16, 1, logit_scale=4096**-0.5, **_PALM),
    "palm-62b": _llama(8192, 32768, 64, 32, 1, logit_scale=8192**-0.5, **_PALM),
    "palm-540b": _llama(18432, 73728, 118, 48, 1, logit_scale=18432**-0.5, **_PALM),
}

_GPT: dict[str, Any] = {
    "vocab_size": 50257, "norm": "layer", "norm_eps": 1e-5, "activation": "gelu_tanh", "gated": False,
    "mlp_bias": True, "qkv_bias": True, "o_bias": True, "tie_embeddings": True,
}  # fmt: skip
_GPT2, _GPT3 = ({**_GPT, "positions": "learned", "init": "gpt2", "max_length": length} for length in (1024, 2048))
# FP8-LM never says its vocabulary; the bytes on the wire in its table 5 imply about 100,000 (cl100k, rounded up)
_GPT_FP8 = {**_GPT, "init": "small", "vocab_size": 100352}
PRESETS |= {
    "gpt2-124m": _llama(768, 3072, 12, 12, **_GPT2),
    "gpt3-125m": _llama(768, 3072, 12, 12, **_GPT3),
    "gpt3-6.7b": _llama(4096, 16384, 32, 32, **_GPT3),
    "gpt3-13b": _llama(5120, 20480, 40, 40, **_GPT3),
    "gpt3-175b": _llama(12288, 49152, 96, 96, **_GPT3),
    "gpt-fp8-125m": _llama(768, 3072, 12, 12, **_GPT_FP8),
    "gpt-fp8-7b": _llama(4096, 16384, 32, 32, **_GPT_FP8),
    "gpt-fp8-13b": _llama(5120, 20480, 40, 40, **_GPT_FP8),
    "gpt-fp8-175b": _llama(12288, 49152, 96, 96, **_GPT_FP8),
}
# Switch-Base has T5-Base's widths and experts in every second layer of an encoder and a decoder; this is a decoder with
# experts in all layers: its routing and its sizes, not its architecture.
PRESETS |= {
    f"switch-base-{E}": _llama(768, 3072, 12, 12, activation="relu", gated=False, num_experts=E, experts_per_token=1,
                               norm_topk=False, capacity_factor=1.25, tie_embeddings=True, max_length=512)
    for E in (8, 64)
}  # fmt: skip


def preset(name: str, **overrides: object) -> ModelConfig:
    """The named ModelConfig, with some keys replaced. An unknown name is an error that names the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown model {name!r}: did you mean {near!r}? Known: {', '.join(PRESETS)}")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown key model.{key}: did you mean {near!r}?")
    return dataclasses.replace(PRESETS[name], **overrides)  # type: ignore[arg-type]
