"""The feed-forward half of a block: SwiGLU (Shazeer 2020, arXiv:2002.05202), down(silu(gate(x)) * up(x))."""

from typing import Any

import jax
from flax import linen as nn

from easylm_plus.models.config import ModelConfig
from easylm_plus.models.initializers import initializer
from easylm_plus.models.weights import Projection
from easylm_plus.numerics.precision import Precision
from easylm_plus.parallel.sharding import constrain


class SwiGLU(nn.Module):
    """Three matrices and a gate; Hugging Face's names."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B, T, D] -> [B, T, D]."""
        c = self.config
        wide: Any = {
            "axes": ("embed", "mlp"),
            "kernel_init": initializer(c, "hidden"),
            "precision": self.precision,
        }
        gate = Projection(c.intermediate_size, name="gate_proj", **wide)(x_BTD)
        up = Projection(c.intermediate_size, name="up_proj", **wide)(x_BTD)
        h_BTF = constrain(_gated(gate, up), "batch", "length", "act_mlp")
        down = Projection(
            x_BTD.shape[-1], ("mlp", "embed"), initializer(c, "residual"), self.precision, name="down_proj"
        )
        return constrain(down(h_BTF), "batch", "length", "act_embed")


@jax.checkpoint
def _gated(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """silu(gate) * up. The backward pass takes the sigmoid again: keeping it costs two more of the widest arrays."""
    return nn.silu(gate_BTF) * up_BTF
