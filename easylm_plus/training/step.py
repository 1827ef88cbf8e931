"""One training step: (state, batch) -> (state, metrics).

The skip decision and the weight average are here; gradients are in gradients.py. What is learned is the objective's
business, how weights move the optimizer's, as what they multiply that of numerics, where arrays live the mesh's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.levels import PLAIN
from easylm_plus.parallel.collectives import as_bits
from easylm_plus.training.gradients import Batch, gradients
from easylm_plus.training.optimizer import Optimizer, global_norm
from easylm_plus.training.state import Guard, TrainState

NORM_MEMORY = 100  # steps that the running mean of the gradient norm looks back


def make_train_step(
    objective: Any, optimizer: Optimizer, config: Mapping[str, Any], numerics: Any = PLAIN
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step for a config's `train` section: accumulate, ema, spike_factor."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        view = numerics.view(state.params, state.numerics)
        grads, seen, loss, sums = gradients(objective, view, batch, config["accumulate"], numerics)
        norm = global_norm(grads)
        ok, guard = judge(state.guard, loss, norm, config["spike_factor"])
        # a step that does not count changes nothing but the count
        trained = numerics.trained(state.params)
        trained, opt_state, metrics = optimizer.step(grads, state.opt_state, trained, norm, ok)
        params = numerics.merged(state.params, trained)
        ema = average(state.ema, params, config["ema"], ok)
        remembered = numerics.observe(state.numerics, seen, ok)
        return TrainState(state.step + 1, params, opt_state, remembered, ema, guard), {
            "loss": loss,
            "grad_norm": norm,
            "ok": ok,
            "skipped": guard.skipped,
            "streak": guard.streak,
            "sums": sums,
            "numerics": numerics.report(seen, state.numerics, view, params),
            **metrics,
        }

    return train_step


def judge(guard: Guard, loss: jax.Array, norm: jax.Array, spike_factor: float) -> tuple[jax.Array, Guard]:
    """Whether this step counts: loss and gradient are finite, and the gradient norm is no spike.

    A spike is a norm above `spike_factor` times its running mean, once that mean has seen NORM_MEMORY steps
    (0: never). Norm and loss are global sums, so every device decides alike.
    """
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    if spike_factor:
        ok &= (guard.count < NORM_MEMORY) | (norm <= spike_factor * guard.norm)
    count = guard.count + ok
    mean = guard.norm + (norm - guard.norm) / jnp.clip(count, 1, NORM_MEMORY)
    skip = (~ok).astype(jnp.int32)
    return ok, Guard(jnp.where(ok, mean, guard.norm), count, guard.skipped + skip, (guard.streak + skip) * skip)


def average(ema: Any, params: Any, decay: float, ok: jax.Array) -> Any:
    """Running mean of the weights; None where the config asks for none."""
    if ema is None:
        return None
    share = jnp.where(ok, 1 - decay, 0.0)
    return jax.tree.map(lambda old, new: old + (decode(new).astype(old.dtype) - old) * share, ema, params)


def fingerprint(params: Any) -> jax.Array:
    """uint32 hash of all parameters' bits: any flipped bit changes it (for parameters of 8, 16 or 32 bits)."""

    def of_leaf(x: jax.Array) -> jax.Array:
        bits = as_bits(x).astype(jnp.uint32).ravel()
        return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(params):
        total = total * jnp.uint32(16777619) + of_leaf(leaf)
    return total
