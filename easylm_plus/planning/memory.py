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
    whole, cut = kept_per_token(config, precision, mesh["expert"])
    head = config.hidden_size * config.vocab_size * 4 / mesh["tensor"]
    return Memory(
        parameters=params,
        optimizer=optimizer,
        gradients=params * (2 if accumulate > 1 else 1),  # of this micro-batch, and the sum so far
        activations=int(local * (whole + cut / mesh["tensor"])),
        # a chunk's logits, their exponentials and their gradient; the gathered head and its gradient
        loss=int(3 * min(chunk, local) * config.vocab_size * 4 / mesh["tensor"] + 2 * head),
    )


def kept_per_token(config: ModelConfig, precision: Precision, expert_axis: int = 1) -> tuple[int, int]:
    """Bytes that the blocks keep for one token's backward pass: (on every device, cut over `tensor`)."""
    c, D, L = config, config.hidden_size, config.num_layers
    own = c.num_heads * c.head_dim
    heads = own + 2 * c.num_kv_heads * c.head_dim  # q, k and v
    wide = (2 if c.gated else 1) * c.intermediate_size  # gate and up
    size = np.dtype(precision.compute).itemsize
    # experts have rows for all choices of the tokens that their axis brings together; these are never kept as "dots"
    rows = c.experts_per_token * expert_axis if c.num_experts else 1
    sorted_rows = (expert_axis + 2 * rows) * D if c.num_experts else 0
    # residual stream and norms | q, k, v, attention, gate, up, product
    block = (4 * D + sorted_rows, heads + own + rows * (wide + c.intermediate_size))
    dots = (3 * D, heads + (0 if c.num_experts else wide))
    kept = {"none": block, "dots": dots, "full": (D, 0)}[c.remat]
    one = (0, 0) if c.remat == "none" else block  # while it is being recomputed
    return size * (L * kept[0] + one[0]), size * (L * kept[1] + one[1])


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
