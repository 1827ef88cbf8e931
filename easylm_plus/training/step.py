"""One training step: (state, batch) -> (state, metrics).

Gradient accumulation, the skip decision and the weight average are here; what is learned is the objective's
business, how weights move the optimizer's, where arrays live the mesh's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from easylm_plus.errors import UserError
from easylm_plus.training.optimizer import Optimizer
from easylm_plus.training.state import Guard, TrainState

Batch = dict[str, jax.Array]
NORM_MEMORY = 100  # steps that the running mean of the gradient norm looks back


def make_train_step(
    objective: Any, optimizer: Optimizer, config: Mapping[str, Any]
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step for a config's `train` section: accumulate, ema, spike_factor."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        denominators = objective.denominators(batch)
        loss_and_sums = lambda params, micro: objective(params, micro, denominators)
        grads, loss, sums = accumulate(loss_and_sums, state.params, batch, config["accumulate"])
        params, opt_state, metrics = optimizer.step(grads, state.opt_state, state.params)
        ok, guard = judge(state.guard, loss, metrics["grad_norm"], config["spike_factor"])
        ema = average(state.ema, params, config["ema"])
        new = dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
        new = jax.tree.map(partial(jnp.where, ok), new, state)  # a skipped step changes nothing ...
        new = dataclasses.replace(new, step=state.step + 1, guard=guard)  # ... but the count
        return new, {
            "loss": loss,
            "ok": ok,
            "skipped": guard.skipped,
            "streak": guard.streak,
            "sums": sums,
            **metrics,
        }

    return train_step


def accumulate(loss_and_sums: Callable, params: Any, batch: Batch, parts: int) -> tuple[Any, jax.Array, Any]:
    """(gradients, loss, sums) of the whole batch, computed in `parts` micro-batches one after the other.

    Micro-batch i takes every parts-th row, so that each device's rows stay on that device. Shares of the loss add
    up, because they are divided by the denominators of the whole batch.
    """
    grad = jax.value_and_grad(loss_and_sums, has_aux=True)
    if parts == 1:
        (loss, sums), grads = grad(params, batch)
        return grads, loss, sums
    rows = batch["inputs"].shape[0]
    if rows % parts:
        raise UserError(f"train.accumulate = {parts}: expected a divisor of the batch of {rows} rows")
    micro = jax.tree.map(lambda x: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, part: Batch) -> tuple[Any, None]:
        (loss, sums), grads = grad(params, part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (grads, loss, sums)), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro))
    wide = lambda s: jnp.promote_types(s.dtype, jnp.float32)  # sums of 16-bit gradients need more than 16 bits
    (loss, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s)), shapes)
    return jax.lax.scan(body, (grads, loss, sums), micro)[0]


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


def average(ema: Any, params: Any, decay: float) -> Any:
    """Running mean of the weights; None where the config asks for none."""
    if ema is None:
        return None
    return jax.tree.map(lambda old, new: old + (new.astype(old.dtype) - old) * (1 - decay), ema, params)


def fingerprint(params: Any) -> jax.Array:
    """uint32 hash of all parameters' bits: any flipped bit changes it (for parameters of 16 or 32 bits)."""

    def of_leaf(x: jax.Array) -> jax.Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32).ravel()
        return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(params):
        total = total * jnp.uint32(16777619) + of_leaf(leaf)
    return total
