"""The filter that Yuan 2.0's Table 1 compares with: the multi-dimensional damped moving average of MEGA (Ma et al.
2022, arXiv:2209.10655, sections 3.1 and 3.2). Queries and keys come from z, values from the block's normed input x:

    h[t] = sigmoid(delta) beta x[t] + (1 - sigmoid(delta) sigmoid(alpha)) h[t-1]       [D, N], h[-1] = 0
    z[t] = silu(sum_n gamma h[t] / sqrt(N) + omega x[t])                               [D]

Every channel of x thus runs through N = 16 averages of its own. delta, alpha, beta and gamma are [D, N], omega is [D];
names, the factor 1/sqrt(N) and the initialisation are those of MEGA's released code (the paper's alpha is the sigmoid
of the code's delta, and the other way round): delta and alpha N(0, 0.2), beta 1, -1, 1, ... + N(0, 0.02), gamma and
omega N(0, 1). N = 16 is not in Yuan's paper; with it the paper's count of parameters comes out.

How. Rows are cut into chunks of 32 tokens. Within a chunk z's sum is one product with the [32, 32] lower triangle of
the averages' response; what a chunk leaves behind is a state [D, N], and only those run through a scan. Prefill and
decoding are the same code, with another state to start from. On 2 cores, gradient included, [2, 512, 768]: 41 ms this
way, 59 by FFT (the released code), 132 token by token, 381 by an associative scan of all tokens; [8, 256, 128] on one
core: 4.4, 5.9, 29 and 119 ms. All in float32: products of decays lose too much in 16 bits.

Padding is zero, so a left-padded row computes what it does without. A packed row is one sequence: the average runs on
from a document into the next, and `lfa_reset`, which would stop it, is refused (models/config.py).

Legend: B batch, T length, D embed, N averages of a channel, C tokens of a chunk, S chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from easylm_plus.models.config import EMA_SIZE, ModelConfig
from easylm_plus.models.norms import RMSNorm
from easylm_plus.models.weights import fetch
from easylm_plus.numerics.precision import Precision
from easylm_plus.numerics.verbs import dense
from easylm_plus.parallel.sharding import constrain

CHUNK = 32
NORM_EPS = 1e-6  # as the other filters' norm
EXACT = jax.lax.Precision.HIGHEST


class Averages(NamedTuple):
    """h[t] = enter x[t] + exp(log_decay) h[t-1] and y[t] = sum_n leave h[t]; each float32[D, N]."""

    enter: jax.Array
    log_decay: jax.Array
    leave: jax.Array


class DampedEMA(nn.Module):
    """x -> what queries and keys are projected from."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, state_BDN: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """x[B, T, D] -> (z[B, T, D] in x's dtype, the state float32[B, D, N] after the last token).

        Args:
          segments_BT: the documents of x's tokens, 0 = padding; none: no padding.
          state_BDN: where the averages stand before the first token; none: at 0.
        """
        B, _, D = x_BTD.shape
        delta = self._weight("delta", _normal(0.2), D, EMA_SIZE)
        alpha = self._weight("alpha", _normal(0.2), D, EMA_SIZE)
        beta = self._weight("beta", _alternating, D, EMA_SIZE)
        gamma = self._weight("gamma", _normal(1.0), D, EMA_SIZE)
        omega = self._weight("omega", _normal(1.0), D)
        # the running sum needs the whole row, which the `sequence` axis cuts
        x = constrain(x_BTD.astype(jnp.float32), "batch", None, "act_embed")
        if segments_BT is not None:
            x = jnp.where(segments_BT[..., None] != 0, x, 0)
        if state_BDN is None:
            state_BDN = jnp.zeros((B, D, EMA_SIZE), jnp.float32)
        y, state_BDN = moving_average(x, state_BDN, averages(delta, alpha, beta, gamma))
        z = jax.nn.silu(y + omega * x).astype(x_BTD.dtype)
        if self.config.lfa_norm:
            z = RMSNorm(NORM_EPS, self.precision, name="output_layernorm")(z)
        return z, state_BDN

    def _weight(self, name: str, init: nn.initializers.Initializer, *shape: int) -> jax.Array:
        return dense(fetch(self, name, init, shape, (None,) * len(shape), self.precision)).astype(jnp.float32)


def averages(delta: jax.Array, alpha: jax.Array, beta: jax.Array, gamma: jax.Array) -> Averages:
    """MEGA's four weights [D, N] as the recurrence that they describe."""
    share = jax.nn.sigmoid(delta)
    # the decay 1 - product is 0 once both sigmoids round to 1, and log(0) times 0 would be NaN
    product = jnp.minimum(share * jax.nn.sigmoid(alpha), 1 - 2.0**-24)
    return Averages(share * beta, jnp.log1p(-product), gamma * delta.shape[-1] ** -0.5)


def moving_average(x_BTD: jax.Array, state_BDN: jax.Array, a: Averages) -> tuple[jax.Array, jax.Array]:
    """(y float32[B, T, D], the state [B, D, N] after the last token), from the state before the first."""
    B, T, D = x_BTD.shape
    if T > CHUNK and (rest := T % CHUNK):
        y, state_BDN = moving_average(x_BTD[:, :-rest], state_BDN, a)
        last, state_BDN = moving_average(x_BTD[:, -rest:], state_BDN, a)
        return jnp.concatenate([y, last], axis=1), state_BDN
    C = min(T, CHUNK)
    S, N = T // C, a.enter.shape[1]
    decays = jnp.exp(a.log_decay[..., None] * jnp.arange(C + 1))  # [D, N, C + 1]: the first is 1
    response = (decays[..., :C] * (a.enter * a.leave)[..., None]).sum(1)
    age = jnp.arange(C)[:, None] - jnp.arange(C)  # of the chunk's tokens (columns), as each token (rows) sees them
    within = jnp.where(age >= 0, response[:, jnp.maximum(age, 0)], 0)  # [D, C, C]
    left = a.enter[..., None] * decays[..., C - 1 :: -1]  # [D, N, C]: what a token adds to the state after its chunk
    x_DCX = x_BTD.reshape(B * S, C, D).transpose(2, 1, 0)  # X = B S, merged: XLA:CPU is fast on single-axis products
    both = jnp.einsum("dtc,dcx->dtx", jnp.concatenate([within, left], axis=1), x_DCX, precision=EXACT)
    sums_SDNB = jnp.moveaxis(both[:, C:].reshape(D, N, B, S), 3, 0)
    step = lambda h, added: (h * decays[..., C, None] + added, h)
    state_DNB, before_SDNB = jax.lax.scan(step, state_BDN.transpose(1, 2, 0), sums_SDNB)
    before = jnp.moveaxis(before_SDNB, 0, 3).reshape(D, N, B * S)
    carried = jnp.einsum("dnc,dnx->dcx", decays[..., 1:] * a.leave[..., None], before, precision=EXACT)
    y_BTD = (both[:, :C] + carried).transpose(2, 1, 0).reshape(B, T, D)
    return y_BTD, state_DNB.transpose(2, 0, 1)


def _normal(std: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(std)


def _alternating(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """1, -1, 1, -1, ... plus a little noise: more stable, says the released code."""
    return (1 - 2 * (jnp.arange(shape[-1]) % 2) + 0.02 * jax.random.normal(key, shape)).astype(dtype)
