"""Collectives for codes of one byte, to be called inside a manual region (`jax.shard_map(..., check_vma=False)`).

Codes travel as uint8 and are never added on the way: XLA:CPU widens every FP8 collective to float16, and a `psum` of
FP8 overflows to NaN there, while on GPUs NCCL rounds it once a hop. What is done with the codes on arrival is
`numerics/reduction.py`.

Where several mesh axes are named, ranks are numbered by them in the order of the tuple, the first slowest, as
PartitionSpec numbers the blocks of a dimension. Bytes given are what a rank sends (and receives) of n elements.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Axes = str | tuple[str, ...]


def ranks(axes: Axes) -> int:
    """How many devices these axes of the manual region span; 1 for none."""
    return math.prod(jax.lax.axis_size(axis) for axis in _tuple(axes))


def as_bytes(x: jax.Array) -> jax.Array:
    """FP8 codes as uint8: what travels, and what is written into a stack, of which XLA:CPU would widen the whole to
    write one layer. Other dtypes as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if x.dtype.itemsize == 1 else x


def as_bits(x: jax.Array) -> jax.Array:
    """As unsigned integers of the same width, which nothing rounds, and to which a partitioner may add zeros: of floats
    that makes 0 of -0."""
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def from_bytes(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """What `as_bytes` was given, of this dtype."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def all_gather_codes(code: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """The blocks of all ranks joined along `dim`: n (N - 1), n of a block. Wider dtypes travel as they are."""
    axes = _larger_than_one(axes)
    if not axes:
        return code
    return from_bytes(jax.lax.all_gather(as_bytes(code), axes, axis=dim % code.ndim, tiled=True), code.dtype)


def exchange(chunks: jax.Array, axes: Axes) -> jax.Array:
    """Chunk r of each rank goes to rank r: codes [N, ...] -> [N, ...], entry i from rank i. n (N - 1) / N."""
    axes = _larger_than_one(axes)
    if not axes:
        return chunks
    return from_bytes(jax.lax.all_to_all(as_bytes(chunks), axes, 0, 0, tiled=True), chunks.dtype)


def pass_on(code: jax.Array, axes: Axes) -> jax.Array:
    """What the rank before this one in the ring has: n."""
    axes = _larger_than_one(axes)
    if not axes:
        return code
    in_mesh = jax.sharding.get_abstract_mesh().axis_names
    ordered = tuple(sorted(axes, key=in_mesh.index)) if len(axes) > 1 else axes  # as `ppermute` numbers ranks
    numbers = np.arange(ranks(axes)).reshape([ranks(axis) for axis in ordered])
    ring = numbers.transpose([ordered.index(axis) for axis in axes]).ravel().tolist()
    around = list(zip(ring, ring[1:] + ring[:1]))
    return from_bytes(jax.lax.ppermute(as_bytes(code), ordered, around), code.dtype)


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """The largest over the ranks, infinite where one has NaN: the maximum of some backends passes over NaN."""
    axes = _larger_than_one(axes)
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    return jax.lax.pmax(x, axes) if axes else x


def split(x: jax.Array, blocks: int, pieces: int, dim: int) -> jax.Array:
    """[..., D, F] -> [blocks * pieces, ..., P]: each matrix cut into blocks along `dim`, and each block, flattened and
    padded with zeros, into pieces."""
    dim, stack = dim % x.ndim - x.ndim, x.shape[:-2]
    assert dim in (-2, -1), f"only the sides of a matrix are cut, not axis {dim}"
    assert x.shape[dim] % blocks == 0, f"{blocks} blocks do not divide axis {dim} of {x.shape}"
    sides = list(x.shape[-2:])
    sides[dim : dim + 1 or None] = [blocks, sides[dim] // blocks]
    flat = jnp.moveaxis(x.reshape(*stack, *sides), dim - 1, 0).reshape(blocks, *stack, -1)
    padding = -flat.shape[-1] % pieces
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
    cut = flat.reshape(blocks, *stack, pieces, -1)
    return jnp.moveaxis(cut, -2, 1).reshape(blocks * pieces, *stack, -1)


def join(piece: jax.Array, axes: Axes, block: tuple[int, int]) -> jax.Array:
    """The inverse of `split` for a block: pieces [..., P] of the ranks along `axes` -> [..., *block] on all of them."""
    flat = all_gather_codes(piece, axes, -1)
    return flat[..., : math.prod(block)].reshape(*flat.shape[:-1], *block)


def _tuple(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _larger_than_one(axes: Axes) -> tuple[str, ...]:
    return tuple(axis for axis in _tuple(axes) if jax.lax.axis_size(axis) > 1)
