"""AWQ: in-features with large inputs are rounded on a finer grid (Lin et al. 2023, arXiv:2306.00978, section 3.2).

    s = E|x|^alpha, an in-feature         W x = (W s) (x / s): W s is rounded, x is divided by s

For alpha = 0 this is rounding to nearest. Of 20 alphas in [0, 1) that one is taken with which outputs change least,
measured on the sums x x' of the calibration inputs. s is brought to sqrt(max s min s) = 1, as in the released code.

Departures: the released code folds 1/s into the norm or the matrix before, so q, k and v share one s; here each matrix
has its own, and the leaf keeps it. And weights are not clipped.

Legend: D in-features, F out-features.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from easylm_plus.compression.surgeon import change
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.integer import Integers, integers

ALPHAS = 20


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
    alphas = jnp.arange(ALPHAS) / ALPHAS
    errors = jax.lax.map(lambda alpha: change(w_DF, decode(make(alpha)), gram_DD), alphas)
    return make(alphas[jnp.argmin(errors)])
