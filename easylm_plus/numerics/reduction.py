"""Sums of FP8 gradients over devices, one byte an element on the wire. To be called inside a manual region.

Every rank has a matrix of partial sums. All agree on one scale from the largest amax and cast once (`encode_shared`);
the codes are then added in one of two ways (whole matrices by their owners, `owned_sum_of_slot`, as in the first):

- `two_shot`: each rank is sent all codes of its piece, adds them in float32, and rounds the sum to E4M3 with a scale
  of its own. Two roundings, however many ranks there are; the sum of up to 73 is exact, codes being multiples of 2^-9
  up to 448. (ColossalAI, pull requests 5886 and 5996, adds FP8 gradients so.)
- `ring`: FP8-LM's way (arXiv:2310.18313, equations 3-6). The sum travels from rank to rank and is rounded to E4M3 at
  every hop, in the scale it began with; so that it does not saturate, codes are made smaller by a factor mu
  (`auto_scaling.py`).

In both, a rank of N sends n (N - 1) / N bytes of n elements; and where the result is cut over C ranks only, with
copies on R = N / C each, it then sends its piece to those, n (R - 1) / N more. (A float32 all-reduce takes
8 n (N - 1) / N.) Beside codes a number a matrix is reduced: an amax, or a count of saturated codes.

Where the amax is infinite or NaN on any rank, `scale_inv` is NaN on all: decoded values then are NaN everywhere, and
the step is skipped everywhere. (Codes alone would not tell: casts saturate.)

Arguments, the same throughout:
    axes    mesh axes that the sum runs over
    cut     those of `axes` that cut the result, in the order of its PartitionSpec; the others end with copies
    dim     side of the matrix that `cut` cuts, -2 or -1
    others  mesh axes that cut the matrix without being summed over (`tensor`): its parts share one scale
Legend: `...` stack axes, each matrix with a scale of its own; D and F its sides, P elements of a piece.
"""

import jax
import jax.numpy as jnp

from easylm_plus.numerics.formats import E4M3, Scaled, amax, cast, per_matrix, scale_of
from easylm_plus.parallel import collectives
from easylm_plus.parallel.collectives import ranks

_LARGEST_CODE = 126  # +-448 without its sign; 127 is NaN


def encode_shared(x: jax.Array, axes: tuple[str, ...], mu: jax.Array | float = 1.0) -> Scaled:
    """x [..., D, F] as E4M3 codes with the scale of the largest amax over `axes`, times mu, float32[...].

    For a sum `axes` are all that the matrix is spread over, (*axes, *others).
    """
    largest = collectives.largest(amax(x), axes)
    scale = scale_of(largest, E4M3) * mu
    return Scaled(cast(x, per_matrix(scale), E4M3), jnp.where(jnp.isfinite(largest), 1 / scale, jnp.nan))


def two_shot(
    local: Scaled, axes: tuple[str, ...], cut: tuple[str, ...] = (), dim: int = -2, others: tuple[str, ...] = ()
) -> Scaled:
    """Sum over the ranks of what `encode_shared` gave: this rank's block of [..., D, F], in E4M3."""
    copies = _copies(axes, cut)
    piece = owned_sum(local, axes, cut, dim)[..., None, :] * per_matrix(local.scale_inv)
    total = encode_shared(piece, (*axes, *others))
    return Scaled(collectives.join(total.code[..., 0, :], copies, _block(local, cut, dim)), total.scale_inv)


def owned_sum(local: Scaled, axes: tuple[str, ...], cut: tuple[str, ...] = (), dim: int = -2) -> jax.Array:
    """Sum of the codes of this rank's piece, float32[..., P], not yet multiplied by scale_inv.

    Where all axes cut, the piece is the rank's block [..., D / N, F], or [..., D, F / N], flattened.
    """
    copies = _copies(axes, cut)
    chunks = collectives.split(local.code, ranks(cut), ranks(copies), dim)
    return collectives.exchange(chunks, (*cut, *copies)).astype(jnp.float32).sum(0)


def owned_sum_of_slot(slot: Scaled, axis: str) -> Scaled:
    """Sum over the ranks of what `encode_shared` gave of N matrices by owner, [N, D, F] (parallel/zero.py): that of the
    rank's own, [1, D, F], in E4M3. It has the matrix whole, so it needs no other for the scale of the sum."""
    codes = collectives.exchange(slot.code, axis).astype(jnp.float32).sum(0, keepdims=True)
    own = slot.scale_inv[jax.lax.axis_index(axis)]
    return encode_shared(codes * own, ())


def ring(
    local: Scaled, axes: tuple[str, ...], cut: tuple[str, ...] = (), dim: int = -2, others: tuple[str, ...] = ()
) -> tuple[Scaled, jax.Array]:
    """As `two_shot`, but added hop by hop in E4M3; and the share of the sum's codes that are +-448, float32[...]."""
    copies = _copies(axes, cut)
    around, n = (*cut, *copies), ranks(axes)
    chunks = collectives.split(local.code, ranks(cut), ranks(copies), dim)
    own = jax.lax.axis_index(around) if around else 0

    def chunk(number: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(chunks, number % n, keepdims=False)

    def hop(t: int, travelling: jax.Array) -> jax.Array:
        arrived = collectives.pass_on(travelling, around)
        return _add(arrived, chunk(own - 2 - t))

    piece = chunk(own - 1)
    for t in range(n - 1):  # not a loop of the program: XLA:CPU mixes up the hops of several rings then (jax 0.12)
        piece = hop(t, piece)  # the chunk of number `own` arrives last
    magnitude = jax.lax.bitcast_convert_type(piece, jnp.uint8) & 0x7F
    saturated = (magnitude == _LARGEST_CODE).sum(-1).astype(jnp.float32)
    elements = local.code.shape[-2] * local.code.shape[-1] * ranks(others)
    share = jax.lax.psum(saturated, (*axes, *others)) / elements
    return Scaled(collectives.join(piece, copies, _block(local, cut, dim)), local.scale_inv), share


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return cast(a.astype(jnp.float32) + b.astype(jnp.float32), jnp.float32(1), E4M3)


def _copies(axes: tuple[str, ...], cut: tuple[str, ...]) -> tuple[str, ...]:
    assert set(cut) <= set(axes), f"the sum over {axes} cannot be cut over {cut}"
    return tuple(axis for axis in axes if axis not in cut)


def _block(local: Scaled, cut: tuple[str, ...], dim: int) -> tuple[int, int]:
    sides = list(local.shape[-2:])
    sides[dim % len(local.shape) - len(local.shape)] //= ranks(cut)
    return sides[0], sides[1]
