"""Narrow number formats, and arrays of them with one scale a matrix.

    value = code * scale_inv,  code = cast(value * scale),  scale = 2^floor(log2(largest / amax))

Scales are powers of two, so that scaling itself never rounds (FP8-LM, Peng et al. 2023, arXiv:2310.18313; the rule is
that of its released code). The amax is that of a matrix; of a stack of matrices each has its own. What the released
code does with odd amaxes is mended: an infinite one keeps the scale (there: its reciprocal), a tiny one has its
exponent bounded (there: an infinite scale, and NaN for every zero).

Two traps. JAX's casts to FP8 do not saturate (465 becomes NaN in E4M3), so values are clipped first. And
`exp2(floor(log2(x)))` is not a power of two on XLA:CPU; exponents are read off and put together as bits.

Legend: `...` stack axes (layers, experts), D and F the sides of a matrix.
"""

import dataclasses
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Format:
    """A dtype, and the largest value that codes of it are scaled to; None: values are stored as they are."""

    name: str
    dtype: DTypeLike
    largest: float | None


FORMATS = {
    f.name: f
    for f in (
        Format("e4m3", jnp.float8_e4m3fn, 448.0),
        Format("e5m2", jnp.float8_e5m2, 57344.0),
        Format("fp16", jnp.float16, 65504.0),
        Format("bf16", jnp.bfloat16, None),
        Format("float32", jnp.float32, None),
    )
}
E4M3, E5M2, FP16 = FORMATS["e4m3"], FORMATS["e5m2"], FORMATS["fp16"]


@dataclasses.dataclass(frozen=True)
class Formats:
    """Names in FORMATS of what a narrow weight's master and moments are stored in: FP8-LM's 5 bytes, with the E4M3
    gradient 6 (equation 8 of the paper)."""

    master: str = "fp16"
    first: str = "e4m3"
    second: str = "fp16"


NARROW, WIDE = Formats(), Formats("float32", "float32", "float32")


@struct.dataclass
class Scaled:
    """Codes [..., D, F] with a factor a matrix, float32[...]: value = code * scale_inv."""

    code: jax.Array
    scale_inv: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.code.shape

    @property
    def size(self) -> int:
        return self.code.size

    def __getitem__(self, index: Any) -> "Scaled":
        """Matrices of a stack, by an index of its stack axes."""
        return Scaled(self.code[index], self.scale_inv[index])


def is_scaled(x: Any) -> bool:
    """For tree functions: a Scaled is one leaf."""
    return isinstance(x, Scaled)


@singledispatch
def decode(x: Any) -> Any:
    """The value of a Scaled in float32, on the host if its arrays are NumPy's; of an array, itself."""
    return x


@decode.register
def _(x: Scaled) -> Any:
    return x.code.astype(jnp.float32) * per_matrix(x.scale_inv)


def encode(x: jax.Array, fmt: Format) -> Any:
    """x [..., D, F] in a format: a Scaled with the scale of its own amax, or an array where the format has no scale."""
    if fmt.largest is None:
        return x.astype(fmt.dtype)
    scale = scale_of(amax(x), fmt)
    return Scaled(cast(x, per_matrix(scale), fmt), 1 / scale)


def amax(x: jax.Array, axes: tuple[int, ...] | None = (-2, -1)) -> jax.Array:
    """Largest magnitude of each matrix, float32[...], or over other axes (None: all); NaN if there is one.

    Of narrow dtypes by their bits without the sign, which order as the magnitudes do, NaN above infinity: XLA:CPU
    takes the maximum of integers six times as fast as that of floats. Not of float32, which is mostly made for the
    purpose: the bits of an array have to be written down first, the floats need not.
    """
    if x.dtype.itemsize > 2:
        return jnp.abs(x).max(axes).astype(jnp.float32)
    kind, sign = {1: (jnp.uint8, 0x80), 2: (jnp.uint16, 0x8000)}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind) & kind(sign - 1)
    return jax.lax.bitcast_convert_type(bits.max(axes), x.dtype).astype(jnp.float32)


def scale_of(largest: jax.Array, fmt: Format, previous: jax.Array | float = 1.0) -> jax.Array:
    """The power of two, float32, that brings an amax just below the format's largest value.

    `previous` where the amax says nothing: zero, infinite or NaN. Exponents are bounded to +-126, so that the scale and
    its reciprocal are normal numbers.
    """
    assert fmt.largest is not None, f"{fmt.name} has no scale"
    good = jnp.isfinite(largest) & (largest > 0)
    ratio = fmt.largest / jnp.where(good, largest, 1.0).astype(jnp.float32)
    exponent = jnp.clip(jax.lax.bitcast_convert_type(ratio, jnp.int32) >> 23, 1, 253)  # biased by 127; ratio > 0
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return jnp.where(good, scale, previous)


def cast(x: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
    """x * scale as codes, rounded to nearest even; what is too large saturates, NaN stays NaN."""
    wide = x.astype(jnp.float32) * scale
    return jnp.clip(wide, -fmt.largest, fmt.largest).astype(fmt.dtype)  # type: ignore[operator]


def per_matrix(x: jax.Array) -> jax.Array:
    """A number a matrix, [...] -> [..., 1, 1]."""
    return x[..., None, None]
