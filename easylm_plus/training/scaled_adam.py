"""AdamW whose master weights and moments are narrow: FP8-LM's optimizer (Peng et al. 2023, arXiv:2310.18313, section
2.2), 6 bytes a parameter by default: FP16 master 2, E4M3 first moment 1, FP16 second moment 2, E4M3 gradient 1.

    p = dec(p) (1 - lr wd)
    m = b1 dec(m) + (1 - b1) g,   v = b2 dec(v) + (1 - b2) g^2                   in float32
    p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)                 with the m and v not yet rounded
    p, m, v stored with the scale of their own new amax, each matrix by itself

Departures from the released code (Azure/MS-AMP): FP8 gradients are clipped like all others (there the Megatron path
counts them in the norm and forgets to scale them), and the master is rounded stochastically. Rounded to nearest, an
FP16 master loses what is smaller than half its spacing, 2^-12 to 2^-11 of the weight: weight decay of lr wd = 1e-4
altogether, and most of Adam's updates at the end of a cosine schedule (benchmarks/master_rounding.py). Stochastic
rounding keeps both on average and costs no bytes. The moments are rounded to nearest.

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
from easylm_plus.parallel.zero import Deal
from easylm_plus.training.optimizer import Metrics, Optimizer, adamw, clip_factor, decay_pattern
from easylm_plus.training.schedules import schedule, weight_decay
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
    decay = weight_decay(config, total_steps)

    def init(params: Any) -> AdamState:
        def moments(which: str) -> Any:
            def zeros(path: Any, p: Leaf) -> Leaf:
                name = path_name(path)
                if not (narrow(name) or (deal and name in deal.keys)):
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
        shrink = (decay(state.count) if callable(decay) else decay) * applied
        key = jax.random.fold_in(jax.random.key(seed), state.count) if rounding == "stochastic" else None
        named, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_scaled)
        trees = [jax.tree.leaves(tree, is_leaf=is_scaled) for tree in (state.m, state.v, grads)]
        numbers = deal.number if deal else {path_name(path): number for number, (path, _) in enumerate(named)}
        decays = {name: float(bool(pattern.search(name))) for name in numbers}
        new: list[Triple] = []
        for (path, p), m, v, g in zip(named, *trees, strict=True):
            name = path_name(path)
            own = (
                of_stack(deal, name, numbers, decays)
                if deal and name in deal.keys
                else of_weight(p.shape, numbers[name], decays[name])
            )
            axis = loop_axis(name, (p, m, v), deal)
            one = partial(update, rates, factor, ok, shrink, key, own, axis)
            new.append(by_layer(one, (p, m, v), g, axis))
        params, m, v = (jax.tree.unflatten(treedef, column) for column in zip(*new, strict=True))
        return params, AdamState(state.count + ok, m, v), {"learning_rate": applied}

    return Optimizer(init, step)


def make_optimizer(config: Mapping[str, Any], total_steps: int, numerics: Any, seed: int) -> Optimizer:
    """AdamW for weights kept as `numerics` says (numerics/levels.py)."""
    if numerics.formats == WIDE:
        return adamw(config, total_steps)
    return scaled_adamw(config, total_steps, numerics.narrow, numerics.formats, config["rounding"], seed, numerics.deal)


class Own(NamedTuple):
    """What each matrix of a leaf has of its own, in arrays of the leaf's stack axes: the numbers of its weight and of
    itself in that weight, which its random numbers come from, and whether it decays, 0 or 1."""

    weight: np.ndarray
    matrix: np.ndarray
    decays: np.ndarray


def of_weight(shape: tuple[int, ...], number: int, decays: float) -> Own:
    """Of a weight by name."""
    stack = shape[:-2]
    return Own(np.full(stack, number), np.arange(math.prod(stack)).reshape(stack), np.full(stack, decays))


def of_stack(deal: Deal, name: str, numbers: Mapping[str, int], decays: Mapping[str, float]) -> Own:
    """Of a stack that is dealt out."""
    own = {name: of_weight(shape, numbers[name], decays[name]) for name, shape in deal.shapes.items()}
    of_field = lambda field: deal.of_matrices(deal.keys[name], {name: getattr(x, field) for name, x in own.items()})
    return Own(*map(of_field, Own._fields))


def keys_of(key: jax.Array, weight: jax.Array, matrix: jax.Array) -> jax.Array:
    """A key a matrix, by its numbers, int[...]: the same wherever it lies."""
    one = lambda weight, matrix: jax.random.fold_in(jax.random.fold_in(key, weight), matrix)
    for _ in range(weight.ndim):
        one = jax.vmap(one)
    return one(weight, matrix)


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


def loop_axis(name: str, leaves: Triple, deal: Deal | None = None) -> int | None:
    """The stack axis to go along one by one; None: all at once.

    The last one that is not that of experts, which may be cut over devices; of matrices that are dealt out that of the
    slots. Nothing is gained where no scale has to be known before the first code is written.
    """
    if deal and name in deal.keys:
        return 0
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
    decay: jax.Array,
    key: jax.Array | None,
    own: Own,
    axis: int | None,
    leaves: Triple,
    grad: Leaf,
    i: jax.Array | None,
) -> Triple:
    """(p, m, v) [..., D, F] after a step, stored as they were; the old ones, bit for bit, where the step is not ok.

    factor: of the gradient, that of clipping. decay: of the masters, lr wd. i: the leaves are those of layer i along
    `axis` of what `own` describes; None: all of it.
    """
    weight, matrix, decays = (jnp.asarray(x) if i is None else jnp.take(x, i, axis) for x in own)
    keep = 1 - decay * decays
    keep = per_matrix(keep) if keep.ndim else keep
    key = None if key is None else keys_of(key, weight, matrix)
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
