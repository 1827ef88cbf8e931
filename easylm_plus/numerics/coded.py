"""Weights in codes: what a matrix becomes that is only used, in fewer bits than a float has.

Each kind of codes is a subclass: a `flax.struct` dataclass whose array fields carry all stack axes in front, with its
`decode` (formats.py). From here it gets the rest: a product decodes where it is needed, forwards and again backwards,
so that what lives between the two is codes. A kind with a product of its own registers that over this one.

A Coded is never learned. It can be the base of an adapter (lora.py), and gradients go through it to its inputs.

Legend: `...` stack axes (layers, experts), D in-features, F out-features.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from easylm_plus.numerics import handles, verbs
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.grouped import Groups


class Coded:
    """Base of the kinds; a table of embeddings is a matrix too."""

    by_output: ClassVar[tuple[str, ...]] = ()  # fields that are [..., F, parts of D]

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., D, F], of the matrix that is meant."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> Any:
        """Matrices of a stack, by an index of its stack axes."""
        return jax.tree.map(lambda x: x[index], self)

    def placed(self, place: NamedSharding) -> Any:
        """Where the arrays lie, of a matrix that would lie at `place`: cut as that where they have its axes and the cut
        divides them, and whole on every replica: what does not learn is not cut over those."""
        mesh, entries = place.mesh, (*place.spec, *(None for _ in self.shape))[: len(self.shape)]
        *stack, D, F = (_without_replica(entry) for entry in entries)

        def of_field(name: str, x: Any) -> NamedSharding:
            wanted = (*stack, F, D) if name in self.by_output else (*stack, *(() for _ in x.shape))[: x.ndim]
            fits = lambda axes, dim: not dim % math.prod(mesh.shape[axis] for axis in axes)
            cut = (axes if axes and fits(axes, dim) else None for axes, dim in zip(wanted, x.shape, strict=True))
            return NamedSharding(mesh, PartitionSpec(*cut))

        own: Any = self  # a dataclass, as all kinds are
        fields = {f.name: getattr(own, f.name) for f in dataclasses.fields(own) if f.metadata.get("pytree_node", True)}
        return dataclasses.replace(own, **{name: of_field(name, x) for name, x in fields.items() if x is not None})


def _without_replica(entry: Any) -> tuple[str, ...]:
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(axis for axis in axes if axis != "replica")


@jax.custom_vjp
def _product(x: jax.Array, w: Coded) -> jax.Array:
    return verbs.project(x, decode(w))


def _product_backward(w: Coded, dy: jax.Array) -> tuple[jax.Array, None]:
    return verbs.unembed(dy, decode(w)), None


_product.defvjp(lambda x, w: (_product(x, w), w), _product_backward)


@verbs._project.register
def _(w: Coded, x: jax.Array) -> jax.Array:
    return _product(x, w)


@verbs._project_grouped.register
def _(w: Coded, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return verbs.project_grouped(x_MD, verbs.settle(w), groups)


@verbs._settle.register
@verbs._dense.register
def _(w: Coded) -> jax.Array:
    return decode(w)


@verbs._lookup.register
def _(w: Coded, ids: jax.Array, dtype: DTypeLike, rows: str | None) -> jax.Array:
    return verbs.lookup(ids, decode(w).astype(dtype), dtype, rows)


@verbs._unembed.register
def _(w: Coded, x: jax.Array) -> jax.Array:
    return verbs.unembed(x, decode(w))


@handles.handle_of.register
def _(leaf: Coded) -> None:
    return None


@handles.hold.register
def _(leaf: Coded, handle: None) -> Coded:
    return leaf


@handles.cotangent_of.register
def _(leaf: Coded, handle: None) -> None:
    return None


def host_or_device(x: Any) -> Any:
    """The module of an array, numpy or jax.numpy: what is decoded on the host stays there."""
    return jnp if isinstance(x, jax.Array) else np
