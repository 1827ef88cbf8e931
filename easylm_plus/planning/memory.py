"""An estimate of the bytes a training step needs on each device, made from shapes alone.

What is kept between steps is exact, and so are the copies of weights and the gradients that a step makes. Activations
are estimated from what one block keeps for its backward pass under each remat policy: in the compute dtype, or as the
codes of a byte that an FP8 or ternary product has made of its input. Workspace of the compiler is not counted, so the
compiled program's own figure (`memory_analysis`) can be larger.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics import handles
from easylm_plus.numerics.formats import E4M3, FORMATS
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.levels import PLAIN
from easylm_plus.numerics.precision import Precision
from easylm_plus.parallel.sharding import DATA_AXES, axes_in
from easylm_plus.tree import path_name


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int  # as they are kept
    optimizer: int
    copies: int  # weights as a step multiplies by them, where that is not as they are kept
    gradients: int  # of a micro-batch, and their sum so far
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return f"{human(self.total)} ({', '.join(f'{name} {human(size)}' for name, size in parts.items() if size)})"


def estimate(
    state: Any,
    shardings: Any,
    config: ModelConfig,
    precision: Precision,
    tokens: int,
    accumulate: int,
    chunk: int,
    numerics: Any = PLAIN,
    cut_residual: bool = False,
) -> Memory:
    """Args: the abstract state and its shardings; `tokens` of a whole batch, in so many micro-batches; loss chunk;
    the run's transforms of weights; whether `tensor` cuts the residual stream (sequence parallelism)."""
    mesh = jax.tree.leaves(shardings.params)[0].mesh.shape
    local = math.ceil(tokens / accumulate / math.prod(mesh[axis] for axis in DATA_AXES))
    kinds = ("fp8",) if numerics.warmup else ("fp8", "ternary")
    coded = {name.split("/")[-2] for name, transform in numerics.assigned.items() if transform in kinds}
    residual, whole, cut = kept_per_token(config, precision, mesh["expert"], coded)
    residual /= mesh["tensor"] if cut_residual else 1
    # the gathered head and its gradient; one that does not learn is there in the compute dtype
    sizes = (4, 4) if not numerics.adapters else (np.dtype(precision.compute).itemsize,)
    head = config.hidden_size * config.vocab_size * sum(sizes) / mesh["tensor"]
    made = made_by_a_step(state, shardings.params, numerics)
    between = (state.opt_state, state.numerics, state.ema), (shardings.opt_state, shardings.numerics, shardings.ema)
    return Memory(
        parameters=sharded_bytes(state.params, shardings.params),
        optimizer=sharded_bytes(*between),
        copies=sum(weight.copies for weight in made),
        gradients=sum(weight.gradients(accumulate) for weight in made),
        activations=int(local * (residual + whole + cut / mesh["tensor"])),
        # and a chunk's logits, their exponentials and their gradient
        loss=int(3 * min(chunk, local) * config.vocab_size * 4 / mesh["tensor"] + head),
    )


class Made(NamedTuple):
    """Bytes on one device that a step makes of and for one weight. Factors, a few bytes a matrix, are left out."""

    name: str
    copies: int  # the weight as the step multiplies by it, where that is not as it is kept
    gradient: int  # of a micro-batch
    sum: int  # of gradients

    def gradients(self, accumulate: int) -> int:
        """Of this micro-batch, and the sum so far if there are several."""
        return self.gradient + (self.sum if accumulate > 1 else 0)


def made_by_a_step(state: Any, places: Any, numerics: Any) -> list[Made]:
    """For every weight of an abstract state that lies at `places`; in the mesh's context.

    What a step makes is not cut over replicas, as masters may be.
    """
    view = jax.eval_shape(numerics.view, state.params, state.numerics)
    gradients = jax.eval_shape(lambda view: handles.gradients(handles.handles(view)), view)
    params = jax.eval_shape(numerics.named, state.params)
    weights = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_kept)]
    lie = _by_weight(places, weights)
    kept, viewed, own = (_by_weight(tree, weights) for tree in (params, view, gradients))
    codes, mesh = FORMATS[numerics.sums].dtype, jax.tree.leaves(places)[0].mesh

    def of_weight(name: str) -> Made:
        somewhere = [NamedSharding(mesh, PartitionSpec("replica"))] * len(kept[name])  # a weight that is dealt out
        masters = list(zip(kept[name], lie[name] or somewhere, strict=True))
        here = {x.shape: _on_each_replica(place) for x, place in masters}
        size = lambda x, dtype: math.prod(here[x.shape].shard_shape(x.shape)) * np.dtype(dtype).itemsize
        as_kept = {(x.shape, x.dtype) for x, place in masters if place == here[x.shape]}
        matrices = lambda leaves: [x for x in leaves if x.shape in here and len(x.shape) == len(kept[name][0].shape)]
        copies = [x for x in matrices(viewed[name]) if (x.shape, x.dtype) not in as_kept]
        master = kept[name][0]
        here_of_whole = here[master.shape].shard_shape(master.shape)  # codes of several weights a byte lie as these do
        is_kept_so = lambda x: any((x.shape, x.dtype) == (own.shape, own.dtype) for own in kept[name])
        packed = [x.size for x in viewed[name] if x.dtype == jnp.uint8 and x.ndim == master.ndim and not is_kept_so(x)]
        grads = matrices(own[name])
        sums = [codes if x.dtype == E4M3.dtype else jnp.promote_types(x.dtype, jnp.float32) for x in grads]
        return Made(
            name, sum(size(x, x.dtype) for x in copies) + sum(packed) * math.prod(here_of_whole) // master.size,
            sum(size(x, x.dtype) for x in grads), sum(map(size, grads, sums)),
        )  # fmt: skip

    return [of_weight(name) for name in weights]


def _by_weight(tree: Any, weights: Collection[str]) -> dict[str, list[Any]]:
    """The leaves that belong to each weight, those in whose path its name comes first; none if it is dealt out."""
    found: dict[str, list[Any]] = {name: [] for name in weights}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        while name and name not in found:
            name = name.rpartition("/")[0]
        if name:
            found[name].append(leaf)
    return found


def _on_each_replica(place: NamedSharding) -> NamedSharding:
    """The same without a cut over replicas."""
    rest = [tuple(axis for axis in axes_in(PartitionSpec(entry)) if axis != "replica") for entry in place.spec]
    spec = PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in rest))
    return NamedSharding(place.mesh, spec) if "replica" in axes_in(place.spec) else place


def kept_per_token(
    config: ModelConfig, precision: Precision, expert_axis: int = 1, coded: Collection[str] = ()
) -> tuple[float, int, int]:
    """Bytes that the blocks keep for one token's backward pass: (residual stream, other, of which `tensor` cuts).

    The first two are on every device of `tensor`, unless it cuts the residual stream too. `coded`: the matrices, such
    as "q_proj", whose products keep codes of a byte of their input: FP8 and ternary ones.
    """
    c, D, L = config, config.hidden_size, config.num_layers
    own = c.num_heads * c.head_dim
    heads = own + 2 * c.num_kv_heads * c.head_dim  # q, k and v
    wide = (2 if c.gated else 1) * c.intermediate_size  # gate and up
    size = np.dtype(precision.compute).itemsize
    # experts have rows for all choices of the tokens that their axis brings together; these are never kept as "dots"
    rows = c.experts_per_token * expert_axis if c.num_experts else 1
    sorted_rows = (expert_axis + 2 * rows) * D if c.num_experts else 0
    # an input of several matrices is kept once in the compute dtype, but each such product keeps codes of its own
    read_by = lambda *names: sum(name in coded for name in names) or size
    norms = read_by("q_proj", "k_proj", "qk_proj", "v_proj") + read_by("gate_proj", "up_proj")
    # attention's output is kept by attention itself, too
    attention = size + read_by("o_proj") if "o_proj" in coded else size
    inside = size * (heads + rows * wide) + attention * own + read_by("down_proj") * rows * c.intermediate_size
    block = (2 * D * size, norms * D + sorted_rows * size, inside)
    dots = (3 * D * size, 0, (heads + (0 if c.num_experts else wide)) * size)
    kept = {"none": block, "dots": dots, "full": (D * size, 0, 0)}[c.remat]
    one = (0, 0, 0) if c.remat == "none" else block  # while it is being recomputed
    residual, whole, cut = (L * a + b for a, b in zip(kept, one, strict=True))
    return residual, whole, cut


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
