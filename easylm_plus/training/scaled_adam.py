"""AdamW whose master weights and moments are narrow: FP8-LM's optimizer (Peng et al. 2023, arXiv:2310.18313, section
2.2), 6 bytes a parameter by default: FP16 master 2, E4M3 first moment 1, FP16 second moment 2, E4M3 gradient 1.

    p = dec(p) (1 - lr wd)
    m = b1 dec(m) + (1 - b1) g,   v = b2 dec(v) + (1 - b2) g^2                   in float32
    p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)                 with the m and v not yet rounded
    p, m, v stored with the scale of their own new amax, each matrix by itself

Departures from the released code (Azure/MS-AMP): FP8 gradients are clipped like all others (there the Megatron path
counts them in the norm and forgets to scale them), and the master is rounded stochastically. Rounded to nearest, an
FP16 master loses what is smaller than half its spacing, 2^-11 of the weight: weight decay of lr wd = 1e-4 altogether,
and most of Adam's updates at the end of a cosine schedule (benchmarks/master_rounding.py). Stochastic rounding keeps
both on average and costs no bytes. The moments are rounded to nearest.

Memory. A stack of layers is updated layer by layer in a loop that writes into the stacks it was given, so the float32
temporaries are those of one layer. Which weights are narrow is the caller's choice; the others have float32 moments.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from easylm_plus.errors import UserError
from easylm_plus.numerics.formats import (
    FORMATS,
    NARROW,
    WIDE,
    Format,
    Formats,
    Scaled,
    amax,
    cast,
    decode,
    is_scaled,
    per_matrix,
    scale_of,
)  # fmt: skip
from easylm_plus.parallel.collectives import as_bytes, from_bytes
from easylm_plus.parallel.zero import DEALT, Deal
from easylm_plus.training.optimizer import Metrics, Optimizer, adamw, clip_factor, decay_pattern
from easylm_plus.training.schedules import schedule
from easylm_plus.tree import path_name

FORMAT_OF = {jnp.dtype(f.dtype): f for f in FORMATS.values()}
Leaf = Any  # an array or a Scaled
Triple = tuple[Leaf, Leaf, Leaf]  # parameter, first moment, second moment


@struct.dataclass
class AdamState:
    """count int32[]: steps taken; m and v: trees like the parameters, of arrays or Scaled."""

    count: jax.Array
    m: Any
    v: Any


class Rates(NamedTuple):
    """What a step's formula takes beside p, m, v and g. Traced: rate and the corrections 1 - b^t, float32[]."""

    rate: jax.Array
    first_correction: jax.Array
    second_correction: jax.Array
    b1: float
    b2: float
    eps: float


def scaled_adamw(
    config: Mapping[str, Any],
    total_steps: int,
    narrow: Callable[[str], bool],
    formats: Formats = NARROW,
    rounding: str = "stochastic",
    seed: int = 0,
    deal: Deal | None = None,
) -> Optimizer:
    """AdamW of a config's `optimizer` section with narrow masters and moments; logs the learning rate it applied.

    narrow: whether the weight of that path is; its parameter must come as `formats.encode` stores it in
        `formats.master`, [..., D, F]. Other weights are arrays, with float32 moments.
    rounding: of masters with fewer than 32 bits, "nearest" or "stochastic" (a function of seed, step and weight,
        the same on any mesh).
    deal: whose the narrow weights are, where they are dealt out whole: trees are laid then (parallel/zero.py).
    Raises UserError in `init` for a weight that is not stored as said.
    """
    rate, pattern = schedule(config, total_steps), decay_pattern(config)

    def init(params: Any) -> AdamState:
        def moments(which: str) -> Any:
            def zeros(path: Any, p: Leaf) -> Leaf:
                name = path_name(path)
                if not (narrow(name) or name.startswith(f"{DEALT}/")):
                    return jnp.zeros(p.shape, jnp.float32)
                check_master(name, p, formats.master)
                return zeros_like(p.shape, FORMATS[which])

            return jax.tree_util.tree_map_with_path(zeros, params, is_leaf=is_scaled)

        return AdamState(jnp.zeros((), jnp.int32), moments(formats.first), moments(formats.second))

    def step(
        grads: Any, state: AdamState, params: Any, norm: jax.Array, ok: jax.Array
    ) -> tuple[Any, AdamState, Metrics]:
        t = (state.count + 1).astype(jnp.float32)
        b1, b2, applied = config["b1"], config["b2"], rate(state.count)
        rates = Rates(applied, 1 - b1**t, 1 - b2**t, b1, b2, config["eps"])
        factor = clip_factor(norm, config["clip_norm"])
        key = jax.random.fold_in(jax.random.key(seed), state.count) if rounding == "stochastic" else None
        decays = lambda name: bool(pattern.search(name))

        named, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_scaled)
        trees = [jax.tree.leaves(tree, is_leaf=is_scaled) for tree in (state.m, state.v, grads)]
        numbers = deal.number if deal else {path_name(path): number for number, (path, _) in enumerate(named)}
        new: list[Triple] = []
        for (path, p), m, v, g in zip(named, *trees, strict=True):
            name = path_name(path)
            if name in numbers:
                own = Own(float(decays(name)), numbers[name], None)
            else:
                own = of_stack(deal, name.removeprefix(f"{DEALT}/"), decays, numbers)  # type: ignore[arg-type]
            of_layer = partial(own.at, config["weight_decay"] * applied, key)
            one = partial(update, rates, factor, ok, of_layer)
            new.append(by_layer(one, (p, m, v), g, loop_axis(name, (p, m, v))))
        params, m, v = (jax.tree.unflatten(treedef, column) for column in zip(*new, strict=True))
        return params, AdamState(state.count + ok, m, v), {"learning_rate": applied}

    return Optimizer(init, step)


def make_optimizer(config: Mapping[str, Any], total_steps: int, numerics: Any, seed: int) -> Optimizer:
    """AdamW for weights kept as `numerics` says (numerics/levels.py)."""
    if numerics.formats == WIDE:
        return adamw(config, total_steps)
    return scaled_adamw(config, total_steps, numerics.narrow, numerics.formats, config["rounding"], seed, numerics.deal)


class Own(NamedTuple):
    """What a leaf's matrices have of their own: whether they decay (0 or 1), and the numbers of weight and layer that
    their random numbers come from. Of a stack that is dealt out, arrays [N, C]; else the layer is that of the loop."""

    decays: Any
    weight: Any
    layer: Any

    def at(self, decay: jax.Array, key: jax.Array | None, i: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """(factor of the masters, key or keys [N] of random numbers) of layer or slot i; None: of all at once."""
        slot = lambda x: x if i is None else jnp.asarray(x)[:, i]
        decays, weight, layer = map(slot, self) if self.layer is not None else (*self[:2], 0 if i is None else i)
        keep = 1 - decay * decays
        keep = per_matrix(keep) if jnp.ndim(keep) else keep
        if key is None:
            return keep, None
        of_matrix = lambda weight, layer: jax.random.fold_in(jax.random.fold_in(key, weight), layer)
        for _ in range(jnp.ndim(weight)):
            of_matrix = jax.vmap(of_matrix)
        return keep, of_matrix(weight, layer)


def of_stack(deal: Deal, key: str, decays: Callable[[str], bool], numbers: Mapping[str, int]) -> Own:
    """Of the stack of this name."""
    layers = {name: np.arange(math.prod(shape[:-2])).reshape(shape[:-2]) for name, shape in deal.shapes.items()}
    values = {name: float(decays(name)) for name in deal.shapes}, numbers, layers
    return Own(*(deal.of_matrices(key, value) for value in values))


def check_master(name: str, p: Leaf, master: str) -> None:
    """Raises UserError for a narrow weight that is not stored in `master`, or is no matrix."""
    found = p.code.dtype if is_scaled(p) else p.dtype
    if found != FORMATS[master].dtype or is_scaled(p) != (FORMATS[master].largest is not None):
        raise UserError(f"{name} is stored in {found}: expected optimizer.master = {master!r}")
    if len(p.shape) < 2:
        raise UserError(f"{name} has shape {p.shape}: expected [..., D, F] of a weight with a scale a matrix")


def zeros_like(shape: tuple[int, ...], fmt: Format) -> Leaf:
    """Zeros as `fmt` stores them, with scales of 1."""
    code = jnp.zeros(shape, fmt.dtype)
    return code if fmt.largest is None else Scaled(code, jnp.ones(shape[:-2], jnp.float32))


def loop_axis(name: str, leaves: Triple) -> int | None:
    """The stack axis to go along one by one; None: all at once.

    The last one that is not that of experts, which may be cut over devices. Nothing is gained where no scale has to
    be known before the first code is written.
    """
    stacks = len(leaves[0].shape) - 2 - ("experts" in name.split("/"))
    return stacks - 1 if stacks > 0 and any(map(is_scaled, leaves)) else None


def by_layer(one: Callable[..., Triple], leaves: Triple, grad: Leaf, axis: int | None) -> Triple:
    """one(leaves, grad, i) for each layer i along `axis`, written into the stacks; of all with i = None if axis is.

    The stacks are carried whole, so that XLA updates them in place; as outputs of a scan they would be new ones.
    """
    if axis is None:
        return one(leaves, grad, None)

    to_bytes = partial(jax.tree.map, as_bytes)
    grad_bytes, types = to_bytes(grad), jax.tree.map(lambda x: x.dtype, (leaves, grad))

    def body(i: jax.Array, stacks: Triple) -> Triple:
        slices = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False), (stacks, grad_bytes))
        layer = jax.tree.map(from_bytes, slices, types)
        new = to_bytes(one(*layer, i))
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, axis), stacks, new)

    stacks = jax.lax.fori_loop(0, leaves[0].shape[axis], body, to_bytes(leaves))
    return jax.tree.map(from_bytes, stacks, types[0])


def update(
    rates: Rates,
    factor: jax.Array | float,
    ok: jax.Array,
    own: Callable[[jax.Array | None], tuple[jax.Array, jax.Array | None]],
    leaves: Triple,
    grad: Leaf,
    i: jax.Array | None,
) -> Triple:
    """(p, m, v) [..., D, F] of layer i after a step, stored as they were; the old ones, bit for bit, where the step is
    not ok. `own`: Own.at of the layer."""
    keep, key = own(i)
    p, m, v = (decode(x).astype(jnp.float32) for x in leaves)
    g = decode(grad).astype(jnp.float32) * factor
    p, m, v = adam(p * keep, m, v, g, rates)
    previous = 1 / leaves[0].scale_inv if is_scaled(leaves[0]) else 1.0
    new = (store(p, leaves[0], previous, key), store(m, leaves[1]), store(v, leaves[2]))
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, leaves)


def adam(
    p: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, rates: Rates
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam (Kingma & Ba 2015) in float32, eps outside the corrected root."""
    m = rates.b1 * m + (1 - rates.b1) * g
    v = rates.b2 * v + (1 - rates.b2) * g * g
    root = jnp.sqrt(v) / jnp.sqrt(rates.second_correction) + rates.eps
    return p - rates.rate / rates.first_correction * (m / root), m, v


def store(x: jax.Array, old: Leaf, previous: jax.Array | float = 1.0, key: jax.Array | None = None) -> Leaf:
    """x float32[..., D, F] in the format of `old`, with the scale of its own amax; `previous` if that says nothing."""
    fmt = FORMAT_OF[old.code.dtype if is_scaled(old) else old.dtype]
    round_ = nearest if key is None or fmt.name == "float32" else partial(stochastic, key)
    if fmt.largest is None:
        return round_(x, jnp.float32(1), fmt)
    scale = scale_of(amax(x), fmt, previous)
    return Scaled(round_(x, per_matrix(scale), fmt), 1 / scale)


def nearest(x: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
    """x * scale as codes, rounded to nearest even."""
    return x.astype(fmt.dtype) if fmt.largest is None else cast(x, scale, fmt)


def stochastic(key: jax.Array, x: jax.Array, scale: jax.Array, fmt: Format) -> jax.Array:
    """x * scale as codes, rounded up or down so that the mean is x * scale; what is too large saturates. `key` may be
    an array of keys, for as many leading axes of x.

    In units of the last place, floor(y + u) with u uniform over as many bits as float32 has beyond the format (13 for
    FP16; at most 16). That is adding them to float32's mantissa and cutting, but right for subnormals too.
    """
    info = jnp.finfo(fmt.dtype)
    y = jnp.clip(x * scale, float(info.min), float(info.max))
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(y, jnp.uint32) & 0x7F800000, jnp.float32)
    # 2^-126: BF16 has smaller ones, but float32 arithmetic takes them for 0
    last_place = jnp.maximum(jnp.maximum(power, float(info.tiny)) * float(info.eps), 2.0**-126)
    bits = min(16, 23 - info.nmant)
    draw = lambda one: jax.random.bits(one, x.shape[key.ndim :], jnp.uint16)
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    u = (draw(key) >> (16 - bits)).astype(jnp.float32) * 2.0**-bits
    return (jnp.floor(y / last_place + u) * last_place).astype(fmt.dtype)
