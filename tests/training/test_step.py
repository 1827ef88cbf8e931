"""The step: micro-batches and packing never change the loss, a bad step changes nothing, and what is logged is true."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training import step as step_module
from easylm_plus.training.optimizer import adamw, from_optax
from easylm_plus.training.state import new_state, state_shardings
from easylm_plus.training.step import make_train_step

TRAIN = {"accumulate": 1, "ema": 0.0, "spike_factor": 0.0}
SGD = from_optax(optax.sgd(0.3), clip_norm=1.0)


# --- the loss of a language model, however the batch is cut ---


class MeanOfMeans(LanguageModel):
    """What many trainers do: each micro-batch is divided by its own tokens."""

    def __call__(self, params, batch, denominators):
        return super().__call__(params, batch, {"loss": 4 * self.denominators(batch)["loss"]})


def ragged(rows=8, length=24, vocab=50):
    """Rows with 1 to all of their tokens learned."""
    batch = tiny.random_batch(rows, length, vocab, seed=3)
    batch["loss_weights"] = (np.arange(length) <= np.linspace(0, length, rows)[:, None]).astype(np.float32)
    return batch


def after_three_steps(objective, accumulate):
    model, params = tiny.model(num_layers=1)
    step = jax.jit(make_train_step(objective(model, 1), SGD, {**TRAIN, "accumulate": accumulate}))
    state, losses = new_state(params, SGD, ema=False), []
    for _ in range(3):
        state, metrics = step(state, ragged())
        losses.append(float(metrics["loss"]))
    return losses, state.params


def difference(one, other):
    """Largest difference of the losses and of the parameters, which are of order 1."""
    return max(float(np.max(np.abs(a - b))) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


def test_micro_batches_do_not_change_the_loss():
    """SGD, whose update is linear in the gradient: what remains is the rounding of float32 sums (eps 1.2e-7)."""
    whole = after_three_steps(LanguageModel, 1)
    assert difference(after_three_steps(LanguageModel, 4), whole) < 2e-6
    assert difference(after_three_steps(MeanOfMeans, 4), whole) > 1e-3


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"train.accumulate = 3: expected a divisor of the batch of 8 rows"):
        after_three_steps(LanguageModel, 3)


@pytest.mark.parametrize("packing", ("best_fit", "first_fit"))
def test_packing_does_not_change_loss_or_gradients(packing):
    model, params = tiny.model(num_layers=1)
    objective = LanguageModel(model, 2)
    gradients = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, objective.denominators(b)), has_aux=True))
    alone, packed = (tiny.documents_batch(packing) for packing in ("none", packing))
    assert len(packed["inputs"]) < len(alone["inputs"])
    (loss, sums), grads = gradients(params, alone)
    (packed_loss, packed_sums), packed_grads = gradients(params, packed)
    assert difference((packed_loss, packed_grads), (loss, grads)) < 2e-6
    np.testing.assert_allclose(packed_sums["nll"], sums["nll"], rtol=1e-5)
    assert difference(packed_sums["tokens"], sums["tokens"]) == 0
    leaking = gradients(params, {**packed, "segment_ids": np.minimum(packed["segment_ids"], 1)})
    assert difference((leaking[0][0], leaking[1]), (loss, grads)) > 1e-3


# --- which steps count: an objective so small that every number can be followed ---


@jax.custom_vjp
def poisoned(w, poison):
    """0, with the gradient `poison`."""
    return jnp.zeros(())


poisoned.defvjp(lambda w, poison: (jnp.zeros(()), (w, poison)), lambda kept, g: (g * kept[1] + 0 * kept[0], None))


@dataclasses.dataclass
class Slope:
    """loss = mean of x w: the gradient of each weight is the mean of x, a constant of the batch."""

    def denominators(self, batch):
        return {"loss": jnp.asarray(batch["inputs"].shape[0], jnp.float32)}

    def __call__(self, params, batch, denominators):
        w = params["kernel"]
        loss = (batch["inputs"] @ w).sum() / denominators["loss"]
        return loss + poisoned(w, batch["poison"].sum()), {"nll": loss[None], "tokens": jnp.ones(1)}


def slope_batch(size=1.0, loss=0.0, poison=0.0):
    """16 rows; `loss` is added to one input of one row, `poison` to the gradient."""
    x = np.full((16, 8), size, np.float32)
    x[3, 2] += loss
    poisons = np.zeros(16, np.float32)
    poisons[5] = poison
    return {"inputs": x, "poison": poisons}


def slope_state(optimizer, ema=False):
    return new_state({"kernel": jnp.arange(1.0, 9.0)}, optimizer, ema)


def trainer(train=None, total=100, **optimizer):
    config = base().optimizer
    config.update({"learning_rate": 0.1, "schedule": "linear", "clip_norm": 0.0, **optimizer})
    built = adamw(config, total)
    return built, make_train_step(Slope(), built, {**TRAIN, **(train or {})})


BAD = {"loss": {"loss": np.nan}, "infinite loss": {"loss": np.inf}, "gradient": {"poison": np.nan},
       "infinite gradient": {"poison": np.inf}}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_step_that_is_not_finite_changes_nothing_on_any_device(bad):
    mesh = make_mesh({"replica": 2, "fsdp": 4}, jax.devices()[:8])
    optimizer, step = trainer({"ema": 0.9})
    rows = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
    with sharding.use(mesh):
        state = slope_state(optimizer, ema=True)
        shardings = state_shardings(state, {"kernel": NamedSharding(mesh, PartitionSpec("fsdp"))}, mesh)
        state = jax.device_put(state, shardings)
        step = jax.jit(step, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))
        good, metrics = step(state, jax.device_put(slope_batch(), rows))
        assert metrics["ok"] and good.params["kernel"][0] != state.params["kernel"][0]
        skipped, metrics = step(good, jax.device_put(slope_batch(**bad), rows))
        again, last = step(skipped, jax.device_put(slope_batch(), rows))
    for name in ("params", "opt_state", "ema"):
        before, after, later = (jax.tree.leaves(getattr(s, name)) for s in (good, skipped, again))
        for old, new in zip(before, after):
            assert all(np.array_equal(a.data, b.data) for a, b in zip(old.addressable_shards, new.addressable_shards))
        assert not all(np.array_equal(a, b) for a, b in zip(after, later)), "the next good step counts"
    verdicts = {bool(shard.data) for shard in metrics["ok"].addressable_shards}
    assert len(metrics["ok"].addressable_shards) == 8 and verdicts == {False}
    guards = [[int(shard.data) for shard in x.addressable_shards] for x in (skipped.guard.skipped, skipped.step)]
    assert guards == [[1] * 8, [2] * 8]
    numbers = lambda s: [int(s.step), int(s.guard.count), int(s.guard.skipped), int(s.guard.streak)]
    assert [numbers(s) for s in (good, skipped, again)] == [[1, 1, 0, 0], [2, 1, 1, 1], [3, 2, 1, 0]]
    assert [int(m["skipped"]) for m in (metrics, last)] == [1, 1]
    assert skipped.guard.norm == good.guard.norm and np.isfinite(again.guard.norm)


def test_spikes_are_skipped_once_the_mean_is_known(monkeypatch):
    monkeypatch.setattr(step_module, "NORM_MEMORY", 4)
    optimizer, step = trainer({"spike_factor": 3.0})
    step, state, mean, counted = jax.jit(step), slope_state(optimizer), 0.0, 0
    sizes = [1, 20, 1, 1, 18, 1, 100, 100, 2, 19, 16]
    verdicts = []
    for size in sizes:
        state, metrics = step(state, slope_batch(size))
        norm = size * np.sqrt(8)
        ok = counted < 4 or norm <= 3 * mean
        if ok:
            counted += 1
            mean += (norm - mean) / min(counted, 4)
        verdicts.append(bool(metrics["ok"]))
        assert verdicts[-1] == ok and float(state.guard.norm) == pytest.approx(mean, rel=1e-6)
    assert verdicts == [True] * 4 + [False, True, False, False, True, False, False]
    assert int(state.guard.skipped) == verdicts.count(False)


def test_without_a_factor_no_spike_is_skipped():
    optimizer, step = trainer()
    step, state = jax.jit(step), slope_state(optimizer)
    for size in [1] * 4 + [1e6]:
        state, metrics = step(state, slope_batch(size))
        assert metrics["ok"]


def test_weight_average():
    optimizer, step = trainer({"ema": 0.8})
    step, state = jax.jit(step), slope_state(optimizer, ema=True)
    wanted = simple = np.arange(1.0, 9.0)
    for _ in range(6):
        state, _ = step(state, slope_batch())
        wanted = 0.8 * wanted + 0.2 * np.asarray(state.params["kernel"], np.float64)
        simple = np.asarray(state.params["kernel"], np.float64)
    close = lambda x: np.allclose(state.ema["kernel"], x, rtol=1e-6)
    assert close(wanted) and not close(simple)


def test_the_logged_learning_rate_is_the_applied_one():
    """A constant gradient makes Adam move every weight by the learning rate, to 1e-6."""
    optimizer, step = trainer(total=10)
    step, state, rates = jax.jit(step), slope_state(optimizer), []
    for bad in (False, False, True, True, False, False):
        before = np.asarray(state.params["kernel"], np.float64)
        state, metrics = step(state, slope_batch(loss=np.nan if bad else 0.0))
        moved = before - np.asarray(state.params["kernel"], np.float64)
        np.testing.assert_allclose(moved, 0.0 if bad else float(metrics["learning_rate"]), rtol=2e-5)
        rates.append(round(float(metrics["learning_rate"]), 6))
    assert rates == [0.1, 0.09, 0.08, 0.08, 0.08, 0.07], "a skipped step does not advance the schedule"
