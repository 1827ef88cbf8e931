"""FP8-LM's automatic scaling: the factor mu that keeps sums of FP8 gradients from saturating in the ring's E4M3.

Each tensor's gradient is cast at mu times its scale (arXiv:2310.18313, equation 3). After a sum in which too many codes
came out as the largest one, mu is halved for the next step; after every other, it grows so as to double in 1,000 steps.

The paper allows two readings ("set to 1/2", "to 2 over the span of 1,000 training steps"). Released code has only
a fixed 1/sqrt(N); MS-AMP's unmerged pull request 140 has the rule, and reads it relatively, as here. It differs from
that in two ways. There mu is multiplied in before scales below one are inverted, and so acts inversely on amaxes above
448; here it is multiplied in last (`reduction.encode_shared`). And there mu has no bounds.
"""

import jax
import jax.numpy as jnp

SMALLEST, LARGEST = 2.0**-24, 2.0  # above 2 each rank's own cast saturates: scales leave at most a factor 2 of room


def initial_mu(ranks: int, shape: tuple[int, ...] = ()) -> jax.Array:
    """1 / sqrt(N) of so many matrices, float32: what keeps a sum of N independent gradients where one of them was."""
    return jnp.full(shape, ranks**-0.5, jnp.float32)


def update_mu(
    mu: jax.Array, saturated: jax.Array, ok: jax.Array | bool, threshold: float = 1e-5, window: int = 1000
) -> jax.Array:
    """The next step's mu, from the share of saturated codes in the sum (`reduction.ring`); as it was if not `ok`.

    `window`: steps that a doubling takes.
    """
    moved = jnp.where(saturated > threshold, mu / 2, mu * 2 ** (1 / window))
    return jnp.where(ok, jnp.clip(moved, SMALLEST, LARGEST), mu)
