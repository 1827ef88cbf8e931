"""softmax(QK'/sqrt(K))V over the keys that a query may see, in five ways.

Several documents share a row (packing), so a query sees a key only if the key is not later (unless the model is
bidirectional), lies in the same segment, and is within the sliding window if there is one. Positions restart in each
segment, but order within a row does not, so causality is decided by row index.

    xla       jax.nn.dot_product_attention; everywhere; materialises the [T, S] scores
    blocked   blocks of queries on contiguous operands: skips the keys that none may see and keeps scores in the cache;
              the fastest on a CPU, and the default there
    cudnn     fused kernel on NVIDIA GPUs; with packing it takes a [B, 1, T, T] mask, since it has no segment ids
              (several GPUs: not measured yet)
    splash    fused Pallas kernel on TPUs, with segment ids
    auto      splash on TPU, cudnn on GPU in 16 bit if it takes the head size, blocked on CPU; the banner says which

A name that cannot be had is an error, never a silent substitute.

Legend: B batch, T queries, S keys, H heads, G kv heads, R = H / G, K head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig
from easylm_plus.parallel.sharding import constrain, device, free_axes, island, spec_of

BLOCK = 64  # queries a block in `blocked`, in float32; twice as many in 16 bits. The fastest of 32 to 512 on a CPU
NEVER = -1e30  # a masked score: finite, so that a row without any key stays free of NaN


class Sight(NamedTuple):
    """Which keys of its document a query may see."""

    causal: bool = True  # none that comes later
    window: int = 0  # only so many last ones, itself included; 0: all


def attend(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    config: ModelConfig,
) -> jax.Array:
    """Attention of a whole row to itself -> [B, T, H, K], by the configured implementation."""
    name: Any = resolve(config.attention, device().platform, q_BTHK.dtype, config.head_dim)
    # every query needs the keys of the whole row, which the `sequence` axis cuts
    k_BTGK = constrain(k_BTGK, "batch", None, "act_kv_heads", None)
    v_BTGK = constrain(v_BTGK, "batch", None, "act_kv_heads", None)
    attention = {"xla": _whole, "blocked": _blocked, "splash": _splash, "cudnn": _cudnn}[name]
    return attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, sight_of(config))


def resolve(name: str, platform: str, dtype: Any, head_dim: int) -> str:
    """`auto` -> the implementation for this platform; a name that cannot be had is a UserError."""
    half = jnp.dtype(dtype).itemsize == 2
    fits = head_dim % 8 == 0 and head_dim <= (256 if platform == "gpu" and _is_hopper() else 128)
    if name == "auto":
        return {"tpu": "splash", "gpu": "cudnn" if half and fits else "xla"}.get(platform, "blocked")
    needs = {"cudnn": "gpu", "splash": "tpu"}.get(name, platform)
    if needs != platform:
        raise UserError(f"model.attention = {name!r} needs a {needs.upper()}, this is a {platform.upper()}; "
                         "expected xla, blocked or auto")  # fmt: skip
    if name == "cudnn" and not half:
        raise UserError(
            "model.attention = 'cudnn' computes in 16 bit only; use numerics.precision = bf16 or attention = xla"
        )
    if name == "cudnn" and not fits:
        raise UserError(
            f"model.attention = 'cudnn': model.head_dim = {head_dim}; the kernel takes multiples of 8 up to 128, "
            "from Hopper on up to 256; expected attention = xla"
        )
    return name


def _is_hopper() -> bool:
    return float(getattr(device(), "compute_capability", 0)) >= 9


def sight_of(config: ModelConfig) -> Sight:
    """What the config says of it."""
    return Sight(config.causal, config.sliding_window)


def visible_mask(T: int, segments_BT: jax.Array | None, sight: Sight) -> jax.Array:
    """bool[B or 1, T, T], true where query t may see key s."""
    return visible(jnp.arange(T), jnp.arange(T), segments_BT, segments_BT, sight)


def visible(
    t: jax.Array, s: jax.Array, q_segments: jax.Array | None, k_segments: jax.Array | None, sight: Sight
) -> jax.Array:
    """Row indices and segments of queries and keys -> bool[B or 1, T, S]."""
    mask = (s[None, :] <= t[:, None])[None] if sight.causal else jnp.ones((1, t.size, s.size), bool)
    if sight.window:
        mask &= (s[None, :] > t[:, None] - sight.window)[None]
    if q_segments is not None and k_segments is not None:
        mask = mask & (q_segments[:, :, None] == k_segments[:, None, :])
    return mask


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, implementation: Any = "xla") -> jax.Array:
    """jax.nn's attention under a mask bool[B or 1, T, S]."""
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def cached(q: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Attention of new queries to what a cache holds -> [B, T, H, K].

    The cache lies head by head, as products read it: turned around for every token, a cache costs XLA:CPU four to seven
    times what attention to it does.
    """
    B, T, H, K = q.shape
    G = k_BGSK.shape[1]
    k, v = k_BGSK.astype(q.dtype), v_BGSK.astype(q.dtype)
    q_BGQK = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    scores = jnp.einsum("bgqk,bgsk->bgqs", q_BGQK, k, preferred_element_type=jnp.float32) * K**-0.5
    mask_BQS = jnp.tile(mask_BTS, (1, H // G, 1))  # the same for all heads of a group
    weights = jax.nn.softmax(jnp.where(mask_BQS[:, None], scores, NEVER), axis=-1).astype(q.dtype)
    y_BGQK = jnp.einsum("bgqs,bgsk->bgqk", weights, v)
    return y_BGQK.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _whole(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, sight: Sight, implementation: Any = "xla"
) -> jax.Array:
    """The same for a row to itself; with a mask only where causality is not all."""
    if segments is None and not sight.window:
        return jax.nn.dot_product_attention(q, k, v, is_causal=sight.causal, implementation=implementation)
    return masked(q, k, v, visible_mask(q.shape[1], segments, sight), implementation)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, sight: Sight) -> jax.Array:
    """NVIDIA's fused kernel, with the mask of each device's own rows."""
    return _on_shards(partial(_whole, sight=sight, implementation="cudnn"), q, k, v, segments)


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, sight: Sight) -> jax.Array:
    """Blocks of queries against the keys that any of them may see. Exact: each query's softmax is whole.

    On one device the rows of the batch go one after the other, so that a row's scores stay in the cache; on a mesh,
    where rows live on different devices, they go together.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    q_BGRTK = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGTK, v_BGTK = (x.transpose(0, 2, 1, 3) for x in (k, v))
    visible_BTT = jnp.broadcast_to(visible_mask(T, segments, sight), (B, T, T))
    rows = (q_BGRTK, k_BGTK, v_BGTK, visible_BTT)
    one_row = partial(_row, sight)
    y = jax.vmap(one_row)(*rows) if free_axes() else jax.lax.map(lambda row: one_row(*row), rows)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row(sight: Sight, q_GRTK: jax.Array, k_GTK: jax.Array, v_GTK: jax.Array, visible_TT: jax.Array) -> jax.Array:
    """One row's attention -> [G, R, T, K].

    The backward pass is written out as in FlashAttention-2 (arXiv:2307.08691, section 2.3): from each query's
    logsumexp, in one fused pass over the scores, where differentiating the softmax makes several. On a CPU these
    passes cost more than the products.
    """
    return _row_forward(sight, q_GRTK, k_GTK, v_GTK, visible_TT)[0]


def _row_forward(sight: Sight, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> Any:
    outputs, lses = [], []
    for queries, keys in _spans(q, sight):
        scores, (_, _, v_block) = _scores(q, k, v, visible, queries, keys)
        lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - lse).astype(v.dtype)
        outputs.append(_by_head(jnp.einsum("gqs,gsk->gqk", weights, v_block), q))
        lses.append(_by_head(lse, q))
    y, lse = jnp.concatenate(outputs, axis=2), jnp.concatenate(lses, axis=2)
    return y, (q, k, v, visible, y, lse)


def _row_backward(sight: Sight, residuals: Any, dy: jax.Array) -> Any:
    q, k, v, visible, y, lse = residuals
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)  # [G, R, T, 1]
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for queries, keys in _spans(q, sight):
        scores, (q_block, k_block, v_block) = _scores(q, k, v, visible, queries, keys)
        dy_block, lse_block, delta_block = (_merged(x[:, :, queries]) for x in (dy, lse, delta))
        weights = jnp.exp(scores - lse_block)
        d_weights = jnp.einsum("gqk,gsk->gqs", dy_block, v_block, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta_block) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq.append(_by_head(jnp.einsum("gqs,gsk->gqk", d_scores, k_block), q))
        dk = dk.at[:, keys].add(jnp.einsum("gqs,gqk->gsk", d_scores, q_block, preferred_element_type=jnp.float32))
        weights = weights.astype(v.dtype)
        dv = dv.at[:, keys].add(jnp.einsum("gqs,gqk->gsk", weights, dy_block, preferred_element_type=jnp.float32))
    return jnp.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


_row.defvjp(_row_forward, _row_backward)


def _spans(q_GRTK: jax.Array, sight: Sight) -> list[tuple[slice, slice]]:
    """(a block of queries, the keys that any of them may see), for all blocks."""
    T, size = q_GRTK.shape[2], BLOCK * 4 // q_GRTK.dtype.itemsize
    ends = [(start, min(start + size, T)) for start in range(0, T, size)]
    first = lambda start: max(0, start - sight.window + 1) if sight.window else 0
    return [(slice(start, end), slice(first(start), end if sight.causal else T)) for start, end in ends]


def _scores(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, queries: slice, keys: slice) -> Any:
    """(masked scores float32[G, R * C, E] of C queries and E keys, the blocks of q, k and v).

    The barrier keeps the slices as arrays of their own: fused into the products, XLA:CPU would fall back to a loop
    nest that is several times slower than its library call.
    """
    block = jax.lax.optimization_barrier((_merged(q[:, :, queries]), k[:, keys], v[:, keys]))
    scores = jnp.einsum("gqk,gsk->gqs", block[0], block[1], preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.tile(visible[queries, keys], (q.shape[1], 1))  # the same for all R heads of a group
    return jnp.where(mask, scores, NEVER), block


def _merged(x_GRCK: jax.Array) -> jax.Array:
    """The R heads of a group as more queries: [G, R * C, K]."""
    return x_GRCK.reshape(x_GRCK.shape[0], -1, x_GRCK.shape[-1])


def _by_head(x_GQK: jax.Array, q_GRTK: jax.Array) -> jax.Array:
    """The inverse: [G, R, C, K]."""
    return x_GQK.reshape(*q_GRTK.shape[:2], -1, x_GQK.shape[-1])


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, sight: Sight, interpret: bool = False
) -> jax.Array:
    """The Pallas kernel, mapped over batch and heads.

    It takes lengths of whole lanes (128) only; what is added at the end, no real query can see.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, scale = q.shape[1], q.shape[-1] ** -0.5
    segments = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -length % 128)] + [(0, 0)] * (x.ndim - 2))
    q, k, v, segments = map(pad, (q, k, v, segments))
    T = q.shape[1]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        whole = masks.CausalMask((T, T)) if sight.causal else masks.FullMask((T, T))
        one = masks.LocalMask((T, T), (sight.window - 1, 0), 0) if sight.window else whole
        attention = kernel.make_splash_mha_single_device(masks.MultiHeadMask([one] * q.shape[2]), interpret=interpret)
        heads_first = (x.transpose(0, 2, 1, 3) for x in (q * scale, k, v))
        y = jax.vmap(attention)(*heads_first, segment_ids=kernel.SegmentIds(segments, segments))
        return y.transpose(0, 2, 1, 3)

    return _on_shards(local, q, k, v, segments)[:, :length]


def _on_shards(local: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Runs a fused kernel on each device's rows and heads: a custom call, which GSPMD cannot partition by itself.

    A device has whole rows, so where `sequence` cuts the activations, each of its devices does the same work.
    """
    q_spec, k_spec = (
        spec_of(("batch", None, axis, None), x.shape) for axis, x in (("act_heads", q), ("act_kv_heads", k))
    )
    if q_spec[2] != k_spec[2]:  # too few key heads to cut: a device's query heads need their own ones, not all
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        k_spec = q_spec
    row = PartitionSpec(q_spec[0], None)
    return island(local, (q_spec, k_spec, k_spec, row), q_spec)(q, k, v, segments)
