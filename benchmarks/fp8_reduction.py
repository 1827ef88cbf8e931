"""How exact a sum of FP8 gradients over N ranks is: FP8-LM's ring, with several mu, against two shots.

    python benchmarks/fp8_reduction.py

Ranks are simulated by `vmap`, with the functions that training calls. Gradients are N(0, 1), any two ranks' with a
correlation of 0 or 0.64 (0.8 of a common one and 0.6 of their own). The error is the root mean square over that of the
exact sum. It depends on where the largest gradient lies between two powers of two, as scales are powers of two; so it
is measured at four magnitudes over an octave, and given as the mean with the least and the largest.

Columns of the ring, by mu: 1/N (pre-scaling), 1 (post-scaling), 1/sqrt N (MS-AMP's released code), `rule` (what
`auto_scaling` holds it at: between half and all of the largest mu at which no code saturates), `best` (that of the
least error at each magnitude, which nobody knows beforehand). `tree` adds in pairs, pairs of pairs, ...: log2(N)
roundings, the fewest that an all-reduce in FP8 can have; at its best mu. `stored` is the sum as two shots leave it, in
E4M3; `owner` before that is rounded.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from easylm_plus.numerics.formats import E4M3, Scaled, amax, cast, decode, scale_of
from easylm_plus.numerics.reduction import encode_shared, owned_sum, ring, two_shot

RANKS, CORRELATIONS, SHAPE = (8, 32, 128), (0.0, 0.64), (128, 128)
AXES = ("ranks",)
MAGNITUDES = 2.0 ** (np.arange(4) / 4)
MUS = 2.0 ** (-np.arange(21) / 2)  # 1 to 2^-10
COLUMNS = ("1/N", "1", "1/sqrt N", "rule", "best", "tree, best", "stored", "owner")


def gradients(ranks: int, correlation: float, magnitude: float) -> jax.Array:
    """float32[N, D, F]."""
    common, own = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((SHAPE, (ranks, *SHAPE))))
    return magnitude * (correlation**0.5 * common + (1 - correlation) ** 0.5 * own)


def error(total: jax.Array, g: jax.Array) -> jax.Array:
    exact = g.sum(0)
    return jnp.sqrt(jnp.mean((total.reshape(exact.shape) - exact) ** 2) / jnp.mean(exact**2))


def by_ring(g: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(error, share of saturated codes)."""
    total, share = jax.vmap(lambda x: ring(encode_shared(x, AXES, mu), AXES), axis_name="ranks")(g)
    return error(decode(Scaled(total.code[0], total.scale_inv[0])), g), share[0]


def by_tree(g: jax.Array, mu: jax.Array) -> jax.Array:
    """Error."""
    scale = scale_of(amax(g).max(), E4M3) * mu
    code = cast(g, scale, E4M3)
    while len(code) > 1:
        code = cast(code[0::2].astype(jnp.float32) + code[1::2].astype(jnp.float32), jnp.float32(1), E4M3)
    return error(code.astype(jnp.float32) / scale, g)


def by_two_shot(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Errors as stored, and of the owner."""

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        local = encode_shared(x, AXES)
        return decode(two_shot(local, AXES)), owned_sum(local, AXES, AXES) * local.scale_inv

    stored, owned = jax.vmap(both, axis_name="ranks")(g)
    return error(stored[0], g), error(owned, g)


@jax.jit
def errors(g: jax.Array) -> tuple[jax.Array, ...]:
    """COLUMNS for gradients [N, D, F]."""
    of_ring, saturated = jax.lax.map(lambda mu: by_ring(g, mu), jnp.asarray(MUS, jnp.float32))
    of_tree = jax.lax.map(lambda mu: by_tree(g, mu), jnp.asarray(MUS, jnp.float32))
    at = lambda mu: by_ring(g, jnp.float32(mu))[0]
    top = jnp.asarray(MUS)[jnp.argmax(saturated <= 1e-5)]  # the first, as they fall
    held = (jnp.asarray(MUS) <= top) & (jnp.asarray(MUS) > top / 2)
    stored, owner = by_two_shot(g)
    return (
        at(1 / len(g)), at(1), at(len(g) ** -0.5), jnp.sum(of_ring * held) / held.sum(), of_ring.min(), of_tree.min(),
        stored, owner,
    )  # fmt: skip


def main(_: list[str]) -> None:
    print(f"| N, correlation | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for ranks in RANKS:
        for correlation in CORRELATIONS:
            found = np.array([errors(gradients(ranks, correlation, magnitude)) for magnitude in MAGNITUDES])
            means, least, most = found.mean(0), found.min(0), found.max(0)
            cells = [f"{m:.3f} ({a:.3f}–{b:.3f})" for m, a, b in zip(means, least, most)]
            print(f"| {ranks}, {correlation:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
