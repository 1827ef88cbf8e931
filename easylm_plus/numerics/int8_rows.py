"""Rows in 8 bits with a scale each: what embeddings and heads are served as.

    scale = max_d |w_d| / 127        of a row: a token of the vocabulary
    code  = round(w / scale)         half to even
    y     = (x . code) scale         x as it is, sums in float32

Only the weights are rounded (W8A16). BitNet keeps embedding and head in high precision because probabilities are made
of them; with activations in 8 bits as well, the logits of a random model of BitNet's shape move 1.4 times as far as by
rounding the weights alone (tests/numerics/test_int8_rows.py), and a decoder would gain nothing: a product with one
token waits for the weights either way.

The matrix is kept by rows of the vocabulary whichever way it is used: a table of embeddings [V, D], which is also the
head of a tied model, or with `transposed` the kernel [D, V] of a head of its own. There is a CPU kernel for few tokens
(kernels/choice.py). It adds in another order than XLA, so the two differ in last bits.

Legend: `...` stack axes, V rows, D columns, N tokens.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from easylm_plus.numerics import verbs
from easylm_plus.numerics.coded import Coded, host_or_device
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.kernels import choice, native
from easylm_plus.numerics.kernels.mapped import over_tokens
from easylm_plus.parallel.sharding import device, free_axes

LARGEST = 127
PARTS = 256  # of a table that XLA:CPU multiplies by: each is widened where it fits a core's cache


@struct.dataclass
class Int8Rows(Coded):
    """A matrix [..., V, D], or transposed, [..., D, V], with a scale a row."""

    codes: jax.Array  # int8[..., V, D]
    scale: jax.Array  # float32[..., V]
    transposed: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, V, D = self.codes.shape
        return (*stack, D, V) if self.transposed else (*stack, V, D)


def int8_rows(w: Any, transposed: bool = False) -> Int8Rows:
    """A table [..., V, D], or with `transposed` a head's kernel [..., D, V], on the host or on the device."""
    xp = host_or_device(w)
    rows = xp.asarray(xp.swapaxes(w, -1, -2) if transposed else w, xp.float32)
    scale = xp.maximum(xp.abs(rows).max(-1) / LARGEST, xp.finfo(xp.float32).tiny).astype(xp.float32)
    codes = xp.clip(xp.round(rows / scale[..., None]), -LARGEST, LARGEST).astype(xp.int8)
    return Int8Rows(codes, scale, transposed)


@decode.register
def _(w: Int8Rows) -> Any:
    xp = host_or_device(w.codes)
    rows = w.codes.astype(xp.float32) * w.scale[..., None]
    return xp.swapaxes(rows, -1, -2) if w.transposed else rows


@verbs._lookup.register
def _(w: Int8Rows, ids: jax.Array, dtype: DTypeLike, rows: str | None) -> jax.Array:
    assert not w.transposed, "a head is not looked up in"
    codes = jnp.take(w.codes, ids, axis=0, mode="clip").astype(jnp.float32)
    return (codes * jnp.take(w.scale, ids, axis=0, mode="clip")[..., None]).astype(dtype)


@verbs._unembed.register
def _(w: Int8Rows, x: jax.Array) -> jax.Array:
    return verbs.unembed(x, decode(w)) if w.transposed else _product(choice.path(), x, w)


@verbs._project.register
def _(w: Int8Rows, x: jax.Array) -> jax.Array:
    return _product(choice.path(), x, w) if w.transposed else verbs.project(x, decode(w))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(path: str, x: jax.Array, w: Int8Rows) -> jax.Array:
    """x[..., D] times the rows -> [..., V] in x's dtype."""
    return _rows(path)(x.reshape(-1, x.shape[-1]), w.codes, w.scale).reshape(*x.shape[:-1], -1)


def _backward(path: str, w: Int8Rows, dy: jax.Array) -> tuple[jax.Array, None]:
    rows = w.codes.astype(jnp.float32) * w.scale[..., None]
    return verbs.project(dy.astype(jnp.float32), rows).astype(dy.dtype), None


_product.defvjp(lambda path, x, w: (_product(path, x, w), w), _backward)


@cache
def _rows(path: str) -> Callable:
    """(x[N, D], codes and scales) -> [N, V] in x's dtype, by this path; a function a path, since JAX remembers what it
    has traced of a function."""

    @over_tokens
    def rows(x_ND: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        if path == "ffi" and x_ND.shape[0] <= choice.MOST_TOKENS[path]:
            return native.rows_product(x_ND, codes, scale)
        return (_sums(x_ND.astype(jnp.float32), codes) * scale).astype(x_ND.dtype)

    return rows


def _sums(x_ND: jax.Array, codes_VD: jax.Array) -> jax.Array:
    """x . codes -> float32[N, V].

    XLA:CPU's library takes only floats that lie in memory. A table widened as a whole would be written, transposed and
    read again; its parts stay in the cache. A single token is a vector, for which nothing has to be transposed.
    """
    wide = lambda codes: codes.astype(jnp.float32)
    times = lambda rows: rows @ x_ND[0] if x_ND.shape[0] == 1 else verbs.unembed(x_ND, rows)
    parts = math.gcd(codes_VD.shape[0], PARTS)
    if device().platform != "cpu" or free_axes() or parts == 1:
        return verbs.unembed(x_ND, wide(codes_VD))
    each = codes_VD.reshape(parts, -1, codes_VD.shape[1])
    y = jax.lax.map(lambda codes: times(jax.lax.optimization_barrier(wide(codes))), each)
    return jnp.moveaxis(y, 0, -2).reshape(x_ND.shape[0], -1)
