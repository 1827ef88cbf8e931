"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): y = base(x) + alpha / r (x a) b.

Only a and b learn. The base is any leaf, as it is kept or as a step multiplies by it; so an adapter beside an FP8 base
is this leaf around that one. All other weights of the model are Frozen: a step has them, and differentiates nothing.

a starts uniform in +-1 / sqrt(D) (the Kaiming initialisation of the released code), b at zero, so that a run starts
from the base alone. Adapters are float32, whatever the base is.

Legend: D in-features, F out-features, R rank; `...` stack axes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easylm_plus.numerics import handles, verbs
from easylm_plus.numerics.formats import decode


@struct.dataclass
class LowRank:
    """A matrix [..., D, F] and the pair that learns in its place."""

    base: Any
    a: jax.Array  # float32[..., D, R]
    b: jax.Array  # float32[..., R, F]
    scale: float = struct.field(pytree_node=False)  # alpha / R

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def __getitem__(self, index: Any) -> "LowRank":
        """Matrices of a stack, by an index of its stack axes."""
        return LowRank(self.base[index], self.a[index], self.b[index], self.scale)


@struct.dataclass
class Frozen:
    """A weight of a step's view that does not learn."""

    value: Any


def new_adapter(key: jax.Array, base: Any, rank: int, alpha: float) -> LowRank:
    """The adapter that changes nothing yet."""
    *stack, D, F = base.shape
    a = jax.random.uniform(key, (*stack, D, rank), jnp.float32, -(D**-0.5), D**-0.5)
    return LowRank(base, a, jnp.zeros((*stack, rank, F)), alpha / rank)


@verbs._project.register
def _(w: LowRank, x: jax.Array) -> jax.Array:
    return verbs.project(x, w.base) + verbs.project(verbs.project(x, w.a), w.b) * w.scale


@decode.register
def _(x: LowRank) -> Any:
    """Base and adapter merged, in float32; on the host if the arrays are NumPy's."""
    with jax.default_matmul_precision("highest"):
        return decode(x.base).astype(jnp.float32) + x.a @ x.b * np.float32(x.scale)


@verbs._dense.register
def _(w: LowRank) -> jax.Array:
    return decode(w)


@handles.handle_of.register
def _(leaf: LowRank) -> dict[str, jax.Array]:
    return {"a": leaf.a, "b": leaf.b}


@handles.hold.register
def _(leaf: LowRank, handle: dict[str, jax.Array]) -> LowRank:
    return dataclasses.replace(leaf, a=handle["a"], b=handle["b"])


@handles.cotangent_of.register
def _(leaf: LowRank, handle: dict[str, jax.Array]) -> LowRank:
    return LowRank(None, handle["a"], handle["b"], leaf.scale)


@handles.handle_of.register
def _(leaf: Frozen) -> None:
    return None


@handles.hold.register
def _(leaf: Frozen, handle: None) -> Any:
    return leaf.value
