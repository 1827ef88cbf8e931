"""Self-attention: projections, what is filtered before and turned after them, and the cache. attend.py has the rest.

Decoding with a cache always runs XLA's attention.

Legend: B batch, T queries, S keys, D embed, H heads, G kv heads, K head_dim, R features of a head that turn.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from easylm_plus.models.attend import Sight, attend, cached, sight_of, visible
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.ema import DampedEMA
from easylm_plus.models.initializers import initializer
from easylm_plus.models.kv_cache import read, write
from easylm_plus.models.lfa import LocalizedFilter
from easylm_plus.models.norms import norm
from easylm_plus.models.rope import rotate
from easylm_plus.models.weights import Projection, fetch
from easylm_plus.numerics.precision import Precision
from easylm_plus.parallel.sharding import constrain


class Layout(NamedTuple):
    """What the attention layers share: rotations of the queries, and who belongs to which document."""

    cos: Any  # float32[B, T, 1, R/2]; None where positions are learned
    sin: Any
    segments_BT: jax.Array | None  # int32, 0 = padding; None: one document a row
    key_segments_BS: jax.Array | None = None  # of the cache's slots, 0 = empty; None: no cache
    offset: jax.Array | int = 0  # the cache slot of the first query


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, G, S, K]; with a leading layer axis in a scanned model."""

    k: Any  # an array, or codes (models/kv_cache.py)
    v: Any
    recent: jax.Array | None = None  # what a filter keeps: the last inputs [B, R, D], or its state (models/lfa.py)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layout: Layout, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x -> (attention output [B, T, D], the cache with this call's keys and values written)."""
        c = self.config
        B, T, D = x_BTD.shape
        z_BTD, recent = self._filtered(x_BTD, layout, cache)
        q, k = self._queries_and_keys(z_BTD)
        v = self._heads("v_proj", x_BTD, c.num_kv_heads, "kv_heads")
        if layout.cos is not None:
            q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        if cache is None:
            y = attend(q, k, v, layout.segments_BT, c)
        else:
            # the barrier keeps what is written one array: XLA:CPU would write it twice, for attention and for later,
            # and copy the whole cache for that, for every token
            k, v = jax.lax.optimization_barrier((write(cache.k, k, layout.offset), write(cache.v, v, layout.offset)))
            cache = LayerCache(k, v, recent)
            y = cached(q, read(k, q.dtype), read(v, q.dtype), _cache_mask(layout, T, sight_of(c)))
        y = constrain(y, "batch", "length", "act_heads", None).reshape(B, T, -1)
        if c.sub_norms:
            y = norm(c, self.precision, name="attn_sub_norm")(y)
        out = Projection(D, ("heads", "embed"), initializer(c, "residual"), self.precision, c.o_bias, name="o_proj")
        return constrain(out(y), "batch", "residual", "act_embed"), cache

    def _filtered(
        self, x_BTD: jax.Array, layout: Layout, cache: LayerCache | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(what queries and keys are projected from, what the cache keeps of the filter after this call)."""
        c = self.config
        if c.lfa_variant == "none":
            return x_BTD, None
        if c.lfa_variant == "ema":
            ema = DampedEMA(c, self.precision, name="lf_gate")
            z_BTD, state = ema(x_BTD, layout.segments_BT, None if cache is None else cache.recent)
            return z_BTD, None if cache is None else state
        lfa = LocalizedFilter(c, self.precision, name="lf_gate")
        if cache is None:
            return lfa(x_BTD, layout.segments_BT), None
        R, T = c.lfa_reach, x_BTD.shape[1]
        rows = jnp.concatenate([cache.recent.astype(x_BTD.dtype), x_BTD], axis=1)  # type: ignore[union-attr]
        # slot s stands at s + R, and before the first there is nothing
        slots = jnp.pad(layout.key_segments_BS, ((0, 0), (R, 0)))  # type: ignore[arg-type]
        segments = jax.lax.dynamic_slice_in_dim(slots, layout.offset, R + T, axis=1)
        return lfa(rows, segments, before=R), rows[:, T:]

    def _queries_and_keys(self, z_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, H, K] and [B, T, G, K]; with `share_qk` one projection u, each scaled and shifted by feature."""
        c, p = self.config, self.precision
        if not c.share_qk:
            q = self._heads("q_proj", z_BTD, c.num_heads, "heads")
            return q, self._heads("k_proj", z_BTD, c.num_kv_heads, "kv_heads")
        u = self._heads("qk_proj", z_BTD, c.num_heads, "heads")
        two = (2, c.num_heads * c.head_dim)
        fetched = (fetch(self, "qk_weight", nn.initializers.ones, two, (None, "heads"), p),
                   fetch(self, "qk_bias", nn.initializers.zeros, two, (None, "heads"), p))  # fmt: skip
        weight, bias = (x.astype(u.dtype).reshape(2, c.num_heads, c.head_dim) for x in fetched)
        return u * weight[0] + bias[0], u * weight[1] + bias[1]

    def _heads(self, name: str, x_BTD: jax.Array, heads: int, axis: str) -> jax.Array:
        c = self.config
        dense = Projection(
            heads * c.head_dim,
            ("embed", axis),
            initializer(c, "hidden"),
            self.precision,
            c.qkv_bias,
            name=name,
        )
        y = dense(x_BTD).reshape(*x_BTD.shape[:2], heads, c.head_dim)
        return constrain(y, "batch", "length", f"act_{axis}", None)


def _cache_mask(layout: Layout, T: int, sight: Sight) -> jax.Array:
    """bool[B, T, S]: slots already written, of the same segment, not later than the query."""
    slots = jnp.arange(layout.key_segments_BS.shape[1])  # type: ignore[union-attr]
    return visible(layout.offset + jnp.arange(T), slots, layout.segments_BT, layout.key_segments_BS, sight)
