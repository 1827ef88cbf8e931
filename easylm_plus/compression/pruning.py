"""Which weights of a matrix are set to zero, in one shot and without training.

    magnitude   the smallest |w| of the matrix: the control, which knows nothing of the inputs
    wanda       the smallest |w_i| ||x_i||_2 of each output (Sun et al. 2023, arXiv:2306.11695, equation 1)
    sparsegpt   in each block of 128 in-features the smallest w_i^2 / (H^-1)_ii, over all outputs together; what is left
                makes up for it (Frantar and Alistarh 2023, arXiv:2301.00774, sections 3.2 and 3.3; the loop is
                surgeon.py's)

Either so large a share of the weights, or two in each four in-features of an output (2:4). SparseGPT chooses a four
when the loop reaches it, as in the released code.

(H^-1)_ii is that of the in-features that are not done yet, U_ii^2.

Legend: D in-features, F out-features, B in-features of a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.compression.surgeon import BLOCK, DAMPING, factor, padded, sweep


def magnitude(w_DF: Any, share: float) -> jax.Array:
    """bool[D, F]: what stays if `share` of the weights goes; 0: two in four."""
    score_DF = jnp.abs(jnp.asarray(w_DF, jnp.float32))
    return largest_of_fours(score_DF) if not share else _largest(score_DF.reshape(-1), share).reshape(score_DF.shape)


def wanda(w_DF: Any, gram_DD: Any, share: float) -> jax.Array:
    """The same by inputs with these sums x x'."""
    score_DF = jnp.abs(jnp.asarray(w_DF, jnp.float32)) * jnp.sqrt(jnp.diagonal(jnp.asarray(gram_DD)))[:, None]
    return largest_of_fours(score_DF) if not share else _largest(score_DF.T, share).T


def sparsegpt(w_DF: Any, gram_DD: Any, share: float, damping: float = DAMPING) -> tuple[jax.Array, jax.Array]:
    """(weights float32[D, F], the kept ones of which have changed; what stays)."""
    u_DD, dead = factor(gram_DD, damping)
    w_DF = jnp.where(dead[:, None], 0, jnp.asarray(w_DF, jnp.float32))
    return _swept(w_DF, jnp.asarray(u_DD), share)


def kept_of(D: int, F: int, share: float, method: str) -> int:
    """How many weights stay: by matrix, by output, or by block."""
    if not share:
        return D * F // 2
    if method == "sparsegpt":
        return sum(rows * F - _cut(share, rows * F) for rows in _block_rows(D))
    return (D - _cut(share, D)) * F if method == "wanda" else D * F - _cut(share, D * F)


def _cut(share: float, count: int) -> int:
    """How many of so many weights go."""
    return int(share * count)


def largest_of_fours(score_DF: jax.Array) -> jax.Array:
    """bool[D, F]: the two largest of each four in-features of an output; of equal ones the later."""
    D, F = score_DF.shape
    if D % 4:
        raise ValueError(f"fours do not divide {D} in-features")
    fours = score_DF.reshape(D // 4, 4, F)
    return (_ranks(fours, axis=1) >= 2).reshape(D, F)


def _largest(score: jax.Array, share: float) -> jax.Array:
    """True for all but the smallest `share` along the last axis."""
    return _ranks(score, axis=-1) >= _cut(share, score.shape[-1])


def _ranks(score: jax.Array, axis: int) -> jax.Array:
    """How many along the axis are smaller; of equal ones the earlier counts as smaller."""
    return jnp.argsort(jnp.argsort(score, axis=axis, stable=True), axis=axis, stable=True)


def _block_rows(D: int) -> list[int]:
    """In-features of each block."""
    block = min(BLOCK, D)
    return [min(block, D - first) for first in range(0, D, block)]


@partial(jax.jit, static_argnames="share")
def _swept(w_DF: jax.Array, u_DD: jax.Array, share: float) -> tuple[jax.Array, jax.Array]:
    D, F = w_DF.shape
    rows = _block_rows(D)
    block, counts = rows[0], np.asarray([_cut(share, r * F) for r in rows])
    if not share and D % 4:
        raise ValueError(f"fours do not divide {D} in-features")

    def enter(stays_PF: jax.Array, w_PF: jax.Array, diagonal_B: jax.Array, first: jax.Array) -> jax.Array:
        if not share:
            return stays_PF
        score_BF = _score(jax.lax.dynamic_slice_in_dim(w_PF, first, block), diagonal_B)
        real = jnp.arange(block)[:, None] + first < D
        ranks = _ranks(jnp.where(real, score_BF, jnp.inf).reshape(-1), axis=0)
        own = (ranks >= jnp.asarray(counts)[first // block]).reshape(block, F)
        return jax.lax.dynamic_update_slice_in_dim(stays_PF, own, first, 0)

    def row(stays_PF: jax.Array, w_BF: jax.Array, diagonal_B: jax.Array, i: jax.Array, at: jax.Array) -> Any:
        if not share:
            four = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 4)
            choose = lambda: jax.lax.dynamic_update_slice_in_dim(
                stays_PF, largest_of_fours(_score(four(w_BF), four(diagonal_B))), at, 0
            )
            stays_PF = jax.lax.cond(at % 4 == 0, choose, lambda: stays_PF)
        return jnp.where(stays_PF[at], w_BF[i], 0), stays_PF

    w_PF, u_PP = padded(w_DF, u_DD, block)
    new_PF, stays_PF = sweep(w_PF, u_PP, block, enter, row, jnp.ones(w_PF.shape, bool))
    return new_PF[:D], stays_PF[:D]


def _score(w_BF: jax.Array, diagonal_B: jax.Array) -> jax.Array:
    return jnp.square(w_BF / diagonal_B[:, None])
