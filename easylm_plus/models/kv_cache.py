"""What decoding keeps of keys and values: in the compute dtype, or as int8 codes with a scale a token and head.

    s = max |x| / 127 over a head's features      codes = round(x / s)

In int8 a head of 64 takes 68 bytes a token and not 128 (bfloat16), of 128 features 132 and not 256. Keys are kept
turned (rope.py), so that nothing is turned again when they are read. Attention reads what the codes mean: values in the
compute dtype, made where they are used.

Legend: B batch, S cache slots, T tokens of this call, G kv heads, K head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike


@struct.dataclass
class Rows8:
    """Rows of features in 8 bits."""

    codes: jax.Array  # int8[..., K]
    scale: jax.Array  # float32[..., 1]


def rows8(x: jax.Array) -> Rows8:
    """x[..., K] rounded; a row of zeros has the scale 0."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1, keepdims=True) / 127
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
    return Rows8(codes.astype(jnp.int8), scale)


def empty(kind: str, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Nothing kept yet, [..., B, G, S, K]; `kind`: model.kv_cache."""
    if kind == "int8":
        return Rows8(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1)))
    return jnp.zeros(shape, dtype)


def write(kept: Any, new_BTGK: jax.Array, offset: Any) -> Any:
    """The cache [B, G, S, K] with T more tokens from slot `offset` on."""
    new_BGTK = new_BTGK.swapaxes(1, 2)
    new = rows8(new_BGTK) if isinstance(kept, Rows8) else new_BGTK
    put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), offset, axis=2)
    return jax.tree.map(put, kept, new)


def read(kept: Any, dtype: DTypeLike) -> jax.Array:
    """[B, G, S, K] as attention multiplies by it."""
    return (kept.codes * kept.scale).astype(dtype) if isinstance(kept, Rows8) else kept
