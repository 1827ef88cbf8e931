"""Rows of a table: how tokens become vectors, on any mesh.

The table is cut by rows over `tensor` and by columns over `fsdp`. Each device brings the columns of its rows together,
looks up what it has, and the parts are added: all but one are 0. Left to the partitioner, the *result* would be
gathered over the batch ("involuntary full rematerialization"); inside a region that is manual over `replica` the
partitioner aborts on a lookup (jax 0.12).

The gradient is summed in float32 whatever the table is: that of a frequent token is a sum of thousands of terms, and in
bfloat16 it would stick at 256 of them.

Legend: V rows, D columns, `...` the axes of ids, [B, T].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from easylm_plus.parallel.sharding import axes_in, island, spec_of


class Cut(NamedTuple):
    """How a lookup lies on the mesh."""

    table: PartitionSpec
    ids: PartitionSpec
    rows: tuple[str, ...]  # axes that cut the table's rows
    columns: tuple[str, ...]  # axes that cut its columns
    data: tuple[str, ...]  # axes that cut the ids


def cut_of(table: tuple[int, ...], ids: tuple[int, ...], rows: str | None) -> Cut:
    """For these shapes, on the mesh in context; `rows` is the logical axis of the table's rows."""
    at, by = spec_of((rows, "embed"), table), spec_of(("batch", "length")[: len(ids)], ids)
    return Cut(at, by, axes_in(at[:1]), axes_in(at[1:]), axes_in(by))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def looked_up(dtype: DTypeLike, rows: str | None, w_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """w[ids] in `dtype`, [..., D]; ids out of range find the first or the last row."""
    cut = cut_of(w_VD.shape, ids.shape, rows)
    local = partial(_rows, cut, dtype)
    return island(local, (cut.table, cut.ids), PartitionSpec(*cut.ids, None))(w_VD, ids)


def _forward(dtype: DTypeLike, rows: str | None, w_VD: jax.Array, ids: jax.Array) -> Any:
    return looked_up(dtype, rows, w_VD, ids), (w_VD, ids)


def _backward(dtype: DTypeLike, rows: str | None, residuals: Any, dy: jax.Array) -> Any:
    w_VD, ids = residuals
    cut = cut_of(w_VD.shape, ids.shape, rows)
    assert set(cut.columns) <= set(cut.data), f"{cut.columns} cut the table but not the tokens"
    local = partial(_gradient, cut)
    return island(local, (cut.table, cut.ids, PartitionSpec(*cut.ids, None)), cut.table)(w_VD, ids, dy), None


looked_up.defvjp(_forward, _backward)


def _rows(cut: Cut, dtype: DTypeLike, w_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """One device's part."""
    if cut.columns:  # as narrow as the result is
        w_VD = jax.lax.all_gather(w_VD.astype(dtype), cut.columns, axis=1, tiled=True)
    at, here = _own(cut, w_VD.shape[0], ids)
    y = jnp.take(w_VD, at, axis=0, mode="clip").astype(dtype)
    return jax.lax.psum(jnp.where(here[..., None], y, 0), cut.rows) if cut.rows else y


def _gradient(cut: Cut, w_VD: jax.Array, ids: jax.Array, dy: jax.Array) -> jax.Array:
    """One device's block of the table's gradient, summed over the tokens of all."""
    V, D = w_VD.shape[0], dy.shape[-1]
    at, here = _own(cut, V, ids)
    wide = jnp.promote_types(w_VD.dtype, jnp.float32)
    dw_VD = jnp.zeros((V, D), wide).at[jnp.where(here, at, V)].add(dy.astype(wide), mode="drop")
    others = tuple(axis for axis in cut.data if axis not in cut.columns)
    if cut.columns:
        dw_VD = jax.lax.psum_scatter(dw_VD, cut.columns, scatter_dimension=1, tiled=True)
    return (jax.lax.psum(dw_VD, others) if others else dw_VD).astype(w_VD.dtype)


def _own(cut: Cut, V: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the rows of this device's table that ids mean, whether they are of this device)."""
    parts = jax.lax.axis_size(cut.rows) if cut.rows else 1
    first = V * jax.lax.axis_index(cut.rows) if cut.rows else 0
    at = jnp.clip(ids, 0, V * parts - 1) - first
    return at, (at >= 0) & (at < V)
