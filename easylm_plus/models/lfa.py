"""Localized Filtering Attention (Yuan 2.0, Wu et al. 2023, arXiv:2311.15786, section 2.1): attention that looks
first at its neighbours.

Queries and keys do not come from the block's normed input h but from h filtered over the last few tokens; values come
from h itself. Yuan's filter is two causal convolutions of two taps, without an activation between them, a residual and
a norm of its own:

    o1[t] = W1 concat(h[t-1], h[t]) + b1          [D / 2]
    o2[t] = W2 concat(o1[t-1], o1[t]) + b2        [D]
    lfa[t] = RMSNorm(o2[t] + h[t])

A convolution of k taps is one product with a weight [k * D_in, D_out], the taps of older tokens first, so every
numerics transform applies to it as to any other matrix.

What does not exist is zero: h before the row's first token, and o1 there too (it is the *output* of the first
convolution that is padded, so o1[-1] is 0 and not b1). The same holds for padding, where this departs from the
released code: there pads flow through the filter, and a left-padded row computes other logits. And with `lfa_reset` it
holds across the start of a document in a packed row; without it, as in Yuan's own pre-training, the filter looks two
tokens back into the document before.

On a mesh the convolutions are cut over `fsdp` only: `tensor` repeats their 2 D^2 of Yuan's 18 D^2 weights a layer.

Decoding keeps the last inputs h, as many as the filter looks back, beside the keys and values.

Variants (`lfa_variant`) are the rows of the paper's Table 1: conv1, conv2, conv3 and conv7 are a single convolution
D -> D of so many taps, two_convs is Yuan's pair without the norm, yuan the whole. All have the residual; `lfa_norm`
adds the norm to any of them. ema, the moving average that the paper compares with, is in models/ema.py.

Legend: B batch, T length, R tokens that the filter looks back, D embed.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from easylm_plus.models.config import EMA_SIZE, LFA_TAPS, ModelConfig
from easylm_plus.models.norms import RMSNorm
from easylm_plus.models.weights import Projection
from easylm_plus.numerics.precision import Precision

NORM_EPS = 1e-6  # fixed in the released code, whatever the config's norm_eps


class LocalizedFilter(nn.Module):
    """h -> what queries and keys are projected from."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, h_BTD: jax.Array, segments_BT: jax.Array | None, before: int = 0) -> jax.Array:
        """h[B, before + T, D] -> [B, T, D].

        Args:
          segments_BT: the documents of h's tokens, 0 = padding; none: one document a row.
          before: so many of the tokens come before the ones asked for; when decoding, those that were kept.
        """
        c = self.config
        taps = LFA_TAPS[c.lfa_variant]
        if segments_BT is None:
            segments_BT = jnp.ones(h_BTD.shape[:2], jnp.int32)
        widths = [c.hidden_size] if len(taps) == 1 else [c.hidden_size // 2, c.hidden_size]
        x = h_BTD
        for i, (count, width) in enumerate(zip(taps, widths, strict=True), start=1):
            bound = (count * x.shape[-1]) ** -0.5
            conv = Projection(
                width, ("embed", None), _uniform(bound), self.precision, True, _uniform(bound), name=f"conv{i}"
            )
            x = conv(delayed(x, segments_BT, count, c.lfa_reset))
        x = (x + h_BTD)[:, before:]
        norm = c.lfa_norm or c.lfa_variant == "yuan"
        return RMSNorm(NORM_EPS, self.precision, name="output_layernorm")(x) if norm else x


def delayed(x_BTD: jax.Array, segments_BT: jax.Array, taps: int, reset: bool) -> jax.Array:
    """x[t - taps + 1], ..., x[t - 1], x[t] side by side, [B, T, taps * D]; zero where there is no such token."""
    parts = []
    for delay in range(taps - 1, -1, -1):
        shift = lambda a, delay=delay: jnp.pad(a, [(0, 0), (delay, 0)] + [(0, 0)] * (a.ndim - 2))[:, : a.shape[1]]
        before = shift(segments_BT)
        there = (before != 0) & ((before == segments_BT) | (not reset))
        parts.append(jnp.where(there[..., None], shift(x_BTD), 0))
    return jnp.concatenate(parts, axis=-1)


def nothing_kept(config: ModelConfig, rows: tuple[int, ...], dtype: DTypeLike) -> jax.Array | None:
    """What a filter keeps while decoding, before the first token: its last inputs [*rows, R, D], or the state of the
    moving average, float32[*rows, D, N]. None without a filter."""
    if config.lfa_variant == "none":
        return None
    if config.lfa_variant == "ema":
        return jnp.zeros((*rows, config.hidden_size, EMA_SIZE), jnp.float32)
    return jnp.zeros((*rows, config.lfa_reach, config.hidden_size), dtype)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound): PyTorch's default for convolutions, which the released code leaves as it is."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
