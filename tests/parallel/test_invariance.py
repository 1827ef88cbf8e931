"""The same run on one device and on eight, however they are arranged: equal losses, and no array copied whole.

The runs are made by this file as a program of its own, since the compiler writes "Involuntary full
rematerialization" to its log, and writes it only when it really compiles.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MESHES = {
    "1x8": {"tensor": 8},
    "2x4": {"fsdp": 2, "tensor": 4},
    "4x2": {"fsdp": 4, "tensor": 2},
    "8x1": {"fsdp": 8},
    "replica, fsdp, sequence": {"replica": 2, "fsdp": 2, "sequence": 2},
    "fsdp, sequence, tensor": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
EXPERT_MESHES = {
    "experts": {"fsdp": 2, "expert": 4},
    "experts, tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "experts, sequence": {"expert": 2, "sequence": 2, "tensor": 2},
}
# each mesh with one of the two ways in which layers run, all of three axes with layers that are scanned
QUICK = {
    "scanned": ("1x8", "2x4", "8x1", "replica, fsdp, sequence", "fsdp, sequence, tensor"),
    "unrolled": ("4x2", "fsdp, sequence, tensor"),
    "experts": tuple(EXPERT_MESHES),
}
ALL = {"scanned": tuple(MESHES), "unrolled": tuple(MESHES), "experts": tuple(EXPERT_MESHES)}
CASES = [
    pytest.param(kind, mesh, marks=() if mesh in QUICK[kind] else pytest.mark.slow)
    for kind, meshes in ALL.items()
    for mesh in meshes
]
STEPS, ROWS, LENGTH, VOCAB, RATE = 10, 16, 32, 64, 1e-3
TOLERANCE = 1e-5
COPIED = "Involuntary full rematerialization"
MARK = "== "  # starts the line that names, in the log, what is compiled next
ROOT = Path(__file__).parents[2]


def started(kind, meshes):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__, kind, *meshes], env=env, **pipes)


@pytest.fixture(scope="module")
def results(request):
    """kind -> ({mesh: losses}, {mesh: compile log}) of three models, run side by side."""
    found, meshes = {}, ALL if "slow" in request.config.option.markexpr else QUICK
    with contextlib.ExitStack() as stack:
        processes = {kind: stack.enter_context(started(kind, meshes[kind])) for kind in ALL}
        for kind, process in processes.items():
            output, log = process.communicate(timeout=800)
            assert process.returncode == 0, log[-3000:]
            found[kind] = json.loads(output), dict(part.split("\n", 1) for part in log.split(MARK)[1:])
    return found


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_losses_do_not_depend_on_the_mesh(results, kind, mesh):
    losses, _ = results[kind]
    assert len(losses["one"]) == STEPS and losses["one"][-1] < losses["one"][0]
    np.testing.assert_allclose(losses[mesh], losses["one"], rtol=0, atol=TOLERANCE)


def test_scanned_and_unrolled_are_one_model(results):
    np.testing.assert_allclose(results["scanned"][0]["one"], results["unrolled"][0]["one"], rtol=0, atol=TOLERANCE)


def test_a_wrong_reduction_is_seen(results):
    """Averaging the means of rows, as a mean over data-parallel devices does, fails the check at every step."""
    losses, _ = results["scanned"]
    assert np.all(np.abs(np.subtract(losses["mean of rows"], losses["one"])) > 100 * TOLERANCE)


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_no_array_is_copied_whole(results, kind, mesh):
    assert COPIED not in results[kind][1][mesh]


def test_a_copied_array_is_seen(results):
    assert COPIED in results["scanned"][1]["bad"]


# --- the program ---


def main(kind, *meshes):
    import jax
    import tiny

    from easylm_plus.objectives.lm import LanguageModel

    class MeanOfRows(LanguageModel):
        def __call__(self, params, batch, denominators):
            weights = batch["loss_weights"]
            weights = weights / weights.sum(1, keepdims=True).clip(1) / len(weights)
            return super().__call__(params, {**batch, "loss_weights": weights}, {"loss": 1.0})

    experts = {"num_experts": 4, "capacity_factor": 1.0} if kind == "experts" else {}
    built, params = tiny.model(VOCAB, hidden_size=32, intermediate_size=64, head_dim=8, scan_layers=kind != "unrolled",
                               **experts)  # fmt: skip
    params = jax.tree.map(np.asarray, params)
    objective = LanguageModel(built, 2, chunk=32, router_balance=0.01, router_z=0.001)
    losses = {"one": train(objective, params, {})}
    for name in meshes:
        print(MARK + name, file=sys.stderr, flush=True)
        losses[name] = train(objective, params, (EXPERT_MESHES if experts else MESHES)[name])
    if kind == "scanned":
        losses["mean of rows"] = train(MeanOfRows(built, 2, chunk=32), params, {})
        print(MARK + "bad", file=sys.stderr, flush=True)
        badly_sharded()
    json.dump(losses, sys.stdout)


def train(objective, params, sizes):
    """The losses of the steps, with the parts and in the way of easylm_plus/train.py."""
    import jax
    import tiny
    from jax.sharding import NamedSharding, PartitionSpec

    from easylm_plus.config import base
    from easylm_plus.models.transformer import abstract_parameters
    from easylm_plus.numerics.levels import Numerics
    from easylm_plus.parallel import sharding
    from easylm_plus.parallel.mesh import make_mesh
    from easylm_plus.training.optimizer import adamw
    from easylm_plus.training.state import new_state, state_shardings
    from easylm_plus.training.step import make_train_step

    config = base()
    config.optimizer.update({"learning_rate": RATE, "weight_decay": 0.1, "schedule": "constant"})
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    optimizer, model = adamw(config.optimizer, STEPS), objective.model
    rules = sharding.rules_for(mesh, model.config.num_heads, model.config.num_kv_heads)
    with sharding.use(mesh, rules):
        shapes, axes = abstract_parameters(model)
        numerics = Numerics(config.numerics, config.optimizer, model.precision, shapes, axes)
        make_state = lambda p: new_state(p, optimizer, ema=False, numerics=numerics)
        shardings = state_shardings(jax.eval_shape(make_state, shapes), sharding.shardings(axes, shapes, mesh), mesh)
        state = jax.device_put(make_state(params), shardings)
        whole = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(make_train_step(objective, optimizer, config.train, numerics),
                       donate_argnums=0, out_shardings=(shardings, whole))  # fmt: skip
        cut = NamedSharding(mesh, sharding.spec_of(("batch", "length"), (ROWS, LENGTH), mesh))
        losses = []
        for number in range(STEPS):
            batch = tiny.random_batch(ROWS, LENGTH, VOCAB, seed=number % 3)
            state, metrics = step(state, jax.device_put(batch, cut))
            losses.append(float(metrics["loss"]))
    return losses


def badly_sharded():
    """Two programs that compilers of different versions can only do by copying an array whole."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from easylm_plus.parallel.mesh import make_mesh

    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    over = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    on = lambda dtype, shape, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=over(*spec))
    pinned = jax.lax.with_sharding_constraint
    x = on(jnp.float32, (8, 32, 32), ("replica", "tensor"))
    jax.jit(lambda x: pinned(jnp.sin(x), over(None, "tensor", "replica"))).lower(x).compile()

    rows = lambda w, ids, y: (pinned(jnp.take(w, ids, axis=0, mode="clip"), over("fsdp")) * y).sum()
    table = (
        on(jnp.float32, (64, 32), "tensor", "fsdp"),
        on(jnp.int32, (16, 8), "fsdp"),
        on(jnp.float32, (16, 8, 32), "fsdp"),
    )
    jax.jit(jax.grad(rows), out_shardings=over("tensor", "fsdp")).lower(*table).compile()


if __name__ == "__main__":
    main(*sys.argv[1:])
