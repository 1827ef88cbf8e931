"""The gradients of a batch: micro-batches one after the other, replicas side by side.

`replica` is a manual axis here: what a replica adds up over its micro-batches stays with it, and replicas are summed
once a step. GSPMD would sum every micro-batch's gradients over all replicas inside the loop. The other axes stay with
GSPMD, and with the islands of FP8 products.

Legend: R replicas, `...` stack axes, D and F the sides of a matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from easylm_plus.errors import UserError
from easylm_plus.numerics import handles
from easylm_plus.numerics.formats import FORMATS, Scaled, decode, encode, is_scaled
from easylm_plus.numerics.fp8 import SEEN, TENSORS, Fp8, Fp8Handle
from easylm_plus.numerics.lora import Frozen, LowRank
from easylm_plus.numerics.reduction import encode_shared, owned_sum_of_slot, ring, two_shot
from easylm_plus.parallel.sharding import axes_in, island, manual_axes, mesh_axis_size, spec_of, stored_spec
from easylm_plus.parallel.zero import Deal
from easylm_plus.tree import path_name

Batch = dict[str, jax.Array]
REPLICA = "replica"


def gradients(objective: Any, view: Any, batch: Batch, parts: int, numerics: Any) -> tuple[Any, Any, jax.Array, Any]:
    """(gradients, observations, loss, sums) of a whole batch, computed in `parts` micro-batches.

    Gradients are a tree like the parameters, of arrays and Scaled, cut (or laid) as masters are; for observations see
    numerics/handles.py. Loss and sums are shares of the whole batch's, which add up.
    """
    denominators = objective.denominators(batch)
    if mesh_axis_size(REPLICA) == 1:
        return accumulate(objective, view, batch, denominators, parts, numerics.sums)

    def of_replica(view: Any, batch: Batch, denominators: Any) -> Any:
        grads, seen, loss, sums = accumulate(objective, view, batch, denominators, parts, numerics.sums)
        stacked = jax.tree.map(lambda x: x[None], (grads, seen))
        return stacked, jax.lax.psum((loss, sums), REPLICA)

    own, whole = PartitionSpec(REPLICA), PartitionSpec()
    region = jax.shard_map(
        of_replica, in_specs=(whole, own, whole), out_specs=(own, whole), axis_names={REPLICA}, check_vma=False
    )
    (grads, seen), (loss, sums) = region(view, batch, denominators)
    grads, saturated = summed(grads, view, numerics)
    seen = {name: with_saturated(taps.max(0), saturated.get(name)) for name, taps in seen.items()}
    return grads, seen, loss, sums


def accumulate(
    objective: Callable, view: Any, batch: Batch, denominators: Any, parts: int, sums_in: str = "float32"
) -> tuple[Any, Any, jax.Array, Any]:
    """The same of this replica's rows: sums of gradients in at least float32, observations by their maximum.

    `sums_in`: float32 | e4m3, of gradients that are FP8 codes. E4M3 is what FP8-LM has, 1 byte a weight instead of 4,
    and rounds once more for every micro-batch.

    Micro-batch i takes every parts-th row, so that each device's rows stay on that device. Shares of the loss add
    up, because they are divided by the denominators of the whole batch.
    """

    def of_part(micro: Batch) -> tuple[Any, Any, jax.Array, Any]:
        loss_and_sums = lambda h: objective(handles.held(view, h), micro, denominators)
        (loss, sums), cotangents = jax.value_and_grad(loss_and_sums, has_aux=True)(handles.handles(view))
        return handles.gradients(cotangents), handles.observations(cotangents), loss, sums

    if parts == 1:
        return of_part(batch)
    rows = batch["inputs"].shape[0]
    if rows % parts:
        raise UserError(f"train.accumulate = {parts}: expected a divisor of the batch of {rows} rows")
    micro = jax.tree.map(lambda x: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, part: Batch) -> tuple[Any, None]:
        grads, seen, *rest = of_part(part)
        add = lambda a, b: a + b.astype(a.dtype)
        return (
            jax.tree.map(_plus, total[0], grads, is_leaf=is_scaled),
            jax.tree.map(jnp.maximum, total[1], seen),
            *jax.tree.map(add, total[2:], tuple(rest)),
        ), None

    grads, seen, loss, sums = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], micro))
    wide = lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32))  # 16 bits are too few for a sum
    nothing = lambda g: encode(jnp.zeros(g.shape), FORMATS[sums_in]) if isinstance(g, Scaled) else wide(g)
    start = (jax.tree.map(nothing, grads, is_leaf=is_scaled), *jax.tree.map(wide, (seen, loss, sums)))
    return jax.lax.scan(body, start, micro)[0]


def _plus(total: Any, grad: Any) -> Any:
    """The sum of both, stored as `total` is; codes get the scale of their largest sum over all replicas."""
    if isinstance(total, Scaled):
        return encode_shared(decode(total) + decode(grad), manual_axes())
    return total + decode(grad).astype(total.dtype)


def summed(grads: Any, view: Any, numerics: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of each replica, [R, ...], summed, cut or laid as masters are; in E4M3 where products are FP8.

    With them, by name, the share of saturated codes of those that went by the ring, float32[...].
    """
    if numerics.axes is None:  # nothing is known of the weights: the partitioner sums
        return jax.tree.map(lambda x: x.sum(0), grads), {}
    saturated: dict[str, jax.Array] = {}
    dealt = numerics.deal.shapes if numerics.deal else {}
    axes = {
        path_name(path): names
        for path, names in jax.tree_util.tree_leaves_with_path(numerics.axes, is_leaf=lambda x: isinstance(x, tuple))
    }

    def leaf(path: Any, viewed: Any, grad: Any) -> Any:
        name = path_name(path)
        if name in dealt:
            return None
        if isinstance(viewed, LowRank | Frozen):  # adapters: small, and not cut
            return jax.tree.map(lambda x: x.sum(0), grad)
        shape = grad.shape[1:]
        spec, kept = spec_of(axes[name], shape), stored_spec(axes[name], shape)
        kept = kept if numerics.cut else spec
        before: Any = PartitionSpec(REPLICA, *spec)
        if not isinstance(jax.eval_shape(handles.handle_of, viewed), Fp8Handle):
            return island(partial(_sum, _cut_dim(kept)), (before,), kept)(grad)
        mu = viewed.mu if isinstance(viewed, Fp8) else None
        stack = PartitionSpec(*spec[:-2])
        if isinstance(grad, Scaled):
            before = Scaled(before, PartitionSpec(REPLICA, *stack))  # type: ignore[arg-type]
        after = Scaled(kept, stack)  # type: ignore[arg-type]
        region = partial(_sum_fp8, _cut_dim(kept), len(shape), axes_in(spec[-2:]))
        total, share = island(region, (before, stack), (after, stack))(grad, mu)
        if share is not None:
            saturated[name] = share
        return total

    total = jax.tree_util.tree_map_with_path(leaf, view, grads, is_leaf=handles.is_typed)
    if dealt:
        total = numerics.deal.set_aside(total, _summed_by_owners(numerics.deal, grads))
    return total, saturated


def _summed_by_owners(deal: Deal, grads: Any) -> dict[str, Scaled]:
    """Gradients of each replica, of which those of matrices that are dealt out are sent to their owners: stacks in
    E4M3, [C, N, D, F]."""
    named = {path_name(path): g for path, g in jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_scaled)}

    def own(slot: Any) -> Scaled:
        return owned_sum_of_slot(slot if is_scaled(slot) else encode_shared(slot, (REPLICA,)), REPLICA)

    def of_owner(named: dict[str, Any]) -> dict[str, Scaled]:
        return deal.pack(jax.tree.map(lambda x: x[0], named), own)

    region = island(of_owner, (PartitionSpec(REPLICA),), PartitionSpec(None, REPLICA))
    return region({name: named[name] for name in deal.shapes})


def with_saturated(taps: jax.Array, share: jax.Array | None) -> jax.Array:
    """What was seen, float32[..., 3, 3], with the overflow of the gradient's sum over replicas."""
    row, column = TENSORS.index("gradient"), SEEN.index("overflow")
    return taps if share is None else taps.at[..., row, column].set(share)


def _sum(dim: int | None, grad: jax.Array) -> jax.Array:
    """One device's part, in float32."""
    own = grad[0].astype(jnp.promote_types(grad.dtype, jnp.float32))
    if dim is None:
        return jax.lax.psum(own, REPLICA)
    return jax.lax.psum_scatter(own, REPLICA, scatter_dimension=dim, tiled=True)


def _sum_fp8(dim: int | None, ndim: int, others: tuple[str, ...], grad: Any, mu: jax.Array | None) -> Any:
    """One device's part. Codes of a single micro-batch have the scale of all replicas already, and mu in it."""
    if isinstance(grad, Scaled):
        local = Scaled(grad.code[0], grad.scale_inv[0])
    else:
        local = encode_shared(grad[0], (REPLICA, *others), 1.0 if mu is None else mu)
    cut, dim = ((), -2) if dim is None else ((REPLICA,), dim - ndim)
    if mu is None:
        return two_shot(local, (REPLICA,), cut, dim, others), None
    return ring(local, (REPLICA,), cut, dim, others)


def _cut_dim(spec: PartitionSpec) -> int | None:
    """The dimension that `replica` cuts."""
    return next((dim for dim in range(len(spec)) if REPLICA in axes_in(spec[dim : dim + 1])), None)
