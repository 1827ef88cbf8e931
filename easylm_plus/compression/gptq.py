"""GPTQ: rounding in which later weights make up for the errors of earlier ones (Frantar et al. 2022, arXiv:2210.17323).

The loop is surgeon.py's; an in-feature's weights become their nearest values on the grid of their group (integer.py).

A group's grid is that of its weights as they are when the loop reaches it, changed by what came before. With
`act_order` the in-features with the largest inputs come first, when there is most to make up with (the released code's
option of that name); the groups stay those of neighbours, so that nothing has to be permuted at run time, and their
grids are then those of the weights as they were ("static groups").

Departures from the released code: a block never crosses a group's end, and within a block a group's grid sees all
errors made so far, where there it sees those of earlier blocks only.

Legend: D in-features, F out-features, G groups.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.compression.surgeon import BLOCK, DAMPING, factor, padded, sweep
from easylm_plus.numerics.integer import Grid, Integers, by_group, grid, of_codes, rounded, value


def gptq(w_DF: Any, gram_DD: Any, bits: int, group: int = 0, asymmetric: bool = False, act_order: bool = False,
         damping: float = DAMPING) -> Integers:  # fmt: skip
    """The leaf of a matrix that sees inputs with these sums x x', float32[D, D].

    Raises ValueError if the groups do not divide D.
    """
    by_group(w_DF, group)
    D = w_DF.shape[0]
    order = np.argsort(-np.diag(gram_DD), kind="stable") if act_order else np.arange(D)
    u_DD, dead = factor(np.asarray(gram_DD)[np.ix_(order, order)], damping)
    w_DF = jnp.where(dead[np.argsort(order)][:, None], 0, jnp.asarray(w_DF, jnp.float32))
    return _rounded(w_DF, jnp.asarray(u_DD), jnp.asarray(order), bits, group or D, asymmetric, act_order)


@partial(jax.jit, static_argnames=("bits", "group", "asymmetric", "static"))
def _rounded(
    w_DF: jax.Array, u_DD: jax.Array, order_D: jax.Array, bits: int, group: int, asymmetric: bool, static: bool
) -> Integers:
    """`static`: the grids are those of the weights as they come in; needed where the order is another."""
    D, F = w_DF.shape
    whole = group == D
    block = min(BLOCK, D) if whole or static else max(b for b in range(1, min(BLOCK, group) + 1) if group % b == 0)
    grids = grid(by_group(w_DF, group), bits, asymmetric)
    group_D = jnp.pad(order_D // group, (0, -D % block))

    def enter(state: Any, w_DF: jax.Array, diagonal: jax.Array, first: jax.Array) -> Any:
        if whole or static:
            return state
        codes, grids = state
        own = lambda: grid(jax.lax.dynamic_slice_in_dim(w_DF, first, group), bits, asymmetric, axis=0)
        put = lambda: jax.tree.map(lambda all, one: all.at[first // group].set(one), grids, own())
        return codes, jax.lax.cond(first % group == 0, put, lambda: grids)

    def row(state: Any, w_BF: jax.Array, diagonal: jax.Array, i: jax.Array, at: jax.Array) -> Any:
        codes, grids = state
        g = jax.tree.map(lambda x: x[group_D[at]], grids)
        q_F = rounded(w_BF[i], g, bits)
        return value(q_F, g), (codes.at[at].set(q_F.astype(jnp.int16)), grids)

    w_PF, u_PP = padded(w_DF[order_D], u_DD, block)
    start = (jnp.zeros(w_PF.shape, jnp.int16), Grid(*grids))
    _, (codes_PF, grids) = sweep(w_PF, u_PP, block, enter, row, start)
    codes_DF = jnp.zeros((D, F), jnp.int16).at[order_D].set(codes_PF[:D])
    return of_codes(codes_DF, grids, bits)
