"""The dense feed-forward half of a block.

Gated: down(act(gate(x)) * up(x)), SwiGLU where act is silu (Shazeer 2020, arXiv:2002.05202). Not gated, as in GPT:
down(act(up(x))). Hugging Face's names.

Legend: B batch, T length, D embed, F ffn.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from easylm_plus.models.config import ModelConfig
from easylm_plus.models.initializers import initializer
from easylm_plus.models.norms import norm
from easylm_plus.models.weights import Projection
from easylm_plus.numerics.precision import Precision
from easylm_plus.parallel.sharding import constrain


def gelu_tanh(x: jax.Array) -> jax.Array:
    """x (1 + tanh u) / 2, u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016, arXiv:1606.08415), as the sigmoid
    that it is: one written with tanh XLA:GPU fuses into an FP8 product, which it then cannot emit (jax 0.12)."""
    return x * nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,  # Switch
    "relu2": lambda x: jax.numpy.square(nn.relu(x)),  # So et al. 2021, arXiv:2109.08668; BitNet b1.58 2B4T
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": gelu_tanh,  # GPT-2 and GPT-3
}


class FeedForward(nn.Module):
    """Two matrices, or three with a gate."""

    config: ModelConfig
    precision: Precision

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B, T, D] -> [B, T, D]."""
        c, p = self.config, self.precision
        wide: Any = {"axes": ("embed", "mlp"), "kernel_init": initializer(c, "hidden"), "precision": p}
        wide |= {"features": c.intermediate_size, "use_bias": c.mlp_bias}
        gate = Projection(name="gate_proj", **wide)(x_BTD) if c.gated else None
        up = Projection(name="up_proj", **wide)(x_BTD)
        h_BTF = constrain(activated(c.activation, gate, up), "batch", "length", "act_mlp")
        if c.sub_norms:
            h_BTF = norm(c, p, name="ffn_sub_norm")(h_BTF)
        down = Projection(
            x_BTD.shape[-1], ("mlp", "embed"), initializer(c, "residual"), p, c.mlp_bias, name="down_proj"
        )
        return constrain(down(h_BTF), "batch", "residual", "act_embed")


@partial(jax.checkpoint, static_argnums=0)
def activated(name: str, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """act(gate) * up, or act(up). The backward pass takes the activation again: keeping it costs more wide arrays."""
    act = ACTIVATIONS[name]
    return act(up) if gate is None else act(gate) * up
