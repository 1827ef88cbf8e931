"""Choosing the next token: temperature, top-k and nucleus (Holtzman et al. 2019, arXiv:1904.09751).

The options are traced numbers, so changing them does not compile anything anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from easylm_plus.errors import UserError


class Sampling(NamedTuple):
    """temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


def checked(sampling: Sampling) -> Sampling:
    """The options, if they make sense."""
    if sampling.temperature < 0:
        raise UserError(f"temperature = {sampling.temperature}: expected 0 (greedy) or more")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p = {sampling.top_p}: expected a number in (0, 1]")
    if sampling.top_k < 0:
        raise UserError(f"top_k = {sampling.top_k}: expected 0 (all) or more")
    return sampling


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row, int32[B]. A tie goes to the lower id."""
    greedy = jnp.argmax(logits_BV, axis=-1)
    drawn = lambda: jax.random.categorical(key, _filtered(logits_BV.astype(jnp.float32), sampling), axis=-1)
    return jax.lax.cond(sampling.temperature > 0, drawn, lambda: greedy).astype(jnp.int32)


def _filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Tempered logits, with what top-k and then top-p exclude at -inf. The likeliest token always stays.

    The nucleus is one of the k likeliest tokens' distribution, as in Hugging Face's chain of warpers.
    """
    logits_BV = logits_BV / jnp.maximum(sampling.temperature, 1e-6)
    order = jnp.argsort(logits_BV, axis=-1, descending=True)
    rank = jnp.arange(logits_BV.shape[-1])
    ranked = jnp.take_along_axis(logits_BV, order, axis=-1)
    ranked = jnp.where((rank < sampling.top_k) | (sampling.top_k == 0), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier tokens
    # with top_p 1 the rounding of the sum must not cut the tail
    keep = (before < sampling.top_p) | (sampling.top_p >= 1) | (rank == 0)
    kept = jnp.where(keep, ranked, -jnp.inf)
    return jnp.put_along_axis(logits_BV, order, kept, axis=-1, inplace=False)
