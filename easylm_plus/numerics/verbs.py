"""The verbs: the only code that multiplies by a weight.

A model fetches a weight as it finds it in the parameter tree and hands it to a verb; what the leaf *is* (a plain
array, FP8 codes, packed ternary digits, a low-rank pair on top of either) decides how it multiplies. A leaf type
registers its own implementation; the ones below are for plain arrays.

Legend: D in-features, F out-features, V vocabulary, E experts, M rows sorted by expert; `...` any leading axes.
"""

from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from easylm_plus.numerics.grouped import Groups, grouped_matmul
from easylm_plus.numerics.lookup import looked_up
from easylm_plus.parallel.sharding import device, free_axes, mesh_axis_size

FEW = 8  # rows from which XLA:CPU's library multiplies bfloat16


def project(x: jax.Array, w: Any) -> jax.Array:
    """x[..., D] times w[D, F] -> [..., F] in x's dtype."""
    return _project(w, x)


def project_grouped(x_MD: jax.Array, w: Any, groups: Groups) -> jax.Array:
    """Each row of x[M, D] times its group's matrix in w[E, D, F] -> [M, F] in x's dtype."""
    return _project_grouped(w, x_MD, groups)


def lookup(ids: jax.Array, w: Any, dtype: DTypeLike, rows: str | None = "vocab") -> jax.Array:
    """Rows of w[V, D] at ids[...] -> [..., D] in `dtype`. `rows`: the logical axis of V."""
    return _lookup(w, ids, dtype, rows)


def settle(w: Any) -> Any:
    """The leaf with all done that takes the whole matrix, for code that will see a part of it (`shard_map`)."""
    return _settle(w)


def unembed(x: jax.Array, w: Any) -> jax.Array:
    """x[..., D] times the transposed embedding w[V, D] -> [..., V] in x's dtype: the head of a tied model."""
    return _unembed(w, x)


def dense(w: Any) -> jax.Array:
    """The plain array that a leaf stands for."""
    return _dense(w)


@singledispatch
def _project(w: Any, x: jax.Array) -> jax.Array:
    return _matmul(x, w.astype(x.dtype), contract=0)


@singledispatch
def _project_grouped(w: Any, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return grouped_matmul(x_MD, w.astype(x_MD.dtype), groups)


@singledispatch
def _lookup(w: Any, ids: jax.Array, dtype: DTypeLike, rows: str | None) -> jax.Array:
    return looked_up(dtype, rows, w, ids)


@singledispatch
def _settle(w: Any) -> Any:
    return w


@singledispatch
def _unembed(w: Any, x: jax.Array) -> jax.Array:
    return _matmul(x, w.astype(x.dtype), contract=1)


@singledispatch
def _dense(w: Any) -> jax.Array:
    return w


def _matmul(x: jax.Array, w: jax.Array, contract: int) -> jax.Array:
    """Contracts the last axis of x with axis `contract` of w.

    As one 2-D product: XLA:CPU hands only those to its fast library, forwards and backwards. Merging [B, T] is not
    possible where both are sharded (the partitioner would gather), so there the axes stay as they are.

    A decoder has few rows. Those of bfloat16 XLA:CPU multiplies in a loop of its own, a head of 32,000 rows 25 times as
    slowly as it would eight of them; and a float32 head, for a single row, it transposes first.
    """
    if mesh_axis_size("sequence") > 1:
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (contract,)), ((), ())))
    rows = x.reshape(-1, x.shape[-1])
    few = rows.shape[0] < FEW and device().platform == "cpu" and not free_axes()
    if few and w.dtype == jnp.float32 and rows.shape[0] == contract == 1:
        flat = (w @ rows[0])[None]
    elif few and w.dtype == jnp.bfloat16:
        padded = jnp.pad(rows, ((0, FEW - rows.shape[0]), (0, 0)))
        flat = jax.lax.dot_general(padded, w, (((1,), (contract,)), ((), ())))[: rows.shape[0]]
    else:
        flat = jax.lax.dot_general(rows, w, (((1,), (contract,)), ((), ())))
    return flat.reshape(*x.shape[:-1], flat.shape[-1])
