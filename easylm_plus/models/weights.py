"""How a module gets at its weights, and the two layers that are nothing but a weight and a verb."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from easylm_plus.numerics.precision import Precision
from easylm_plus.numerics.verbs import lookup, project, unembed

Axes = tuple[str | None, ...]


class MissingWeight(KeyError):
    """The parameter tree lacks a weight that the model needs."""

    def __str__(self) -> str:
        return str(self.args[0])


def fetch(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: Axes,
    precision: Precision,
) -> Any:
    """The weight `name` as it lies in the tree: a plain array, or whatever leaf a transform made of it.

    `module.param` would check its shape against the initialiser's, which a packed leaf does not have; so only
    initialisation goes that way. There the logical axes are boxed around the array, to be read off once.
    """
    if module.is_initializing():
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, precision.param)
    if not module.has_variable("params", name):
        raise MissingWeight(f"the parameters have no weight {'/'.join((*module.path, name))} {shape}")
    return module.get_variable("params", name)


class Projection(nn.Module):
    """y = x W (+ b), with W[in, out] found in the tree. Every matrix of the model goes through here."""

    features: int
    axes: tuple[str | None, str | None]
    kernel_init: nn.initializers.Initializer
    precision: Precision
    use_bias: bool = False
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[..., in] -> [..., out]."""
        kernel = fetch(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes, self.precision)
        y = project(x, kernel)
        if self.use_bias:
            bias = fetch(self, "bias", self.bias_init, (self.features,), self.axes[1:], self.precision)
            y = y + bias.astype(y.dtype)
        return y


class Embedding(nn.Module):
    """The token table [V, D]; also the head of a tied model, transposed."""

    vocab_size: int
    features: int
    kernel_init: nn.initializers.Initializer
    precision: Precision

    def setup(self) -> None:
        shape = (self.vocab_size, self.features)
        self.embedding = fetch(self, "embedding", self.kernel_init, shape, ("vocab", "embed"), self.precision)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int[...] -> [..., D] in the compute dtype."""
        return lookup(ids, self.embedding, self.precision.compute)

    def attend(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> [..., V]."""
        return unembed(x, self.embedding)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467), in float32 whatever x is.

    In half precision the mean of squares loses what the model needs: EasyLM's users saw a loss of 2.0 for 0.12.
    """

    eps: float
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> the same shape and dtype."""
        weight = fetch(self, "weight", nn.initializers.ones, (x.shape[-1],), (None,), self.precision)
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return (f * weight.astype(jnp.float32)).astype(x.dtype)
