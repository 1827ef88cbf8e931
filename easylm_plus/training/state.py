"""Everything that a step changes, as one pytree: what a checkpoint holds and a restart needs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.levels import PLAIN
from easylm_plus.parallel.zero import DEALT
from easylm_plus.training.optimizer import Optimizer
from easylm_plus.tree import path_name


@struct.dataclass
class Guard:
    """What the skip decision remembers. All scalars; the norm and its count ignore skipped steps."""

    norm: jax.Array  # float32: running mean of the gradient norm
    count: jax.Array  # int32: steps in that mean
    skipped: jax.Array  # int32: steps skipped since the start
    streak: jax.Array  # int32: steps skipped in a row up to now


@struct.dataclass
class TrainState:
    """step counts every batch, also skipped ones: the data order is a function of it. Schedules count steps taken."""

    step: jax.Array  # int32
    params: Any
    opt_state: Any
    numerics: Any  # observed state of weight transforms; empty where there are none
    ema: Any  # running mean of the parameters in at least float32, or None
    guard: Guard


def new_state(params: Any, optimizer: Optimizer, ema: bool, numerics: Any = PLAIN) -> TrainState:
    """The state before the first step, from parameters as the model has them."""
    zero = lambda: jnp.zeros((), jnp.int32)  # one buffer each: the step donates them all
    guard = Guard(jnp.zeros((), jnp.float32), zero(), zero(), zero())
    # 16 bits would round away the small share that a step adds; jnp.array copies, since the step donates both trees
    wide = lambda p: jnp.array(decode(p), jnp.promote_types(decode(p).dtype, jnp.float32))
    copy = numerics.laid(jax.tree.map(wide, params, is_leaf=is_coded)) if ema else None
    stored = numerics.store(params)
    return TrainState(zero(), stored, optimizer.init(numerics.trained(stored)), numerics.state(), copy, guard)


def relaid(state: TrainState, way: Callable[[Any], Any]) -> TrainState:
    """The state with each of its trees of parameters as `way` makes it: by name (Numerics.named), as checkpoints have
    them whatever rank owned what, or laid again (Numerics.laid)."""
    opt_state = dataclasses.replace(state.opt_state, m=way(state.opt_state.m), v=way(state.opt_state.v))
    ema = None if state.ema is None else way(state.ema)
    return dataclasses.replace(state, params=way(state.params), opt_state=opt_state, ema=ema)


def is_coded(x: Any) -> bool:
    """For tree functions: a Coded is one leaf."""
    return isinstance(x, Coded)


def state_shardings(state: TrainState, param_shardings: Any, mesh: Mesh) -> TrainState:
    """NamedShardings for a whole (abstract) state: what mirrors a parameter is sharded like it.

    A leaf mirrors the parameter whose path ends its own path and whose shape it has (Adam's moments, the EMA, and the
    codes of either, and the base of an adapter). Of what is dealt out (parallel/zero.py) all parts mirror the stack.
    A Coded places its own arrays by those of the matrix that it is. Scalars and everything else are replicated.
    """
    place = lambda path: path_name(path).removesuffix("/code").removesuffix("/base")
    params = jax.tree_util.tree_leaves_with_path(state.params, is_leaf=is_coded)
    shapes = {place(path): leaf.shape for path, leaf in params}
    known = {path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(param_shardings)}
    whole = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, leaf: Any) -> Any:
        parts = place(path).split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if parts[start] == DEALT:
                return known[f"{DEALT}/{parts[start + 1]}"]
            if name in known and shapes[name] == leaf.shape:
                return leaf.placed(known[name]) if is_coded(leaf) else known[name]
        return whole

    return jax.tree_util.tree_map_with_path(sharding, state, is_leaf=is_coded)
