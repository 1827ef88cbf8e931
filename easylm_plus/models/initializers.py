"""Initialisation tables: for each family, how each kind of weight starts. All are normal distributions.

embedding  the token table             residual  the matrices whose output is added to the residual stream
hidden     every other matrix          head      the output matrix of an untied model
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig

Kind = str
Table = dict[Kind, nn.initializers.Initializer]


def _deviations(embedding: float, hidden: float, residual: float, head: float) -> Table:
    normal = nn.initializers.normal
    return {
        "embedding": normal(embedding),
        "hidden": normal(hidden),
        "residual": normal(residual),
        "head": normal(head),
    }


def _llama(config: ModelConfig) -> Table:
    """Hugging Face's `initializer_range`: the papers do not give one."""
    return _deviations(0.02, 0.02, 0.02, 0.02)


def _gpt2(config: ModelConfig) -> Table:
    """GPT-2 (Radford et al. 2019, section 2.3): residual matrices scaled by 1/sqrt(number of residual layers)."""
    return _deviations(0.02, 0.02, 0.02 / math.sqrt(2 * config.num_layers), 0.02)


def _small(config: ModelConfig) -> Table:
    """sqrt(2 / (5 hidden)) (Nguyen & Salazar 2019, arXiv:1910.05895): the 0.0099 of MS-AMP's script for GPT 6.7B."""
    width = math.sqrt(2 / (5 * config.hidden_size))
    return _deviations(width, width, width / math.sqrt(2 * config.num_layers), width)


def _fan_in(config: ModelConfig) -> Table:
    """1/sqrt(hidden) everywhere: suits narrow models, for which 0.02 is far too small to start from."""
    width = 1 / math.sqrt(config.hidden_size)
    return _deviations(width, width, width / math.sqrt(2 * config.num_layers), width)


def _palm(config: ModelConfig) -> Table:
    """PaLM (arXiv:2204.02311, section 5): 1/sqrt(in) for matrices, 1 for the shared embedding, whose logits are
    scaled down instead."""
    matrix: nn.initializers.Initializer = lambda key, shape, dtype=jnp.float32: (
        jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5  # of [in, out], or of as many as there are experts
    )
    return {"embedding": nn.initializers.normal(1.0), "hidden": matrix, "residual": matrix, "head": matrix}


TABLES: dict[str, Callable[[ModelConfig], Table]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "small": _small,
    "fan_in": _fan_in,
    "palm": _palm,
}


def initializer(config: ModelConfig, kind: Kind) -> nn.initializers.Initializer:
    """The initialiser of one kind of weight; an unknown table is an error that lists the known ones."""
    if config.init not in TABLES:
        raise UserError(f"model.init = {config.init!r}: expected one of {', '.join(TABLES)}")
    return TABLES[config.init](config)[kind]
