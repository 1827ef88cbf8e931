"""The model families as rows of values. `preset("llama-7b")` is a ModelConfig; a config file overrides its keys.

Sources: LLaMA (arXiv:2302.13971, table 2), Llama 2 (arXiv:2307.09288, table 1), Llama 3 (arXiv:2407.21783, table 3),
Llama 3.2 (its model card), Code Llama (arXiv:2308.12950), Mistral (arXiv:2310.06825, table 1; the first version, which
has a window), Skywork (arXiv:2310.19341, table 3, and the released config), Koala (BAIR blog, 2023-04-03: LLaMA weights
fine-tuned), Qwen2 (arXiv:2407.10671, table 1), Yuan 2.0 (arXiv:2311.15786, table 4, and the released scripts).
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
    "llama3.2-1b": _llama(
        2048,
        8192,
        16,
        32,
        8,
        tie_embeddings=True,
        rope_scaling="llama3",
        rope_factor=32.0,
        **{**_LLAMA3, "max_length": 131072},
    ),
    "codellama-34b": _llama(8192, 22016, 48, 64, 8, max_length=16384, norm_eps=1e-5, rope_theta=1e6),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, max_length=32768, norm_eps=1e-5, sliding_window=4096),
    "skywork-13b": _llama(4608, 12288, 52, 36, vocab_size=65519, max_length=4096),
    "qwen2-7b": _llama(3584, 18944, 28, 28, 4, vocab_size=152064, max_length=32768, rope_theta=1e6, qkv_bias=True),
}
_YUAN: dict[str, Any] = {"vocab_size": 135040, "max_length": 4096, "tie_embeddings": True, "lfa_variant": "yuan"}
PRESETS |= {
    "yuan-2b": _llama(2048, 8192, 24, 32, **{**_YUAN, "max_length": 8192}),
    "yuan-51b": _llama(8192, 32768, 42, 64, **_YUAN),
    "yuan-102b": _llama(8192, 32768, 84, 64, **_YUAN),
}
PRESETS |= {"koala-7b": PRESETS["llama-7b"], "koala-13b": PRESETS["llama-13b"]}


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
