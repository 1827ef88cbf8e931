"""A number that is not finite, in the rows of one device, skips an FP8 step on all of them: no weight, scale, code or
window is another than before, and the next step is as if nothing had been.

Casts saturate, so that an FP8 product would make something finite of it; factors are therefore NaN where an amax is not
finite, and the control shows what happens where they are not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import fp8_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_runs import ROWS, Run, bits

from easylm_plus.numerics import fp8
from easylm_plus.numerics.formats import E4M3, E5M2
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.training import assembly

SIZES = {"replica": 2, "fsdp": 2, "tensor": 2}
CLEAN = {"forward": np.zeros(ROWS, np.float32), "backward": np.zeros(ROWS, np.float32)}


@jax.custom_vjp
def spoiled(x_BTD: jax.Array, forward_B: jax.Array, backward_B: jax.Array) -> jax.Array:
    """x, and its gradient, with something added to each row."""
    return x_BTD + forward_B[:, None, None]


def _spoiled_backward(backward_B: jax.Array, dy_BTD: jax.Array) -> Any:
    return dy_BTD + backward_B[:, None, None], None, None


spoiled.defvjp(lambda x, forward, backward: (spoiled(x, forward, backward), backward), _spoiled_backward)


@dataclasses.dataclass(frozen=True)
class SpoiledModel:
    """A model whose last hidden states pass through `spoiled`."""

    model: Any
    batch: dict[str, jax.Array]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply(self, variables: Any, *inputs: Any, method: str, **options: Any) -> Any:
        out = self.model.apply(variables, *inputs, method=method, **options)
        return (spoiled(out[0], self.batch["forward"], self.batch["backward"]), out[1]) if method == "hidden" else out


class Poisoned(LanguageModel):
    """The objective, with what the batch says added to hidden states and to their gradients."""

    def __call__(self, params: Any, batch: Any, denominators: Any) -> Any:
        plain = LanguageModel(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return LanguageModel.__call__(
            dataclasses.replace(plain, model=SpoiledModel(self.model, batch)), params, batch, denominators
        )


def stepped(run: Run, state: Any, seed: int, **poison: np.ndarray) -> Any:
    """(state, metrics) after a batch; the state given stays."""
    copy = jax.tree.map(jnp.copy, state)
    return run.step(copy, run.batch(seed, **{**CLEAN, **poison}))


def in_first_row(value: float) -> np.ndarray:
    """Of the eight rows each of four devices has two, as does its neighbour along `tensor`."""
    return np.where(np.arange(ROWS) == 0, value, 0.0).astype(np.float32)


BAD = {
    "infinite gradient": {"backward": in_first_row(np.inf)},
    "NaN gradient": {"backward": in_first_row(np.nan)},
    "infinite activation": {"forward": in_first_row(np.inf)},
    "NaN activation": {"forward": in_first_row(np.nan)},
}


SLOW = pytest.mark.slow
OTHERS = [
    pytest.param("O1", 1, "sharded", marks=SLOW),
    pytest.param("O3", 16, "sharded", marks=SLOW),
    pytest.param("O2", 16, "sharded", marks=SLOW),
    pytest.param("O2", 1, "sharded", marks=SLOW),
    pytest.param("O3", 1, "sharded", marks=SLOW),
]  # each is in another pair, too


@pytest.mark.parametrize(
    ("level", "window", "zero"),
    [("O1", 16, "sharded"), ("O3", 1, "whole_tensor"), *OTHERS],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing_on_any_device(level, window, zero, monkeypatch):
    monkeypatch.setattr(assembly, "LanguageModel", Poisoned)
    config = fp8_runs.config(level, numerics__fp8_window=window, train__ema=0.9, optimizer__zero=zero)
    run = Run(config, {"replica": 8} if zero == "whole_tensor" else SIZES)
    good, metrics = stepped(run, run.start(), 0)
    assert metrics["ok"]
    kept = lambda state: bits((state.params, state.opt_state, state.numerics, state.ema))
    wanted, plain = stepped(run, good, 1)
    assert kept(wanted) != kept(good) and plain["ok"]
    for name, poison in BAD.items():
        skipped, bad = stepped(run, good, 1, **poison)
        verdicts = [bool(shard.data) for shard in bad["ok"].addressable_shards]
        assert verdicts == [False] * 8, name
        assert kept(skipped) == kept(good), name
        assert [int(skipped.guard.skipped), int(skipped.step)] == [1, 2]
        again, metrics = stepped(run, skipped, 1)
        assert metrics["ok"] and kept(again) == kept(wanted), "the next step is as if nothing had been"
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(again))
    if window > 1:
        seen = bad["numerics"]["seen"]
        moved = run.assembly.numerics.observe(good.numerics, seen, jnp.array(True))
        assert bits(moved) != bits(good.numerics), "without the verdict the windows would have moved"


# --- a value that only FP8 products see ---


def spoiling(fmt: Any, marked: bool) -> Callable:
    """fp8.narrowed, with an infinite value in the first row of the first replica; unless `marked`, with a finite factor
    nevertheless."""
    right = fp8.narrowed

    def narrowed(x: jax.Array, format: Any, window: Any) -> Any:
        if format is not fmt:
            return right(x, format, window)
        here = (jnp.arange(x.shape[0]) == 0) & (jax.lax.axis_index("replica") == 0)
        code, back, seen = right(jnp.where(here[:, None, None], jnp.inf, x), format, window)
        return code, back if marked else jnp.where(jnp.isfinite(back), back, 1.0), seen

    return narrowed


@pytest.mark.parametrize("fmt", [pytest.param(E4M3, marks=SLOW, id="input"), pytest.param(E5M2, id="output_grad")])
def test_casts_that_saturate_without_a_mark_would_hide_it(fmt, monkeypatch):
    verdicts = {}
    for marked in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "narrowed", spoiling(fmt, marked))
            run = Run(fp8_runs.config("O3"), SIZES)
            start = run.start()
            state, metrics = run.step(jax.tree.map(jnp.copy, start), run.batch(0))
        verdicts[marked] = bool(metrics["ok"])
        assert (bits(state.params) == bits(start.params)) == marked
    assert verdicts == {True: False, False: True}
