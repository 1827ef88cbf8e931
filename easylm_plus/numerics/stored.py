"""Weights that are stored otherwise than they are multiplied by.

A Scaled (formats.py) multiplies as what it decodes to, in the dtype of the activations: how held-out losses and answers
are computed from masters in 16 bits. It cannot be learned: its codes have no useful gradient.

A Copy is what a step makes of a master for its own use. It multiplies in a float dtype, and its gradient goes to a
handle: in that dtype, or in E4M3 codes as that of an FP8 product (fp8.py).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from easylm_plus.numerics import handles, verbs
from easylm_plus.numerics.formats import Scaled, amax, decode
from easylm_plus.numerics.fp8 import TENSORS, Fp8Handle, new_handle, underflow
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.reduction import encode_shared
from easylm_plus.parallel import collectives
from easylm_plus.parallel.sharding import manual_axes


@struct.dataclass
class Copy:
    """A weight whose gradient is the cotangent of its handle, whose values are never read."""

    value: Any  # an array or a Scaled
    handle: Any = None  # an array like the decoded value, or an Fp8Handle; None: nothing is learned
    narrow: bool = struct.field(pytree_node=False, default=False)  # gradients in E4M3


@jax.custom_vjp
def _copied(value: Any, handle: Any) -> jax.Array:
    return decode(value)


_copied.defvjp(
    lambda value, handle: (decode(value), handle), lambda handle, gradient: (None, to_handle(handle, gradient))
)


def to_handle(handle: Any, gradient: jax.Array) -> Any:
    """The cotangent of a handle: the gradient in its dtype, or in E4M3 codes for an Fp8Handle, or None for none."""
    if not isinstance(handle, Fp8Handle):
        return None if handle is None else gradient.astype(handle.dtype)
    narrow = encode_shared(gradient, manual_axes())
    largest = collectives.largest(amax(gradient), manual_axes())
    seen = jnp.stack([largest, jnp.zeros_like(largest), underflow(gradient, narrow.code, (-2, -1))], -1)
    tap = jnp.full(handle.tap.shape, jnp.nan).at[..., TENSORS.index("gradient"), :].set(seen)  # no FP8 product
    return Fp8Handle(narrow.code, narrow.scale_inv, tap, jnp.ones_like(narrow.scale_inv))


@verbs._dense.register
def _(w: Scaled) -> jax.Array:
    return decode(w)


@verbs._dense.register
def _(w: Copy) -> jax.Array:
    return _copied(w.value, w.handle)


@verbs._project.register(Scaled)
@verbs._project.register(Copy)
def _(w: Any, x: jax.Array) -> jax.Array:
    return verbs.project(x, verbs.dense(w))


@verbs._settle.register(Scaled)
@verbs._settle.register(Copy)
def _(w: Any) -> jax.Array:
    return verbs.dense(w)


@verbs._project_grouped.register(Scaled)
@verbs._project_grouped.register(Copy)
def _(w: Any, x_MD: jax.Array, groups: Groups) -> jax.Array:
    return verbs.project_grouped(x_MD, verbs.dense(w), groups)


@verbs._lookup.register
def _(w: Copy, ids: jax.Array, dtype: DTypeLike, rows: str | None) -> jax.Array:
    return verbs.lookup(ids, verbs.dense(w), dtype, rows)


@verbs._unembed.register
def _(w: Copy, x: jax.Array) -> jax.Array:
    return verbs.unembed(x, verbs.dense(w))


@handles.handle_of.register
def _(leaf: Copy) -> Any:
    if leaf.narrow:
        return new_handle(leaf.value.shape)
    value = jax.eval_shape(decode, leaf.value)
    return jnp.zeros(value.shape, value.dtype)


@handles.hold.register
def _(leaf: Copy, handle: Any) -> Copy:
    return dataclasses.replace(leaf, handle=handle)


@handles.cotangent_of.register
def _(leaf: Copy, handle: Any) -> Copy:
    return Copy(None, handle, leaf.narrow)
