"""The decoder: embedding, blocks, final norm, head.

    params = model.init(key, tokens)["params"]          a plain nested dict, after `unboxed`
    logits = model.apply({"params": params}, tokens)    float32[B, T, V]
    x      = model.apply({"params": params}, tokens, method="hidden")   [B, T, D], for the blocked loss

Names follow Hugging Face's LLaMA: embed_tokens/embedding, layers/.../self_attn/q_proj/kernel, norm/weight,
lm_head/kernel. With `scan_layers` every array under `layers` has a leading layer axis; without, `layers` holds
"0", "1", ... with the same names below.

Legend: B batch, T length, S cache slots, D embed, V vocabulary, L layers, G kv heads, K head_dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from easylm_plus.errors import UserError
from easylm_plus.models.attention import Attention, LayerCache, Layout
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.feedforward import FeedForward
from easylm_plus.models.initializers import initializer
from easylm_plus.models.kv_cache import empty as empty_rows
from easylm_plus.models.lfa import nothing_kept
from easylm_plus.models.moe import MixtureOfExperts
from easylm_plus.models.norms import norm
from easylm_plus.models.rope import rotations
from easylm_plus.models.weights import Embedding, Projection
from easylm_plus.numerics.precision import POLICIES, Precision
from easylm_plus.numerics.sequence import whole_length
from easylm_plus.parallel.sharding import constrain

# What a block keeps for its backward pass; everything else is computed again.
REMAT = {
    "none": None,  # keeps all
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the outputs of the weight matrices
    "full": jax.checkpoint_policies.nothing_saveable,  # only the block's input
}


class Cache(NamedTuple):
    """Decoding state: what has been seen so far. A pytree, passed in and handed back."""

    layers: Any  # LayerCache [L, B, G, S, K] (scanned) or a tuple of LayerCache [B, G, S, K]
    segments_BS: jax.Array  # int32; 0: slot empty or padding
    length: jax.Array  # int32: slots filled so far, the same for all rows


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): pre-norm, as in LLaMA.

    A parallel block is x + attention(h) + ffn(h) with h = norm(x) (PaLM, arXiv:2204.02311, section 2).
    """

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layout: Layout, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Carries x through the block; the cache rides along as the scan's per-layer input and output."""
        c, p = self.config, self.precision
        h_BTD = whole_length(norm(c, p, name="input_layernorm")(x_BTD), c.gather)
        y_BTD, new_cache = Attention(c, p, name="self_attn")(h_BTD, layout, cache)
        if c.parallel_block:
            return x_BTD + y_BTD + self._feedforward(h_BTD, layout), new_cache
        x_BTD = x_BTD + y_BTD
        h_BTD = whole_length(norm(c, p, name="post_attention_layernorm")(x_BTD), c.gather)
        return x_BTD + self._feedforward(h_BTD, layout), new_cache

    def _feedforward(self, h_BTD: jax.Array, layout: Layout) -> jax.Array:
        if not self.config.num_experts:
            return FeedForward(self.config, self.precision, name="mlp")(h_BTD)
        experts = MixtureOfExperts(self.config, self.precision, name="mlp")
        return experts(h_BTD, layout.segments_BT, may_drop=layout.key_segments_BS is None)


class UnrolledBlocks(nn.Module):
    """The blocks one after the other, each compiled on its own."""

    block: type[nn.Module]
    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, x_BTD: jax.Array, layout: Layout, cache: Any) -> tuple[jax.Array, Any]:
        """Same contract as a scanned Block; the cache is a tuple of layers."""
        caches = []
        for i in range(self.config.num_layers):
            block = self.block(self.config, self.precision, name=str(i))
            x_BTD, layer = block(x_BTD, layout, None if cache is None else cache[i])
            caches.append(layer)
        return x_BTD, None if cache is None else tuple(caches)


class Transformer(nn.Module):
    """A decoder-only language model; pure through `init` and `apply`."""

    config: ModelConfig
    precision: Precision = POLICIES["float32"]

    def setup(self) -> None:
        c, p = self.config, self.precision
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, initializer(c, "embedding"), p)
        if c.positions == "learned":
            table = initializer(c, "embedding")
            self.embed_positions = Embedding(c.max_length, c.hidden_size, table, p, (None, "embed"))
        self.layers = _blocks(c)(c, p)
        self.norm = norm(c, p)
        if not c.tie_embeddings:
            self.lm_head = Projection(c.vocab_size, ("embed", "vocab"), initializer(c, "head"), p)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """tokens int[B, T] -> logits float32[B, T, V], or (logits, cache) when a cache is given."""
        out = self.hidden(tokens_BT, positions_BT, segments_BT, cache)
        if cache is None:
            return self.head(out)
        return self.head(out[0]), out[1]

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The final norm's output [B, T, D] in the compute dtype, or (that, cache).

        positions count from 0 in each document and default to the row index (after the cache's contents);
        segments are 0 for padding and default to one document a row. A cache has to have room for the T tokens.
        """
        B, T = tokens_BT.shape
        if self.config.positions == "learned" and self.config.max_length < T:
            raise UserError(f"a row of {T} tokens: the model has learned {self.config.max_length} positions")
        if positions_BT is None:
            start = 0 if cache is None else cache.length
            positions_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
        with jax.default_matmul_precision(self.precision.matmul):
            layout, cache = self._layout(positions_BT, segments_BT, cache)
            x_BTD = self.embed_tokens(tokens_BT)
            if self.config.positions == "learned":
                x_BTD = x_BTD + self.embed_positions(positions_BT)
            x_BTD = constrain(x_BTD, "batch", "residual", "act_embed")
            x_BTD, layers = self.layers(x_BTD, layout, None if cache is None else cache.layers)
            x_BTD = self.norm(x_BTD)
        return x_BTD if cache is None else (x_BTD, cache._replace(layers=layers))

    def head(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> logits [..., V]. Needs only `head_parameters` of the tree."""
        with jax.default_matmul_precision(self.precision.matmul):
            logits = self.embed_tokens.attend(x) if self.config.tie_embeddings else self.lm_head(x)
        return logits.astype(self.precision.logits) * self.config.logit_scale

    def head_parameters(self, params: dict[str, Any]) -> dict[str, Any]:
        """The part of the tree that `head` reads."""
        name = "embed_tokens" if self.config.tie_embeddings else "lm_head"
        return {name: params[name]}

    def _layout(self, positions_BT: jax.Array, segments_BT: Any, cache: Any) -> tuple[Layout, Cache | None]:
        """What all layers share, and the cache with this call's slots marked as filled."""
        cos, sin = rotations(positions_BT, self.config) if self.config.positions == "rotary" else (None, None)
        if cache is None:
            return Layout(cos, sin, segments_BT), None
        segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
        filled = jax.lax.dynamic_update_slice_in_dim(cache.segments_BS, segments_BT, cache.length, axis=1)
        layout = Layout(cos, sin, segments_BT, filled, cache.length)
        return layout, cache._replace(segments_BS=filled, length=cache.length + positions_BT.shape[1])

    def roomy(self) -> "Transformer":
        """The same model, whose experts have room for everybody: for evaluation."""
        return self.clone(config=dataclasses.replace(self.config, capacity_factor=0.0))

    def init_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `batch` rows of at most `slots` tokens, in the compute dtype or as model.kv_cache says."""
        c = self.config
        if not c.causal:
            raise UserError("model.causal = False: a bidirectional model has no next token to decode")
        shape = (batch, c.num_kv_heads, slots, c.head_dim)
        rows = lambda *lead: empty_rows(c.kv_cache, (*lead, *shape), self.precision.compute)
        recent = lambda *lead: nothing_kept(c, (*lead, batch), self.precision.compute)
        empty = lambda *lead: LayerCache(rows(*lead), rows(*lead), recent(*lead))
        layers = empty(c.num_layers) if c.scan_layers else tuple(empty() for _ in range(c.num_layers))
        return Cache(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def _blocks(config: ModelConfig) -> Any:
    """The stack of blocks as the config runs it: (config, precision) -> module."""
    if config.remat not in REMAT:
        raise UserError(f"model.remat = {config.remat!r}: expected one of {', '.join(REMAT)}")
    policy = REMAT[config.remat]
    # under scan the loop itself keeps XLA from merging the two forward passes
    block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)
    if not config.scan_layers:
        return lambda c, p: UnrolledBlocks(block, c, p)
    return nn.scan(
        block,
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        out_axes=0,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def unboxed(variables: Any) -> tuple[Any, Any]:
    """The result of `init` (or its shapes) -> (parameters as plain arrays, tree of logical axes)."""
    boxed = variables["params"]
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
    axes = jax.tree.map(lambda x: tuple(x.names), boxed, is_leaf=is_box)
    return nn.meta.unbox(boxed), axes


def abstract_parameters(model: Transformer) -> tuple[Any, Any]:
    """(tree of ShapeDtypeStruct, tree of logical axes) without allocating anything."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    # the key is made inside: the mesh in use may be one of devices that are not here, on which nothing can be computed
    return unboxed(jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens))


def init_parameters(model: Transformer, key: jax.Array) -> Any:
    """Fresh parameters as a plain nested dict: the same numbers, stacked or not."""
    scanned = model.clone(config=dataclasses.replace(model.config, scan_layers=True))
    params = unboxed(scanned.init(key, jnp.zeros((1, 8), jnp.int32)))[0]
    return params if model.config.scan_layers else unstack_layers(params)


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Stacked layers [L, ...] -> {"0": [...], "1": [...], ...}."""
    layers = jax.tree.map(tuple, params["layers"])
    count = len(jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, tuple))[0])
    pick = lambda i: jax.tree.map(lambda x: x[i], layers, is_leaf=lambda x: isinstance(x, tuple))
    return {**params, "layers": {str(i): pick(i) for i in range(count)}}


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`, on the host: weights that were read there may not fit on one device."""
    layers = [params["layers"][str(i)] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *xs: np.stack(xs), *layers)}
