"""A weight that notes what it is multiplied with: how calibration sees the inputs of a matrix inside a model.

The product is that of the base. The cotangent of `tap` is no gradient but an observation, whatever the cotangent of the
product is: over the rows x that count, the sums x x' and |x|. So one `jax.vjp` of a model with respect to its taps
collects them, and since nothing that runs backwards is of use to them, only the forward pass is computed.

Of experts each has its own sums. A leaf that is used twice would see the sum of both, as a tap does.

Legend: D in-features, F out-features, N rows, E experts, M rows sorted by expert.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from easylm_plus.numerics import verbs
from easylm_plus.numerics.grouped import Groups


class Seen(NamedTuple):
    """Sums over the inputs of a matrix [D, F], or of each expert [E, D, F]."""

    gram: Any  # x x', float32[..., D, D]
    magnitude: Any  # |x|, float32[..., D]


@struct.dataclass
class Watched:
    """A leaf, and where its inputs are noted."""

    base: Any
    tap: Seen  # zeros
    counts: Any = None  # float32[N]: 0 for rows that are padding; None: all count. Experts get none that are


def new_tap(shape: tuple[int, ...]) -> Seen:
    """Of a weight [..., D, F]."""
    *stack, D, _ = shape
    return Seen(jnp.zeros((*stack, D, D)), jnp.zeros((*stack, D)))


@jax.custom_vjp
def _watched(x: jax.Array, tap: Seen, base: Any, counts: Any) -> jax.Array:
    return verbs.project(x, base)


def _backward(residuals: Any, dy: jax.Array) -> Any:
    x, base, counts = residuals
    rows_ND = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows_ND = rows_ND if counts is None else rows_ND * counts[:, None]
    gram_DD = jax.lax.dot_general(rows_ND, rows_ND, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    dx = jax.vjp(lambda x: verbs.project(x, base), x)[1](dy)[0]
    return dx, Seen(gram_DD, jnp.abs(rows_ND).sum(0)), None, None


_watched.defvjp(lambda x, tap, base, counts: (verbs.project(x, base), (x, base, counts)), _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched_groups(how: tuple[Any, ...], x_MD: jax.Array, tap: Seen, base: Any, sizes_E: jax.Array) -> jax.Array:
    """`how`: what of the groups is known when a program is compiled."""
    return verbs.project_grouped(x_MD, base, Groups(sizes_E, *how))


def _groups_backward(how: tuple[Any, ...], residuals: Any, dy: jax.Array) -> Any:
    """The sums by expert are what a weight's gradient is if that of the product is the input itself, or a one."""
    x_MD, base, sizes_E = residuals
    groups = Groups(sizes_E, *how)

    def sums(rows_MD: jax.Array, dy_MF: jax.Array) -> jax.Array:
        zeros = jnp.zeros((sizes_E.shape[0], rows_MD.shape[1], dy_MF.shape[1]))
        with jax.default_matmul_precision("highest"):
            return jax.vjp(lambda w: verbs.project_grouped(rows_MD, w, groups), zeros)[1](dy_MF)[0]

    rows_MD = x_MD.astype(jnp.float32)
    seen = Seen(sums(rows_MD, rows_MD), sums(jnp.abs(rows_MD), jnp.ones((x_MD.shape[0], 1)))[..., 0])
    dx = jax.vjp(lambda x: verbs.project_grouped(x, base, groups), x_MD)[1](dy)[0]
    return dx, seen, None, None


_watched_groups.defvjp(
    lambda how, x_MD, tap, base, sizes_E: (_watched_groups(how, x_MD, tap, base, sizes_E), (x_MD, base, sizes_E)),
    _groups_backward,
)


@verbs._project.register
def _(w: Watched, x: jax.Array) -> jax.Array:
    return _watched(x, w.tap, w.base, w.counts)


@verbs._project_grouped.register
def _(w: Watched, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return _watched_groups(tuple(groups[1:]), x_MD, w.tap, w.base, groups.sizes_E)


@verbs._settle.register
def _(w: Watched) -> Watched:
    return dataclasses.replace(w, base=verbs.settle(w.base))


@verbs._dense.register
def _(w: Watched) -> jax.Array:
    return verbs.dense(w.base)
