"""Normalisation, in float32 whatever x is.

In half precision the mean of squares loses what the model needs: EasyLM's users saw a loss of 2.0 for 0.12.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from easylm_plus.models.config import ModelConfig
from easylm_plus.models.weights import fetch
from easylm_plus.numerics.precision import Precision


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> the same shape and dtype."""
        weight = fetch(self, "weight", nn.initializers.ones, (x.shape[-1],), (None,), self.precision)
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return (f * weight.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float
    precision: Precision
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> the same shape and dtype."""
        D = x.shape[-1]
        weight = fetch(self, "weight", nn.initializers.ones, (D,), (None,), self.precision)
        f = x.astype(jnp.float32)
        f = f - jnp.mean(f, axis=-1, keepdims=True)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        f = f * weight.astype(jnp.float32)
        if self.use_bias:
            f = f + fetch(self, "bias", nn.initializers.zeros, (D,), (None,), self.precision).astype(jnp.float32)
        return f.astype(x.dtype)


def norm(config: ModelConfig, precision: Precision, name: str | None = None) -> nn.Module:
    """The norm that the config names."""
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, precision, name=name)
    return LayerNorm(config.norm_eps, precision, use_bias=config.norm == "layer", name=name)
