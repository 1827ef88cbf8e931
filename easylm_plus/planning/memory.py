"""An estimate of the bytes a training step needs on each device, made from shapes alone.

The state is exact. Activations are estimated from what one block keeps for its backward pass under each
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
from easylm_plus.parallel.sharding import DATA_AXES


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {human(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{human(self.total)} ({parts})"


def estimate(
    state: Any, shardings: Any, config: ModelConfig, precision: Precision, tokens: int, accumulate: int, chunk: int
) -> Memory:
    """Args: the abstract state and its shardings; `tokens` of a whole batch, in so many micro-batches; loss chunk."""
    mesh = jax.tree.leaves(shardings.params)[0].mesh.shape
    params = sharded_bytes(state.params, shardings.params)
    optimizer = sharded_bytes(state.opt_state, shardings.opt_state) + sharded_bytes(state.ema, shardings.ema)
    local = math.ceil(tokens / accumulate / math.prod(mesh[axis] for axis in DATA_AXES))
    whole, cut = kept_per_token(config, precision)
    head = config.hidden_size * config.vocab_size * 4 / mesh["tensor"]
    return Memory(
        parameters=params,
        optimizer=optimizer,
        gradients=params * (2 if accumulate > 1 else 1),  # of this micro-batch, and the sum so far
        activations=int(local * (whole + cut / mesh["tensor"])),
        # a chunk's logits, their exponentials and their gradient; the gathered head and its gradient
        loss=int(3 * min(chunk, local) * config.vocab_size * 4 / mesh["tensor"] + 2 * head),
    )


def kept_per_token(config: ModelConfig, precision: Precision) -> tuple[int, int]:
    """Bytes that the blocks keep for one token's backward pass: (on every device, cut over `tensor`)."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    own = config.num_heads * config.head_dim
    heads = own + 2 * config.num_kv_heads * config.head_dim  # q, k and v
    size = np.dtype(precision.compute).itemsize
    # residual stream and norms | q, k, v, attention, gate, up, product
    block = (4 * D * size, (heads + own + 3 * F) * size)
    kept = {"none": block, "dots": (3 * D * size, (heads + 2 * F) * size), "full": (D * size, 0)}[config.remat]
    one = (0, 0) if config.remat == "none" else block  # while it is being recomputed
    return L * kept[0] + one[0], L * kept[1] + one[1]


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
