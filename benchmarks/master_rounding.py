"""What a 16-bit master weight keeps of small updates: rounded to nearest, and stochastically.

    python benchmarks/master_rounding.py

Weights N(0, 0.02) move by small steps and are stored after each as the optimizer stores its masters
(`training.scaled_adam.store`). Three questions, each against the same steps in float32:

    drift    every step adds 0.1 lr in a direction that each weight keeps, 200 times: which share arrives
    noisy    the same plus noise of 0.3 lr a step, as of gradients; the noise dithers the rounding
    decay    nothing but weight decay of 1e-4 a step, 1000 times: the mean size left, of 1
    error    root mean square of what is not drift, in units of the weights' 0.02 (the price of random rounding)
"""

from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags

from easylm_plus.numerics.formats import FORMATS, decode, encode
from easylm_plus.training.scaled_adam import is_scaled, store

SIDE = flags.DEFINE_integer("side", 256, "of the square matrix of weights")
STEPS = flags.DEFINE_integer("steps", 200, "of drift")
RATES = (1e-4, 3e-5, 1e-5, 3e-6)
MASTERS = ("float32", "fp16", "bf16")
SCALE = 0.02


def value(p) -> jax.Array:
    """What is stored, in float32."""
    return decode(p).astype(jnp.float32)


def keep(x: jax.Array, old, key: jax.Array | None):
    """x as the optimizer stores it."""
    return store(x, old, 1 / old.scale_inv if is_scaled(old) else 1.0, key)


@partial(jax.jit, static_argnames=("master", "random", "steps"))
def drift(master: str, random: bool, steps: int, start: jax.Array, direction: jax.Array, rate: float, noise: float):
    """(share of the drift that arrived, root mean square of the rest of the movement / SCALE)."""

    def body(i, p):
        step = 0.1 * direction + noise * jax.random.normal(jax.random.key(10_000 + i), start.shape)
        return keep(value(p) + rate * step, p, jax.random.key(1000 + i) if random else None)

    first = encode(start, FORMATS[master])
    moved = value(jax.lax.fori_loop(0, steps, body, first)) - value(first)
    drifted = 0.1 * rate * steps
    share = jnp.mean(moved * direction) / drifted
    return share, jnp.sqrt(jnp.mean(jnp.square(moved - share * drifted * direction))) / SCALE


@partial(jax.jit, static_argnames=("master", "random"))
def decay(master: str, random: bool, start: jax.Array):
    """Mean size after 1000 steps of decay by 1e-4, of the size before."""
    body = lambda i, p: keep(value(p) * (1 - 1e-4), p, jax.random.key(1000 + i) if random else None)
    first = encode(start, FORMATS[master])
    return jnp.mean(jnp.abs(value(jax.lax.fori_loop(0, 1000, body, first)))) / jnp.mean(jnp.abs(value(first)))


def main(_: list[str]) -> None:
    shape = (SIDE.value, SIDE.value)
    start = SCALE * jax.random.normal(jax.random.key(0), shape)
    direction = jnp.sign(jax.random.normal(jax.random.key(1), shape))
    columns = [f"{what} {rate:.0e}" for what in ("drift", "noisy", "error") for rate in RATES]
    print("| master | rounding | " + " | ".join(columns) + " | decay |")
    print("|---|---|" + "---|" * (len(columns) + 1))
    for master in MASTERS:
        for random in (False, True)[: 1 + (master != "float32")]:
            run = partial(drift, master, random, STEPS.value, start, direction)
            clean, noisy = ([run(rate, noise) for rate in RATES] for noise in (0.0, 0.3))
            cells = [f"{share:.3f}" for share, _ in clean + noisy] + [f"{error:.1e}" for _, error in noisy]
            name = "none" if master == "float32" else "stochastic" if random else "nearest"
            print(f"| {master} | {name} | " + " | ".join(cells) + f" | {decay(master, random, start):.4f} |")


if __name__ == "__main__":
    app.run(main)
