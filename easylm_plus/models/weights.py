"""How a module gets at its weights, and the layers that are nothing but a weight and a verb."""

from typing import Any

import jax
from flax import linen as nn

from easylm_plus.numerics import leaves  # noqa: F401 what checkpoints hold has to be known wherever there is a model
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
    """A table [V, D] of tokens or of positions; that of tokens is also the head of a tied model, transposed."""

    rows: int
    features: int
    kernel_init: nn.initializers.Initializer
    precision: Precision
    axes: tuple[str | None, str | None] = ("vocab", "embed")

    def setup(self) -> None:
        shape = (self.rows, self.features)
        self.embedding = fetch(self, "embedding", self.kernel_init, shape, self.axes, self.precision)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int[...] -> [..., D] in the compute dtype."""
        return lookup(ids, self.embedding, self.precision.compute, self.axes[0])

    def attend(self, x: jax.Array) -> jax.Array:
        """x[..., D] -> [..., V]."""
        return unembed(x, self.embedding)


class Experts(nn.Module):
    """One matrix an expert, W[E, in, out]. Only hands the weight out: rows have to be sorted before they meet it."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    kernel_init: nn.initializers.Initializer
    precision: Precision

    @nn.compact
    def __call__(self) -> Any:
        """The leaf."""
        return fetch(self, "kernel", self.kernel_init, self.shape, self.axes, self.precision)
