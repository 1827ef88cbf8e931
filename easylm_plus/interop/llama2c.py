"""llama2.c checkpoints (Karpathy 2023, "version 0"): seven int32, then every weight as float32 in a fixed order.

Queries and keys pair neighbouring features in their rotary embedding, ours pair the halves of a head, so their
output features are reordered once. The trailing tables of cosines are skipped: they follow from theta.
"""

import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, unstack_layers


def load_llama2c(path: str | Path, **overrides: Any) -> tuple[Transformer, Any]:
    """A llama2.c .bin file -> (model, params) in float32. `overrides` replace keys of the ModelConfig."""
    raw = Path(path).read_bytes()
    if len(raw) < 28:
        raise UserError(f"{path}: found {len(raw)} bytes, expected a llama2.c header of 28")
    dim, ffn, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", raw[:28])
    if min(dim, ffn, layers, heads, kv_heads, abs(vocab), length) < 1 or dim % heads:
        raise UserError(f"{path}: found header {struct.unpack('<7i', raw[:28])}, expected a llama2.c version 0 file")
    size = dim // heads
    values = {
        "vocab_size": abs(vocab),
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "max_length": length,
        "norm_eps": 1e-5,
        "tie_embeddings": vocab > 0,
    }
    config = ModelConfig(**{**values, **overrides})
    take = _Reader(np.frombuffer(raw, "<f4", count=(len(raw) - 28) // 4, offset=28), path)
    V, D, F, L, Q, G = abs(vocab), dim, ffn, layers, heads * size, kv_heads * size
    embedding, attention_norm = take(V, D), take(L, D)
    q, k, v, o = take(L, Q, D), take(L, G, D), take(L, G, D), take(L, D, Q)
    ffn_norm, gate, down, up = take(L, D), take(L, F, D), take(L, D, F), take(L, F, D)
    norm = take(D)
    take(length, size)  # cosines and sines
    kernel = lambda w: {"kernel": jnp.asarray(w.swapaxes(1, 2))}
    params: dict[str, Any] = {
        "embed_tokens": {"embedding": jnp.asarray(embedding)},
        "layers": {
            "input_layernorm": {"weight": jnp.asarray(attention_norm)},
            "post_attention_layernorm": {"weight": jnp.asarray(ffn_norm)},
            "self_attn": {
                "q_proj": kernel(_halves(q, heads)),
                "k_proj": kernel(_halves(k, kv_heads)),
                "v_proj": kernel(v),
                "o_proj": kernel(o),
            },
            "mlp": {"gate_proj": kernel(gate), "up_proj": kernel(up), "down_proj": kernel(down)},
        },
        "norm": {"weight": jnp.asarray(norm)},
    }
    if vocab < 0:
        params["lm_head"] = {"kernel": jnp.asarray(take(V, D).T)}
    if take.at != take.flat.size:
        raise UserError(f"{path}: found {take.flat.size} weights, expected {take.at} from its header")
    return Transformer(config), params if config.scan_layers else unstack_layers(params)


class _Reader:
    """Hands out consecutive arrays of a flat buffer."""

    def __init__(self, flat: np.ndarray, path: str | Path):
        self.flat, self.path, self.at = flat, path, 0

    def __call__(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        if self.at + count > self.flat.size:
            raise UserError(f"{self.path}: ends after {self.flat.size} weights, expected at least {self.at + count}")
        array = self.flat[self.at : self.at + count].reshape(shape)
        self.at += count
        return array


def _halves(w_LOD: np.ndarray, heads: int) -> np.ndarray:
    """Output features of each head from (0, 1), (2, 3), ... pairs to (0, K/2), (1, K/2 + 1), ..."""
    L, out, D = w_LOD.shape
    pairs = w_LOD.reshape(L, heads, out // heads // 2, 2, D)
    return pairs.swapaxes(2, 3).reshape(L, out, D)
