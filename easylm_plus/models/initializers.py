"""Initialisation tables: for each family, the standard deviation of each kind of weight. All are normal.

embedding  the token table             residual  the matrices whose output is added to the residual stream
hidden     every other matrix          head      the output matrix of an untied model
"""

import math
from collections.abc import Callable

from flax import linen as nn

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig

Kind = str


def _llama(config: ModelConfig) -> dict[Kind, float]:
    """Hugging Face's `initializer_range`: the papers do not give one."""
    return dict.fromkeys(("embedding", "hidden", "residual", "head"), 0.02)


def _gpt2(config: ModelConfig) -> dict[Kind, float]:
    """GPT-2 (Radford et al. 2019, section 2.3): residual matrices scaled by 1/sqrt(number of residual layers)."""
    return {**_llama(config), "residual": 0.02 / math.sqrt(2 * config.num_layers)}


def _fan_in(config: ModelConfig) -> dict[Kind, float]:
    """1/sqrt(hidden) everywhere: suits narrow models, for which 0.02 is far too small to start from."""
    width = 1 / math.sqrt(config.hidden_size)
    residual = width / math.sqrt(2 * config.num_layers)
    return {"embedding": width, "hidden": width, "residual": residual, "head": width}


TABLES: dict[str, Callable[[ModelConfig], dict[Kind, float]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "fan_in": _fan_in,
}


def initializer(config: ModelConfig, kind: Kind) -> nn.initializers.Initializer:
    """The initialiser of one kind of weight; an unknown table is an error that lists the known ones."""
    if config.init not in TABLES:
        raise UserError(f"model.init = {config.init!r}: expected one of {', '.join(TABLES)}")
    return nn.initializers.normal(TABLES[config.init](config)[kind])
