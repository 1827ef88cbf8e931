"""Learning-rate schedules: functions of the optimizer step, float32[] -> float32[].

All warm up linearly over `warmup_steps`, so that step 0 already moves (rate = peak / warmup_steps).

    constant   the peak
    linear     down to `end` over the rest of the run
    cosine     half a cosine down to `end` (arXiv:1608.03983)
    two_stage  linear from the peak; at `stage_at` of the run it drops to a lower line (BitNet b1.58, "The Era of
               1-bit LLMs: Training Tips", section 3: a high rate first, a sudden decay midway). So does weight decay,
               which shrinks latents to where ternary weights turn
    two_stage_cosine  the same of two half cosines (BitNet b1.58 2B4T, arXiv:2504.12285, section 3)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from easylm_plus.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]

KINDS = ("constant", "linear", "cosine", "two_stage", "two_stage_cosine")


def schedule(config: Mapping[str, Any], total_steps: int) -> Schedule:
    """Builds the schedule of a config's `optimizer` section.

    Keys: schedule, learning_rate (the peak), end_learning_rate, warmup_steps or warmup_share, and for two_stage:
    stage_at (share of the run) and stage_learning_rate (the peak of the second line).
    """
    kind, peak, end = config["schedule"], config["learning_rate"], config["end_learning_rate"]
    warmup = config["warmup_steps"] or round(config["warmup_share"] * total_steps)
    if kind not in KINDS:
        raise UserError(f"optimizer.schedule = {kind!r}: expected one of {', '.join(KINDS)}")
    if warmup > total_steps:
        raise UserError(f"optimizer.warmup_steps = {warmup}: longer than the run of {total_steps} steps")

    def rate(step: jax.Array) -> jax.Array:
        step = step.astype(jnp.float32)
        done = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        if kind == "constant":
            value = jnp.full_like(step, peak)
        else:
            left = _cosine(done) if kind.endswith("cosine") else 1 - done
            first = jnp.where(step < config["stage_at"] * total_steps, peak, config["stage_learning_rate"])
            value = end + ((first if kind.startswith("two_stage") else peak) - end) * left
        return value * jnp.minimum(1.0, (step + 1) / max(1, warmup))

    return rate


def weight_decay(config: Mapping[str, Any], total_steps: int) -> float | Schedule:
    """The weight decay of a config's `optimizer` section: a number, or with two stages a function of the step, which is
    `weight_decay` (for two_stage_cosine the start of a half cosine to 0) and from `stage_at` of the run on
    `stage_weight_decay`, or where that is negative, `weight_decay`."""
    first, second, kind = config["weight_decay"], config["stage_weight_decay"], config["schedule"]
    second = first if second < 0 else second
    if not kind.startswith("two_stage") or (first == second and kind == "two_stage"):
        return first

    def decay(step: jax.Array) -> jax.Array:
        left = _cosine(step.astype(jnp.float32) / total_steps) if kind == "two_stage_cosine" else 1.0
        return jnp.where(step < config["stage_at"] * total_steps, first * left, second)

    return decay


def _cosine(done: jax.Array) -> jax.Array:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + jnp.cos(jnp.pi * done))
