"""The loop that GPTQ and SparseGPT share: change one in-feature after the other, and let the rest make up for it.

A matrix W [D, F] sees inputs x, and W' shall compute nearly the same: least tr (W' - W)' H (W' - W) with H = sum x x'.
If in-feature i is set to what it has to be, the best that the later ones can do about it is (Hassibi and Stork 1992,
"Optimal Brain Surgeon"; with the order fixed beforehand, Frantar et al. 2022, arXiv:2210.17323, section 3)

    e   = (w_i - w'_i) / U_ii           U upper triangular, H^-1 = U'U
    w_j = w_j - U_ij e                  for all j > i

Row i of U is what is needed of the inverse of H without its first i in-features, so one factorisation serves all. The
updates of a block of in-features reach the rest of the matrix at once, as one product (there, "lazy batch updates").

H is damped, as there: 1 % of its mean diagonal is added to the diagonal. An in-feature that is never seen has no say:
its weights become 0. U is computed on the host in float64, without an inverse: with J the exchange of first and last,
J H J = L L' gives H = R R' for the upper triangular R = J L J, and U = R^-1.

Here matrices are [in, out], where the paper's have outputs first: its columns are our in-features.

Legend: D in-features, F out-features, B in-features of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DAMPING = 0.01
BLOCK = 128

# (state, the block's weights now [B, F], the block's diagonal of U [B], in-feature of the block, of the matrix)
# -> (what this in-feature's weights become [F], state)
Row = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# (state, all weights now [D, F], the block's diagonal of U [B], its first in-feature) -> state
Enter = Callable[[Any, jax.Array, jax.Array, jax.Array], Any]


def factor(gram_DD: Any, damping: float = DAMPING) -> tuple[np.ndarray, np.ndarray]:
    """(U float32[D, D], which in-features are never seen bool[D]) of sums x x'."""
    H = np.array(gram_DD, np.float64)
    dead = np.diag(H) <= 0
    H[dead, dead] = 1.0
    H[np.diag_indices_from(H)] += damping * np.diag(H)[~dead].mean() if not dead.all() else 0.0
    upper = np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]
    return np.triu(np.linalg.inv(upper)).astype(np.float32), dead


def padded(w_DF: jax.Array, u_DD: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Both with in-features of weight 0 at the end that have nothing to do with the others, up to whole blocks."""
    more = -w_DF.shape[0] % block
    u_DD = jnp.pad(u_DD, ((0, more), (0, more)))
    at = jnp.arange(w_DF.shape[0], u_DD.shape[0])
    return jnp.pad(w_DF, ((0, more), (0, 0))), u_DD.at[at, at].set(1.0)


def sweep(w_DF: jax.Array, u_DD: jax.Array, block: int, enter: Enter, row: Row, state: Any) -> tuple[jax.Array, Any]:
    """(what the weights become float32[D, F], the last state). `block` divides D."""
    D = w_DF.shape[0]

    def one_block(n: jax.Array, carry: Any) -> Any:
        w_DF, state = carry
        first = n * block
        u_BD = jax.lax.dynamic_slice_in_dim(u_DD, first, block)
        u_BB = jax.lax.dynamic_slice_in_dim(u_BD, first, block, axis=1)
        diagonal_B = jnp.diagonal(u_BB)
        state = enter(state, w_DF, diagonal_B, first)

        def one_row(i: jax.Array, carry: Any) -> Any:
            w_BF, errors_BF, state = carry
            new_F, state = row(state, w_BF, diagonal_B, i, first + i)
            error_F = (w_BF[i] - new_F) / diagonal_B[i]
            w_BF = (w_BF - u_BB[i][:, None] * error_F).at[i].set(new_F)  # U has zeros before i
            return w_BF, errors_BF.at[i].set(error_F), state

        w_BF = jax.lax.dynamic_slice_in_dim(w_DF, first, block)
        w_BF, errors_BF, state = jax.lax.fori_loop(0, block, one_row, (w_BF, jnp.zeros_like(w_BF), state))
        w_DF = jax.lax.dynamic_update_slice_in_dim(w_DF, w_BF, first, 0)
        later_BD = jnp.where(jnp.arange(D) >= first + block, u_BD, 0)
        return w_DF - product(later_BD.T, errors_BF), state

    return jax.lax.fori_loop(0, D // block, one_block, (w_DF.astype(jnp.float32), state))


def change(before_DF: jax.Array, after_DF: jax.Array, gram_DD: jax.Array) -> jax.Array:
    """The sum of squares by which outputs change: tr (W' - W)' H (W' - W)."""
    d_DF = after_DF.astype(jnp.float32) - before_DF.astype(jnp.float32)
    return (d_DF * product(gram_DD, d_DF)).sum()


product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
