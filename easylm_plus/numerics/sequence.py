"""Sequence parallelism: between its matrices a block works on pieces of the length that `tensor` cuts, too.

Norms and residuals are of one token each, so that devices of `tensor` need not all compute them (Korthikanti et al.
2022, arXiv:2205.05198). Before attention and feed-forward the pieces are brought together; FP8-LM's O3 sends them as
E4M3 codes (arXiv:2310.18313, section 2.3). The products that read them cast with the same scale, so that nothing is
rounded twice. Gradients go back in the compute dtype, as in the released code.

Legend: B batch, T length, D embed.
"""

import jax
import jax.numpy as jnp

from easylm_plus.numerics.formats import E4M3
from easylm_plus.numerics.fp8 import narrowed
from easylm_plus.parallel.collectives import as_bytes, from_bytes
from easylm_plus.parallel.sharding import constrain


def whole_length(x_BTD: jax.Array, fmt: str) -> jax.Array:
    """x with all tokens of a row on each device that multiplies them; `fmt`: compute | e4m3, what travels."""
    return _gathered(x_BTD) if fmt == "e4m3" else constrain(x_BTD, "batch", "length", "act_embed")


@jax.custom_vjp
def _gathered(x_BTD: jax.Array) -> jax.Array:
    code, back, _ = narrowed(x_BTD, E4M3, None)
    # both constraints are needed: with the second alone the partitioner gathers before it casts
    pieces = constrain(as_bytes(code), "batch", "residual", "act_embed")
    whole = constrain(pieces, "batch", "length", "act_embed")
    return (from_bytes(whole, E4M3.dtype).astype(jnp.float32) * back).astype(x_BTD.dtype)


def _backward(_: None, dy_BTD: jax.Array) -> tuple[jax.Array]:
    return (constrain(dy_BTD, "batch", "residual", "act_embed"),)


_gathered.defvjp(lambda x: (_gathered(x), None), _backward)
