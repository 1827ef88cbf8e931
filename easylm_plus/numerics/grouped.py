"""Products of rows with the matrix of their group: what a mixture of experts is made of.

Rows lie sorted by group, each group padded with zero rows to a multiple of `tile`, so that a tile belongs to one
group.

    ragged   jax.lax.ragged_dot, for which TPUs and GPUs have kernels
    tiled    a loop over groups and their tiles, one library product each; on a CPU, where ragged_dot multiplies every
             row by every group's matrix. A group without rows is not even read

Legend: M rows, D in-features, F out-features, E groups.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TILE = 128  # the most rows a tile


class Groups(NamedTuple):
    """How the rows of a product are grouped."""

    sizes_E: jax.Array  # int32: rows of each group, padding included; their sum is at most M
    tile: int = 1  # divides all sizes
    implementation: str = "ragged"
    cut: str | None = None  # the mesh axis that cuts the in-features, inside a `shard_map`


def resolve_grouped(name: str, platform: str) -> str:
    """`auto` -> the implementation for this platform."""
    return name if name != "auto" else "tiled" if platform == "cpu" else "ragged"


def tile_of(choices: int, groups: int, implementation: str) -> int:
    """Rows a tile: a power of two near an eighth of an even load, so that padding stays small."""
    even = choices // max(1, 8 * groups)
    return 1 if implementation == "ragged" else min(TILE, 1 << max(0, even.bit_length() - 1))


def padded_rows(choices: int, groups: int, tile: int) -> int:
    """M: rows that so many choices take at most, however they fall on the groups."""
    return (choices + min(groups, choices) * (tile - 1)) // tile * tile


def grouped_matmul(x_MD: jax.Array, w_EDF: jax.Array, groups: Groups) -> jax.Array:
    """Each row times its group's matrix -> [M, F] in x's dtype; rows after the last group are zero."""
    if groups.implementation == "ragged":
        return jax.lax.ragged_dot(x_MD, w_EDF, groups.sizes_E)
    return _tiled(groups.tile, x_MD, w_EDF, groups.sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(tile: int, x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    def group(e: jax.Array, w_DF: jax.Array, y_MF: jax.Array) -> jax.Array:
        return _over_tiles(tile, sizes_E, e, lambda at, y: _write(y, at, _read(x_MD, at, tile) @ w_DF), y_MF)

    y_MF = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return _over_groups(w_EDF, sizes_E, group, y_MF)


def _tiled_forward(tile: int, x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> Any:
    return _tiled(tile, x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _tiled_backward(tile: int, residuals: Any, dy_MF: jax.Array) -> Any:
    x_MD, w_EDF, sizes_E = residuals

    def group(e: jax.Array, w_DF: jax.Array, carry: Any) -> Any:
        def one(at: jax.Array, carry: Any) -> Any:
            dx_MD, sum_DF = carry
            x, dy = _read(x_MD, at, tile), _read(dy_MF, at, tile)
            dw = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return _write(dx_MD, at, dy @ w_DF.T), sum_DF + dw

        dx_MD, dw_EDF = carry
        sum_DF = jnp.zeros(w_DF.shape, jnp.float32)
        dx_MD, sum_DF = _over_tiles(tile, sizes_E, e, one, (dx_MD, sum_DF))
        return dx_MD, dw_EDF.at[e].set(sum_DF.astype(dw_EDF.dtype))

    return *_over_groups(w_EDF, sizes_E, group, (jnp.zeros_like(x_MD), jnp.zeros_like(w_EDF))), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _over_groups(w_EDF: jax.Array, sizes_E: jax.Array, body: Callable, carry: Any) -> Any:
    """body(e, w_DF, carry) for each group with rows. The barrier keeps the matrix an operand of a library product."""

    def group(e: jax.Array, carry: Any) -> Any:
        once = lambda _, carry: body(e, jax.lax.optimization_barrier(w_EDF[e]), carry)
        return jax.lax.fori_loop(0, (sizes_E[e] > 0).astype(jnp.int32), once, carry)  # a `cond` would copy the carry

    return jax.lax.fori_loop(0, w_EDF.shape[0], group, carry)


def _over_tiles(tile: int, sizes_E: jax.Array, e: jax.Array, body: Callable, carry: Any) -> Any:
    """body(first row, carry) for each tile of group e."""
    start = (jnp.cumsum(sizes_E) - sizes_E)[e]
    return jax.lax.fori_loop(0, sizes_E[e] // tile, lambda t, carry: body(start + t * tile, carry), carry)


def _read(x: jax.Array, at: jax.Array, tile: int) -> jax.Array:
    return jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(x, at, tile))


def _write(y: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(y, rows.astype(y.dtype), at, axis=0)
