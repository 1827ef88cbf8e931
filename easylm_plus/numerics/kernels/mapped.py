"""Kernels under `vmap`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def over_tokens(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """product(x[N, D], *weight) -> [N, F] with a rule for batches of it: those of x alone are more tokens of the same
    product, which may take another path; with a weight each it is one product after the other."""
    rows = custom_vmap(product)

    @rows.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array, *weight: jax.Array) -> tuple[jax.Array, bool]:
        if not any(batched[1:]):
            return rows(x.reshape(-1, x.shape[-1]), *weight).reshape(*x.shape[:-1], -1), True
        every = lambda a, own: a if own else jnp.broadcast_to(a, (size, *a.shape))
        return jax.lax.map(lambda args: rows(*args), tuple(map(every, (x, *weight), batched))), True

    return rows
