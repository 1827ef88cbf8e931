"""Products of whole numbers with few tokens, in Pallas: for GPUs through Triton, for TPUs through Mosaic.

    int8[N, D] times packed codes uint8[F, P/4] -> int32[N, F], exact; N up to 16

A decoder's product waits for its weights, so these read them packed and take them apart on the way to the matrix units:
the four codes of a byte by four shifts, each of which meets a quarter of the activations. Byte j of block b holds the
codes of in-features 256 b + 64 q + j (packed_ternary.py), so the quarters are cut out once, before:

    y = sum_q x_q . (w >> 2 q & 3) - sum x        x_q[N, 64 b + j] = x[N, 256 b + 64 q + j]

A TPU shifts no bytes (jax #38986), so they are widened first; up to v4 it multiplies no int8 codes (jax #37367), but
in bfloat16, where all of these numbers and, in float32, their sums up to 2^24 are exact.

Not timed on a device yet, so `auto` does not choose them (choice.py).

Legend: N tokens, M those padded to a tile, D in-features, P padded in-features, F out-features.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.triton import CompilerParams

from easylm_plus.numerics.kernels.native import MOST_INPUTS
from easylm_plus.parallel.sharding import device

QUARTER, PER_BYTE = 64, 4
LEAST_ROWS = 16  # of tokens and of out-features, in a GPU's matrix units
TPU_ROWS = 32  # of int8 in a TPU's tile
TPU_BYTES = 1 << 18  # of codes at a time, so that all that is made of them fits next to the matrix units
BFLOAT16_TPUS = ("v2", "v3", "v4")
BFLOAT16_INPUTS = 2**16  # in-features: sums of code + 1, up to 2, times 128 stay within 2^24

assert MOST_INPUTS < 2**31 // 256, "sums of codes up to 2 stay below 2^31"


def quarters(x_ND: jax.Array, P: int, rows: int) -> jax.Array:
    """int8[N, D] -> [4, M, P / 4]: what each of the four shifts meets, with zeros up to M = a multiple of `rows`."""
    N, D = x_ND.shape
    x_MP = jnp.pad(x_ND, ((0, -N % rows), (0, P - D)))
    blocks = x_MP.reshape(x_MP.shape[0], -1, PER_BYTE, QUARTER)
    return blocks.transpose(2, 0, 1, 3).reshape(PER_BYTE, x_MP.shape[0], P // PER_BYTE)


def triton(x_ND: jax.Array, codes_FS: jax.Array, interpret: bool = False) -> jax.Array:
    """On an NVIDIA GPU; a program has some rows of the weights and goes through their bytes."""
    F, S = codes_FS.shape
    x_QMS = quarters(x_ND, PER_BYTE * S, LEAST_ROWS)
    M, rows = x_QMS.shape[1], 64 if F % 64 == 0 else LEAST_ROWS
    codes_FS = jnp.pad(codes_FS, ((0, -F % rows), (0, 0)))
    kernel = pl.pallas_call(
        partial(_triton_rows, steps=S // QUARTER),
        grid=(codes_FS.shape[0] // rows,),
        in_specs=[pl.BlockSpec(x_QMS.shape, lambda i: (0, 0, 0)), pl.BlockSpec((rows, S), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((M, rows), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((M, codes_FS.shape[0]), jnp.int32),
        interpret=interpret,
        compiler_params=None if interpret else CompilerParams(),  # of Triton: what says that it is to be used
    )
    return _without_ones(kernel(x_QMS, codes_FS), x_ND, F)


def _triton_rows(x_ref, w_ref, y_ref, *, steps: int) -> None:  # type: ignore[no-untyped-def]
    def step(b: jax.Array, sums: jax.Array) -> jax.Array:
        at = pl.ds(b * QUARTER, QUARTER)
        p = w_ref[:, at].astype(jnp.int32)
        for q in range(PER_BYTE):
            sums += _dot(x_ref[q, :, at], ((p >> 2 * q) & 3).astype(jnp.int8), jnp.int32)
        return sums

    y_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros(y_ref.shape, jnp.int32))


def mosaic(x_ND: jax.Array, codes_FS: jax.Array, interpret: bool = False, bfloat16: bool | None = None) -> jax.Array:
    """On a TPU; `bfloat16`: multiply in it, by default where the matrix units take no int8."""
    if bfloat16 is None:
        bfloat16 = any(name in device().device_kind for name in BFLOAT16_TPUS)
    F, S = codes_FS.shape
    assert not bfloat16 or PER_BYTE * S <= BFLOAT16_INPUTS, "sums in float32 would not be exact"
    x_QMS = quarters(x_ND, PER_BYTE * S, TPU_ROWS)
    M, rows = x_QMS.shape[1], max(128, TPU_BYTES // S // 128 * 128)  # the out-features lie along the lanes
    codes_FS = jnp.pad(codes_FS, ((0, -F % rows), (0, 0))) if rows < F else codes_FS
    rows = min(rows, F)
    kernel = pl.pallas_call(
        partial(_mosaic_rows, bfloat16=bfloat16),
        grid=(codes_FS.shape[0] // rows,),
        in_specs=[pl.BlockSpec(x_QMS.shape, lambda i: (0, 0, 0)), pl.BlockSpec((rows, S), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((M, rows), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((M, codes_FS.shape[0]), jnp.int32),
        interpret=interpret,
    )
    return _without_ones(kernel(x_QMS, codes_FS), x_ND, F)


def _mosaic_rows(x_ref, w_ref, y_ref, *, bfloat16: bool) -> None:  # type: ignore[no-untyped-def]
    p = w_ref[...].astype(jnp.int32)
    kind, sums_in = (jnp.bfloat16, jnp.float32) if bfloat16 else (jnp.int8, jnp.int32)
    sums = jnp.zeros(y_ref.shape, sums_in)
    for q in range(PER_BYTE):
        x = x_ref[q].astype(jnp.float32).astype(kind) if bfloat16 else x_ref[q]
        codes = (p >> 2 * q) & 3
        sums += _dot(x, codes.astype(jnp.float32).astype(kind) if bfloat16 else codes.astype(kind), sums_in)
    y_ref[...] = sums.astype(jnp.int32)


def _dot(x: jax.Array, codes: jax.Array, sums_in: jax.typing.DTypeLike) -> jax.Array:
    """x[M, S] . codes[F, S] -> [M, F]."""
    exact = jax.lax.Precision.DEFAULT  # of these numbers; a model may ask for more, which is for floats
    return jax.lax.dot_general(x, codes, (((1,), (1,)), ((), ())), exact, preferred_element_type=sums_in)


def _without_ones(y: jax.Array, x_ND: jax.Array, F: int) -> jax.Array:
    """Sums of code + 1 -> of the codes, of the tokens and out-features that are real."""
    return y[: x_ND.shape[0], :F] - x_ND.sum(-1, dtype=jnp.int32, keepdims=True)
