"""Optimizers behind one contract: step(grads, state, params) -> (params, state, metrics).

Not optax's (updates, state), because an update cannot be added to a parameter that is stored as FP8 codes: only
the optimizer knows its master copy. `from_optax` adapts any optax chain.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from easylm_plus.errors import UserError
from easylm_plus.training.schedules import schedule
from easylm_plus.tree import path_name

Metrics = dict[str, jax.Array]


class Optimizer(NamedTuple):
    """init(params) -> state; step(grads, state, params) -> (params, state, metrics)."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any, Metrics]]


def from_optax(tx: optax.GradientTransformation, clip_norm: float = 0.0) -> Optimizer:
    """Adapts an optax chain; gradients are first clipped to a global norm of `clip_norm` (0: not at all)."""

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any, Metrics]:
        norm = optax.tree.norm(grads)
        if clip_norm:
            factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, {"grad_norm": norm}

    return Optimizer(tx.init, step)


def decay_mask(params: Any, pattern: str) -> Any:
    """Which weights decay: those whose path matches `pattern`. Norms and biases should not (arXiv:1711.05101)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(re.search(pattern, path_name(path))), params)


def adamw(config: Mapping[str, Any], total_steps: int) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) of a config's `optimizer` section; logs the learning rate it applied."""
    rate = schedule(config, total_steps)
    try:
        re.compile(config["decay"])
    except re.error as error:
        raise UserError(f"optimizer.decay = {config['decay']!r}: expected a regular expression ({error})") from None
    tx = optax.chain(
        optax.scale_by_adam(config["b1"], config["b2"], config["eps"]),
        optax.add_decayed_weights(config["weight_decay"], lambda params: decay_mask(params, config["decay"])),
        optax.scale_by_learning_rate(rate),
    )
    plain = from_optax(tx, config["clip_norm"])

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any, Metrics]:
        applied = rate(state[0].count)  # Adam's own count: a skipped step does not advance it
        params, state, metrics = plain.step(grads, state, params)
        return params, state, {**metrics, "learning_rate": applied}

    return Optimizer(plain.init, step)
