"""An estimate of the bytes a training step needs on each device, made from shapes alone.

State and gradients are exact. Activations are estimated from what one block keeps for its backward pass under each
remat policy, in the compute dtype; workspace of the compiler is not counted, so the compiled program's own figure
(`memory_analysis`) can be larger.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics.precision import Precision


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {human(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{human(self.total)} ({parts})"


def estimate(
    state: Any, shardings: Any, config: ModelConfig, precision: Precision, tokens: int, chunk: int, devices: int
) -> Memory:
    """Args: the abstract state and its shardings; `tokens` of one micro-batch over all devices; loss chunk."""
    params = sharded_bytes(state.params, shardings.params)
    optimizer = sharded_bytes(state.opt_state, shardings.opt_state) + sharded_bytes(state.ema, shardings.ema)
    local = math.ceil(tokens / devices)
    return Memory(
        parameters=params,
        optimizer=optimizer,
        gradients=params,
        activations=local * kept_per_token(config, precision),
        logits=3 * min(chunk, local) * config.vocab_size * 4,  # logits, their exponentials, their gradient
    )


def kept_per_token(config: ModelConfig, precision: Precision) -> int:
    """Bytes that the blocks keep for one token's backward pass."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    own = config.num_heads * config.head_dim
    matmul_outputs = heads + 2 * D + 2 * F  # qkv, o, gate, up, down
    per_block = {
        "none": 2 * D + 2 * D + heads + own + 3 * F,  # norms, residual, qkv, attention, gate/up/product
        "dots": D + matmul_outputs,
        "full": D,
    }[config.remat]
    size = np.dtype(precision.compute).itemsize
    one_block = (4 * D + heads + own + 4 * F) * size  # while it is being recomputed
    return L * per_block * size + (0 if config.remat == "none" else one_block)


def sharded_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree on one device."""
    shard = lambda x, s: math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    return sum(jax.tree.leaves(jax.tree.map(shard, tree, shardings)))


def human(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
