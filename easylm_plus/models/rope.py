"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in Hugging Face's half-split layout.

Feature i of a head is paired with feature i + K/2, and the pair turns by position * frequency_i. Meta's original
checkpoints pair neighbours instead; importing those permutes the columns of q_proj and k_proj once.

Legend: B batch, T length, N heads, K head_dim, R features of a head that turn.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.models.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position, float32[R/2] of R turning features, after the scaling that the config names.

    linear  positions divided by the factor (Chen et al. 2023, arXiv:2306.15595)
    ntk     theta raised so that the slowest pair is stretched by the factor and the fastest not at all
    llama3  slow pairs divided by the factor, fast ones kept, a ramp between (Llama 3.1's released code)
    """
    half = config.rotary_dim // 2
    theta = config.rope_theta
    if config.rope_scaling == "ntk":
        theta *= config.rope_factor ** (config.rotary_dim / (config.rotary_dim - 2))
    freqs = theta ** -(np.arange(half, dtype=np.float64) / half)
    if config.rope_scaling == "linear":
        freqs = freqs / config.rope_factor
    elif config.rope_scaling == "llama3":
        freqs = _llama3(freqs, config)
    return freqs.astype(np.float32)


def _llama3(freqs: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Pairs are told apart by how often they turn within the original context length."""
    turns = config.rope_original_length * freqs / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: fully divided, 1: untouched
    return keep * freqs + (1 - keep) * freqs / config.rope_factor


def rotations(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32[B, T, 1, R/2], for all layers at once.

    With `rope_dtype` bfloat16 all of frequencies, positions, angles, cosines and sines are rounded to it, as Yuan 2.0's
    released code does: its weights were made with them. Positions beyond 256 are then not told apart one by one.
    """
    # a cast to bfloat16 and back would be "simplified" away by the compiler
    rounded = partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    as_named = rounded if config.rope_dtype == "bfloat16" else lambda x: x
    positions = as_named(positions_BT[..., None, None].astype(jnp.float32))
    angles = as_named(positions * as_named(jnp.asarray(frequencies(config))))
    return as_named(jnp.cos(angles)), as_named(jnp.sin(angles))


def rotate(x_BTNK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns every pair of the first R features of every head; computed in float32, returned in x's dtype.

    Written with both halves at once, x cos + swapped(x) (-sin, sin): computing the halves apart and joining them
    takes XLA:CPU a tenth of a training step longer.
    """
    R = 2 * cos.shape[-1]
    x, rest = x_BTNK[..., :R], x_BTNK[..., R:]
    partner = jnp.roll(x, R // 2, axis=-1)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    turned = (x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
