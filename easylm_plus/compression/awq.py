"""AWQ: in-features with large inputs are rounded on a finer grid (Lin et al. 2023, arXiv:2306.00978, section 3.2).

    s = E|x|^alpha, an in-feature         W x = (W s) (x / s): W s is rounded, x is divided by s

For alpha = 0 this is rounding to nearest. Of 20 alphas in [0, 1) that one is taken with which outputs change least,
measured on the sums x x' of the calibration inputs. s is brought to sqrt(max s min s) = 1, as in the released code.

Then ends are clipped, as in the released code: a group of an output keeps of its grid's reach the share, from 1 down to
0.55, with which its own part of the output changes least. Both choices are kept only if they make the whole output
better, so no result is worse than rounding to nearest on the calibration inputs.

Departure: the released code folds 1/s into the norm or the matrix before, so q, k and v share one s; here each matrix
has its own, and the leaf keeps it.

Legend: D in-features, F out-features, G groups, N in-features of a group.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from easylm_plus.compression.surgeon import change, product
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.integer import Grid, Integers, by_group, grid, integers, of_codes, rounded, value

ALPHAS = 20
SHARES = tuple(1 - n / 20 for n in range(10))


def awq(w_DF: Any, gram_DD: Any, magnitude_D: Any, bits: int, group: int = 0, asymmetric: bool = False) -> Integers:
    """The leaf of a matrix.

    Args:
      gram_DD: sums x x' of its inputs.
      magnitude_D: sums |x|; what all of them are divided by does not matter.
    """
    w_DF, gram_DD, magnitude_D = (jnp.asarray(x, jnp.float32) for x in (w_DF, gram_DD, magnitude_D))
    return _best(w_DF, gram_DD, magnitude_D, bits, group, asymmetric)


def scales(magnitude_D: jax.Array, alpha: jax.Array) -> jax.Array:
    """s float32[D]; 1 where nothing is ever seen."""
    seen = magnitude_D > 0
    s_D = jnp.maximum(jnp.where(seen, magnitude_D, 1.0) ** alpha, 1e-4)
    largest, least = jnp.where(seen, s_D, -jnp.inf).max(), jnp.where(seen, s_D, jnp.inf).min()
    middle = jnp.where(seen.any(), jnp.sqrt(largest * least), 1.0)
    return jnp.where(seen, s_D / middle, 1.0)


@partial(jax.jit, static_argnames=("bits", "group", "asymmetric"))
def _best(
    w_DF: jax.Array, gram_DD: jax.Array, magnitude_D: jax.Array, bits: int, group: int, asymmetric: bool
) -> Integers:
    # as means, so that alphas' powers stay in range whatever the number of tokens
    mean_D = magnitude_D / jnp.maximum(magnitude_D.mean(), 1e-30)
    make = lambda alpha: integers(w_DF, bits, group, asymmetric, scales(mean_D, alpha))
    error = lambda leaf: change(w_DF, decode(leaf), gram_DD)
    alphas = jnp.arange(ALPHAS) / ALPHAS
    s_D = scales(mean_D, alphas[jnp.argmin(jax.lax.map(lambda alpha: error(make(alpha)), alphas))])
    plain = integers(w_DF, bits, group, asymmetric, s_D)
    cut = clipped(w_DF, gram_DD, s_D, bits, group, asymmetric)
    better = error(cut) < error(plain)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), cut, plain)


def clipped(w_DF: jax.Array, gram_DD: jax.Array, s_D: jax.Array, bits: int, group: int, asymmetric: bool) -> Integers:
    """Rounded on grids that reach less far than the largest weights, where that is better for a group's own output."""
    D, F = w_DF.shape
    w_GNF = by_group(w_DF * s_D[:, None], group)
    G, N, _ = w_GNF.shape
    of_x = gram_DD / (s_D[:, None] * s_D)  # x / s is what is multiplied
    own_GNN = of_x.reshape(G, N, G, N)[jnp.arange(G), :, jnp.arange(G)]
    whole = grid(w_GNF, bits, asymmetric)

    def rounded_to(share: jax.Array) -> tuple[jax.Array, Grid]:
        g = Grid(whole.scale * share, whole.zero)
        each = jax.tree.map(lambda x: x[:, None], g)
        return rounded(w_GNF, each, bits), each

    def error(share: jax.Array) -> jax.Array:
        d_GNF = value(*rounded_to(share)) - w_GNF
        return (d_GNF * product(own_GNN, d_GNF)).sum(1)

    shares = jnp.asarray(SHARES)
    errors = jax.lax.map(error, shares)
    share_GF = shares[jnp.argmin(errors, axis=0)]
    codes_GNF, each = rounded_to(share_GF)
    return of_codes(codes_GNF.reshape(D, F), jax.tree.map(lambda x: x[:, 0], each), bits, s_D)
