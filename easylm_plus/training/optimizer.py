"""Optimizers behind one contract: step(grads, state, params, norm, ok) -> (params, state, metrics).

Not optax's (updates, state), because an update cannot be added to a parameter that is stored as FP8 codes: only
the optimizer knows its master copy. `from_optax` adapts any optax chain.

    grads   a tree like the parameters, of arrays or Scaled codes; decoded leaf by leaf
    norm    float32[]: the global norm of the decoded gradients, before clipping (`global_norm`)
    ok      bool[]: whether the step counts. If not, parameters and state come back bit for bit as they came in,
            whatever the gradients hold; each optimizer selects on the numbers at hand, because a choice between two
            whole states would keep both of them alive
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from easylm_plus.errors import UserError
from easylm_plus.numerics.formats import decode, is_scaled
from easylm_plus.training.schedules import schedule, weight_decay
from easylm_plus.tree import path_name

Metrics = dict[str, jax.Array]


class Optimizer(NamedTuple):
    """init(params) -> state; step(grads, state, params, norm, ok) -> (params, state, metrics)."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[Any, Any, Metrics]]


def global_norm(grads: Any) -> jax.Array:
    """float32[]: the norm of all decoded gradients together. Decoding is fused into the sums: no leaf is widened."""
    squares = [jnp.sum(jnp.square(decode(g).astype(jnp.float32))) for g in jax.tree.leaves(grads, is_leaf=is_scaled)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def clip_factor(norm: jax.Array, clip_norm: float) -> jax.Array | float:
    """What gradients are multiplied by so that their global norm is at most `clip_norm` (0: not at all)."""
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else 1.0


def from_optax(tx: optax.GradientTransformation, clip_norm: float = 0.0) -> Optimizer:
    """Adapts an optax chain, for parameters that are arrays; gradients are first clipped to `clip_norm`."""

    def step(grads: Any, state: Any, params: Any, norm: jax.Array, ok: jax.Array) -> tuple[Any, Any, Metrics]:
        factor = clip_factor(norm, clip_norm)
        # in the parameter's dtype, which is that of the moments: a sum of micro-batches is wider
        grads = jax.tree.map(lambda p, g: (decode(g) * factor).astype(p.dtype), params, grads)
        updates, new_state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates), new_state
        params, state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (params, state))
        return params, state, {}

    return Optimizer(tx.init, step)


def decay_pattern(config: Mapping[str, Any]) -> re.Pattern[str]:
    """The regular expression `optimizer.decay`; UserError where it is none."""
    try:
        return re.compile(config["decay"])
    except re.error as error:
        raise UserError(f"optimizer.decay = {config['decay']!r}: expected a regular expression ({error})") from None


def decay_mask(params: Any, pattern: str | re.Pattern[str]) -> Any:
    """Which weights decay: those whose path matches `pattern`. Norms and biases should not (arXiv:1711.05101)."""
    matches = lambda path, _: bool(re.search(pattern, path_name(path)))
    return jax.tree_util.tree_map_with_path(matches, params, is_leaf=is_scaled)


def adamw(config: Mapping[str, Any], total_steps: int) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) of a config's `optimizer` section; logs the learning rate it applied."""
    rate, pattern = schedule(config, total_steps), decay_pattern(config)
    tx = optax.chain(
        optax.scale_by_adam(config["b1"], config["b2"], config["eps"]),
        optax.add_decayed_weights(weight_decay(config, total_steps), lambda params: decay_mask(params, pattern)),
        optax.scale_by_learning_rate(rate),
    )
    plain = from_optax(tx, config["clip_norm"])

    def step(grads: Any, state: Any, params: Any, norm: jax.Array, ok: jax.Array) -> tuple[Any, Any, Metrics]:
        applied = rate(state[0].count)  # Adam's own count: a skipped step does not advance it
        params, state, metrics = plain.step(grads, state, params, norm, ok)
        return params, state, {**metrics, "learning_rate": applied}

    return Optimizer(plain.init, step)
