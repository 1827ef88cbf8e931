"""Mixture of experts: a router sends each token to a few of many feed-forwards.

    y = sum over the chosen experts e of  weight_e * expert_e(x)

Routers: `softmax` is one matrix (Shazeer et al. 2017, arXiv:1701.06538; Switch, Fedus et al. 2021, arXiv:2101.03961;
Mixtral, arXiv:2401.04088). `attention` is Yuan 2.0-M32's (Wu et al. 2024, arXiv:2405.17976, section 3.1): three
projections of the token to a number an expert each, and an attention among the experts. Both in float32: rounded
logits make training unstable (Switch, section 2.4). The softmax goes over all experts, the best k are taken, and with
`norm_topk` their weights are scaled to add up to 1; Switch, with k = 1, leaves the weight as it is, or the router would
get no gradient.

Dispatch. Rows are sorted by expert and multiplied group by group (numerics/grouped.py): no token is dropped and none is
computed twice. With a `capacity_factor`, in training, an expert takes at most that many times its even share of the
choices of a document, in the order of its tokens, and the rest is dropped (Switch, section 2.2): such a token's
feed-forward is 0. The paper counts over a device's part of the batch. Counted by document, what is dropped depends
neither on its neighbours in a row nor on padding, mesh or accumulation; and in the order of tokens, no token's fate
depends on a later one. Decoding and held-out losses (`Transformer.roomy`) drop nothing.

On a mesh the `expert` axis cuts the batch like a data axis. For the experts its devices bring their tokens together
(all-gather), each computes what concerns its own experts, and a reduce-scatter hands the sums back: exact for any
routing, with fixed shapes. It moves E_axis / k times the bytes of an all-to-all, which would need a bound on how many
tokens go from device to device. `tensor` cuts the features of every expert.

Statistics of routing are sown into the collection "router" for whoever asks (mutable=["router"]); objectives/lm.py
makes the balance loss and the router's z-loss of them.

Legend: B batch, T length, N tokens, E experts, K choices a token, M sorted rows, D embed, F ffn.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from easylm_plus.models.config import ModelConfig
from easylm_plus.models.feedforward import activated
from easylm_plus.models.initializers import initializer
from easylm_plus.models.weights import Experts, Projection
from easylm_plus.numerics.grouped import Groups, padded_rows, resolve_grouped, tile_of
from easylm_plus.numerics.precision import Precision
from easylm_plus.numerics.verbs import project_grouped, settle
from easylm_plus.parallel.sharding import constrain, device, island, spec_of


class MixtureOfExperts(nn.Module):
    """Router and experts, in the place of a dense feed-forward."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None, may_drop: bool) -> jax.Array:
        """x[B, T, D] -> [B, T, D]; 0 for padding and for tokens that found no room."""
        c, p = self.config, self.precision
        if c.router == "attention":
            router: Any = AttentionRouter(c, p, name="router")
        else:
            router = Projection(c.num_experts, ("embed", None), initializer(c, "hidden"), p, name="router")
        with jax.default_matmul_precision("highest"):  # else a float32 product is one of bfloat16 on a TPU
            logits_BTE = router(x_BTD.astype(jnp.float32))
        segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32) if segments_BT is None else segments_BT
        weights_BTK, ids_BTK = choose(logits_BTE, c)
        kept_BTK = kept(ids_BTK, segments_BT, c, may_drop)
        stats = statistics(logits_BTE, ids_BTK, kept_BTK, segments_BT != 0)
        self.sow("router", "stats", stats, reduce_fn=lambda _, new: new)
        ids_BTK = jnp.where(kept_BTK, ids_BTK, c.num_experts)  # nobody's
        y_BTD = dispatched(x_BTD, weights_BTK, ids_BTK, ExpertWeights(c, p, name="experts")(), c)
        return constrain(y_BTD, "batch", "residual", "act_embed")


class ExpertWeights(nn.Module):
    """The matrices of all experts."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """{gate, up: W[E, D, F], down: W[E, F, D]}."""
        c, p = self.config, self.precision
        E, D, F = c.num_experts, c.hidden_size, c.intermediate_size
        wide: Any = {"shape": (E, D, F), "axes": ("experts", "embed", "mlp"), "precision": p}
        down = Experts((E, F, D), ("experts", "mlp", "embed"), initializer(c, "residual"), p, name="down_proj")
        names = ("gate", "up") if c.gated else ("up",)
        up = {name: Experts(kernel_init=initializer(c, "hidden"), name=f"{name}_proj", **wide)() for name in names}
        return {**up, "down": down()}


class AttentionRouter(nn.Module):
    """softmax(q k') v among the experts, each with one number of query, key and value; not scaled."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x float32[B, T, D] -> logits float32[B, T, E]."""
        c = self.config
        one = partial(Projection, c.num_experts, ("embed", None), initializer(c, "hidden"), self.precision)
        q, k, v = (one(name=name)(x_BTD) for name in ("query", "key", "value"))
        attention_BTEE = jax.nn.softmax(q[..., :, None] * k[..., None, :], axis=-1)
        return (attention_BTEE * v[..., None, :]).sum(-1)


def choose(logits_BTE: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(weights float32[B, T, K], experts int32[B, T, K]) of the best K, the best first."""
    weights_BTK, ids_BTK = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), config.experts_per_token)
    if config.norm_topk:
        weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdims=True)
    return weights_BTK, ids_BTK


def kept(ids_BTK: jax.Array, segments_BT: jax.Array, config: ModelConfig, may_drop: bool) -> jax.Array:
    """bool[B, T, K]: choices of real tokens that their expert has room for."""
    B, T, K = ids_BTK.shape
    real_BTK = jnp.broadcast_to((segments_BT != 0)[..., None], ids_BTK.shape)
    if not (config.capacity_factor and may_drop):
        return real_BTK
    first_BT, end_BT = documents(segments_BT)
    room_BT = jnp.ceil((end_BT - first_BT) * K * config.capacity_factor / config.num_experts - 1e-4)
    chosen = jax.nn.one_hot(ids_BTK.reshape(B, T * K), config.num_experts, dtype=jnp.int32)  # in the order of tokens
    before = jnp.cumsum(chosen, axis=1) - chosen
    outside = jnp.take_along_axis(before, (K * jnp.repeat(first_BT, K, axis=1))[..., None], axis=1)
    rank_BTK = ((before - outside) * chosen).sum(-1).reshape(B, T, K)
    return real_BTK & (rank_BTK < room_BT[..., None])


def documents(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(where its document starts, where it ends) of every token, int32[B, T]; a document is a run of one segment."""
    T = segments_BT.shape[1]
    at = jnp.arange(T)
    new = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(new[:, :-1], at, 0), axis=1)
    return first, jax.lax.cummin(jnp.where(new[:, 1:], at + 1, T), axis=1, reverse=True)


def statistics(logits_BTE: jax.Array, ids_BTK: jax.Array, kept_BTK: jax.Array, real_BT: jax.Array) -> dict[str, Any]:
    """Sums over real tokens: choices and probabilities by expert [E], tokens, dropped choices, logsumexp^2."""
    real = real_BT.astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(ids_BTK, logits_BTE.shape[-1]).sum(2)
    by_expert = lambda value_BTE: (value_BTE * real[..., None]).sum((0, 1))
    return {
        "choices": by_expert(chosen_BTE),
        "probabilities": by_expert(jax.nn.softmax(logits_BTE, axis=-1)),
        "tokens": real.sum(),
        "dropped": (real_BT[..., None] & ~kept_BTK).sum().astype(jnp.float32),
        "z": (real * jax.nn.logsumexp(logits_BTE, axis=-1) ** 2).sum(),
    }


def dispatched(
    x_BTD: jax.Array, weights_BTK: jax.Array, ids_BTK: jax.Array, experts: dict[str, Any], config: ModelConfig
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs [B, T, D], on whatever mesh there is."""
    tokens = PartitionSpec(*spec_of(("batch", "length"), x_BTD.shape[:2]), None)
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
    experts = {name: settle(w) for name, w in experts.items()}
    wide, tall = (spec_of(axes, shape) for axes, shape in (
        (("experts", None, "mlp"), (E, D, F)), (("experts", "mlp", None), (E, F, D))))  # fmt: skip
    # each device of `tensor` has a part of every sum: they leave the region side by side and are added outside
    region = island(
        partial(_local, config, "expert" if wide[0] else None, "tensor" if wide[2] else None),
        in_specs=(tokens, tokens, tokens, {name: tall if name == "down" else wide for name in experts}),
        out_specs=PartitionSpec(wide[2], *tokens),
    )
    return region(x_BTD, weights_BTK, ids_BTK, experts).sum(0)


def _local(
    config: ModelConfig, axis: str | None, cut: str | None, x_BTD: jax.Array, weights_BTK: jax.Array,
    ids_BTK: jax.Array, experts: dict[str, Any],
) -> jax.Array:  # fmt: skip
    """One device's part [1, B, T, D]. Along `axis`, tokens are brought together and experts are cut; `cut` cuts the
    features of each expert."""
    B, T, D = x_BTD.shape
    x_ND, weights_NK, ids_NK = (a.reshape(B * T, -1) for a in (x_BTD, weights_BTK, ids_BTK))
    if axis:
        x_ND, weights_NK, ids_NK = (jax.lax.all_gather(a, axis, tiled=True) for a in (x_ND, weights_NK, ids_NK))
    E = config.num_experts // (jax.lax.axis_size(axis) if axis else 1)
    if axis:
        ids_NK = ids_NK - jax.lax.axis_index(axis) * E
    y_ND = _computed(config, E, cut, x_ND, weights_NK, ids_NK, experts)
    if axis:
        y_ND = jax.lax.psum_scatter(y_ND, axis, tiled=True)
    return y_ND.reshape(1, B, T, D)


def _computed(
    config: ModelConfig, E: int, cut: str | None, x_ND: jax.Array, weights_NK: jax.Array, ids_NK: jax.Array,
    experts: dict[str, Any],
) -> jax.Array:  # fmt: skip
    """The sum over those choices that are one of these E experts: ids in [0, E)."""
    N, K = ids_NK.shape
    how = resolve_grouped(config.grouped, device().platform)
    tile = tile_of(N * K, E, how)
    rows_NK, groups = sorted_rows(ids_NK, E, Groups(jnp.zeros(E, jnp.int32), tile, how))
    M = padded_rows(N * K, E, tile)
    choice_M = jnp.full(M, N * K).at[rows_NK.ravel()].set(jnp.arange(N * K), mode="drop")  # N K: padding
    x_MD = gather_rows(x_ND, jnp.where(choice_M < N * K, choice_M // K, N), rows_NK)
    gate = project_grouped(x_MD, experts["gate"], groups) if "gate" in experts else None
    h_MF = activated(config.activation, gate, project_grouped(x_MD, experts["up"], groups))
    y_MD = project_grouped(h_MF, experts["down"], groups._replace(cut=cut))
    y_NKD = gather_rows(y_MD, rows_NK.ravel(), choice_M[:, None]).reshape(N, K, -1)
    return (y_NKD * weights_NK[..., None].astype(y_NKD.dtype)).sum(1)


def sorted_rows(ids_NK: jax.Array, E: int, groups: Groups) -> tuple[jax.Array, Groups]:
    """Where each choice goes when choices are sorted by expert, int32[N, K]; far out of range if it is nobody's."""
    N, K = ids_NK.shape
    member = jax.nn.one_hot(ids_NK.ravel(), E, dtype=jnp.int32)  # ids outside [0, E): a row of zeros
    count_E = member.sum(0)
    size_E = -(-count_E // groups.tile) * groups.tile
    first_E = jnp.cumsum(size_E) - size_E
    row = ((jnp.cumsum(member, axis=0) - 1 + first_E) * member).sum(-1)
    nobody = jnp.iinfo(jnp.int32).max
    return jnp.where(member.any(-1), row, nobody).reshape(N, K), groups._replace(sizes_E=size_E)


@jax.custom_vjp
def gather_rows(x_ND: jax.Array, at_M: jax.Array, back_NJ: jax.Array) -> jax.Array:
    """x[at], 0 where `at` is out of range. Row n is read by the rows back[n] of the result and no other.

    Knowing them, the gradient is a gather and a sum instead of a scatter, which is slow everywhere.
    """
    return x_ND.at[at_M].get(mode="fill", fill_value=0)


def _gather_backward(residuals: Any, dy_MD: jax.Array) -> Any:
    back_NJ = residuals
    return dy_MD.at[back_NJ].get(mode="fill", fill_value=0).sum(1, dtype=dy_MD.dtype), None, None


gather_rows.defvjp(lambda x, at, back: (gather_rows(x, at, back), back), _gather_backward)
