"""Whole tensors shared out over ranks: FP8-LM's ZeRO (arXiv:2310.18313, Algorithm 1).

A tensor that is scaled as a whole is easiest kept whole: its owner alone has its master weights and moments, and needs
no collective for its scale. Tensors are dealt out greedily, the largest first, each to the rank with the least so far.
(Cutting every tensor, all parts sharing one scale, is the default elsewhere in this code base: see `sharding.py`.)

All ranks run one program, so each rank's tensors lie end to end in a buffer of one static width, the largest load,
padded with zeros: [N, width], of which a rank has a row. Which tensor an element belongs to differs by rank and comes
as data, `segments`, in blocks of the greatest common divisor of all sizes: 2^20 elements for LLaMA 7B.

Legend: N ranks, W width, S blocks in a row, C tensors that a rank owns at most.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who owns what. `start`: elements of its owner's row before a tensor; `number`: tensors before it."""

    sizes: tuple[int, ...]
    owner: tuple[int, ...]
    start: tuple[int, ...]
    number: tuple[int, ...]
    load: tuple[int, ...]  # elements by rank

    @property
    def ranks(self) -> int:
        return len(self.load)

    @property
    def width(self) -> int:
        return max(self.load)

    @property
    def most(self) -> int:
        """C, the largest number of tensors that a rank owns."""
        return max(self.number, default=-1) + 1

    @property
    def block(self) -> int:
        """Elements that certainly belong to one tensor: every size is a multiple."""
        return math.gcd(*self.sizes)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean: the share of padding that buffers carry, plus one."""
        return self.width * self.ranks / sum(self.load)


def plan(sizes: Sequence[int], ranks: int, before: Sequence[int] | None = None) -> Plan:
    """Algorithm 1 for tensors of these numbers of elements; `before`: what each rank owns already, from other groups.

    Equal tensors are dealt in the released code's order: i = 0, N, 2N, ..., 1, N + 1, ... (not that of the paper,
    which does not say).
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i % ranks))
    total = list(before) if before is not None else [0] * ranks
    load, count = [0] * ranks, [0] * ranks
    owner, start, number = ([0] * len(sizes) for _ in range(3))
    for i in order:
        rank = total.index(min(total))
        owner[i], start[i], number[i] = rank, load[rank], count[rank]
        total[rank] += sizes[i]
        load[rank] += sizes[i]
        count[rank] += 1
    return Plan(tuple(sizes), tuple(owner), tuple(start), tuple(number), tuple(load))


def pack(plan: Plan, tensors: Sequence[jax.Array]) -> jax.Array:
    """Tensors of the plan's sizes, of one dtype -> [N, W]."""
    dtype = tensors[0].dtype
    rows = []
    for rank in range(plan.ranks):
        owned = sorted((plan.start[i], i) for i in range(len(plan.sizes)) if plan.owner[i] == rank)
        parts = [tensors[i].reshape(plan.sizes[i]) for _, i in owned]
        rows.append(jnp.concatenate([*parts, jnp.zeros(plan.width - plan.load[rank], dtype)]))
    return jnp.stack(rows)


def unpack(plan: Plan, packed: jax.Array) -> list[jax.Array]:
    """[N, W], whole on every device -> tensors, flat."""
    where = zip(plan.owner, plan.start, plan.sizes, strict=True)
    return [jax.lax.slice_in_dim(packed[rank], start, start + size) for rank, start, size in where]


def segments(plan: Plan) -> np.ndarray:
    """For each block of each row, which of its rank's tensors it belongs to: int32[N, S], C for padding."""
    ids = np.full((plan.ranks, plan.width // plan.block), plan.most, np.int32)
    for rank, start, size, number in zip(plan.owner, plan.start, plan.sizes, plan.number, strict=True):
        ids[rank, start // plan.block : (start + size) // plan.block] = number
    return ids


def amax_of_segments(row: jax.Array, ids: jax.Array, most: int) -> jax.Array:
    """Largest magnitude of each tensor of a row [W] whose blocks are those of ids [S], float32[C]; 0 where is none."""
    of_blocks = jnp.abs(row).reshape(len(ids), -1).max(1).astype(jnp.float32)
    return jax.ops.segment_max(of_blocks, ids, most + 1)[:most].clip(0)  # the maximum of nothing is -inf


def spread(values: jax.Array, ids: jax.Array, width: int) -> jax.Array:
    """A value a tensor, [C], to every element of a row, [W]; 0 to padding."""
    return jnp.repeat(jnp.append(values, 0)[ids], width // len(ids), total_repeat_length=width)


def of_tensors(plan: Plan, values: jax.Array) -> jax.Array:
    """Values [N, C] of every rank's tensors -> in the order of the tensors."""
    return values[np.array(plan.owner), np.array(plan.number)]
