"""Cross-entropy in blocks: the logits [B, T, V] of a training step never exist.

With a vocabulary of 32,000 and 4,096 tokens a device the logits alone would be half a gigabyte, their gradient as
much again. Yuan 2.0 (Wu et al. 2023, arXiv:2311.15786, section 3) computes the loss a chunk of tokens at a time;
so do we, with two differences.

* Gradients are taken in the forward pass. The loss is linear in its cotangent, so a chunk can multiply its logits
  back into the gradients of its hidden states and of the head at once and forget them; recomputing them in the
  backward pass, as a checkpointed chunk does, would cost the head's product a second time.
* Chunks are cut inside each device's shard, in a region that is manual over the data axes. Cutting the flattened
  B*T axis across shards would replicate it; and the head's gradient is summed over devices once a step here, not
  once a chunk, as the partitioner would do it inside the loop. The `tensor` axis stays with the partitioner.

Legend: N tokens of this device, C tokens of a chunk, D embed, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from easylm_plus.numerics import handles
from easylm_plus.parallel.sharding import axes_in, spec_of

Head = Callable[[Any, jax.Array], jax.Array]  # (head parameters, x[C, D]) -> logits float32[C, V]


def blocked_cross_entropy(head: Head, head_params: Any, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
                          z_weights_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Sum of weights * nll + z_weights * logsumexp^2, and both terms by token.

    Args:
      chunk: most tokens whose logits exist at a time, on each device.

    Returns:
      (total float32[], nll float32[B, T], logsumexp float32[B, T]); only `total` is differentiable, in x and the
      head's parameters. Where both weights are 0, nll and logsumexp mean nothing. z_weights give the z-loss of PaLM
      (arXiv:2204.02311, section 5); zeros switch it off.
    """
    return _blocked(head, chunk, head_params, x_BTD, (targets_BT, weights_BT, z_weights_BT))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(head: Head, chunk: int, head_params: Any, x_BTD: jax.Array, tokens: Any) -> Any:
    return _sharded(partial(_local, head, chunk, False), head_params, x_BTD, tokens)[0]


def _forward(head: Head, chunk: int, head_params: Any, x_BTD: jax.Array, tokens: Any) -> Any:
    outputs, gradients = _sharded(partial(_local, head, chunk, True), head_params, x_BTD, tokens)
    return outputs, gradients


def _backward(head: Head, chunk: int, gradients: Any, cotangents: Any) -> Any:
    """The gradients are there already; the cotangent of the total scales them."""
    scaled = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
    return *scaled, None


_blocked.defvjp(_forward, _backward)


def _sharded(local: Callable[..., Any], head_params: Any, x_BTD: jax.Array, tokens: Any) -> Any:
    """Runs `local` on each device's tokens, and sums the total and the head's gradient over devices."""
    rows = spec_of(("batch", "length"), x_BTD.shape[:2])
    axes = axes_in(rows)
    if not axes:
        return local(head_params, x_BTD, tokens, lambda summed: summed)
    region = jax.shard_map(
        lambda *args: local(*args, lambda summed: jax.lax.psum(summed, axes)),
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=((PartitionSpec(), rows, rows), (PartitionSpec(), rows)),
        axis_names=set(axes),
        check_vma=False,
    )
    return region(head_params, x_BTD, tokens)


def _local(
    head: Head,
    chunk: int,
    with_gradients: bool,
    head_params: Any,
    x_BTD: jax.Array,
    tokens: Any,
    total: Callable,
) -> Any:
    """One device's ((total, nll, logsumexp), (head gradient, x gradient)), a chunk at a time."""
    B, T, D = x_BTD.shape
    count = _chunks(B * T, chunk)
    split = lambda a: a.reshape(count, B * T // count, *a.shape[2:])

    learned = handles.handles(head_params)

    def body(head_gradient: Any, inputs: Any) -> Any:
        x, targets, weights, z_weights = inputs
        of_tokens = partial(_chunk_loss, head, targets=targets, weights=weights, z_weights=z_weights)
        loss = lambda learned, x: of_tokens(handles.held(head_params, learned), x)
        if not with_gradients:
            value, (nll, lse) = loss(learned, x)
            return head_gradient, (value, nll, lse, jnp.zeros((), x.dtype))
        value, vjp, (nll, lse) = jax.vjp(loss, learned, x, has_aux=True)
        d_head, d_x = vjp(jnp.ones_like(value))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), head_gradient, d_head), (value, nll, lse, d_x)

    wide = lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32))  # sums need more than 16 bits
    zeros = jax.tree.map(wide, learned) if with_gradients else None
    d_head, (values, nll, lse, d_x) = jax.lax.scan(body, zeros, (split(x_BTD), *map(split, tokens)))
    outputs = (total(values.sum()), nll.reshape(B, T), lse.reshape(B, T))
    if not with_gradients:
        return outputs, (jnp.zeros(()), jnp.zeros((B, T)))
    d_head = jax.tree.map(lambda g, p: g.astype(p.dtype), total(d_head), learned)
    return outputs, (handles.cotangents(head_params, d_head), d_x.reshape(B, T, D))


def _chunk_loss(
    head: Head,
    head_params: Any,
    x_CD: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_weights: jax.Array,
) -> Any:
    # where a weight is 0 the value must not matter, nor the hidden state, even if they are not finite: 0 * inf is NaN
    counts = (weights != 0) | (z_weights != 0)
    logits_CV = head(head_params, jnp.where(counts[:, None], x_CD, 0)).astype(jnp.float32)
    lse = jax.nn.logsumexp(logits_CV, axis=-1)
    nll = lse - jnp.take_along_axis(logits_CV, targets[:, None], axis=-1)[:, 0]
    weigh = lambda w, value: jnp.where(w != 0, w * value, 0.0).sum()
    return weigh(weights, nll) + weigh(z_weights, lse * lse), (nll, lse)


def _chunks(tokens: int, chunk: int) -> int:
    """The smallest number of equal chunks of at most `chunk` tokens."""
    return next(n for n in range(max(1, -(-tokens // chunk)), tokens + 1) if tokens % n == 0)
