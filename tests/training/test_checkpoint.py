"""Checkpoints come back bit for bit on any mesh, refuse what does not fit, and survive being cut off."""

import datetime
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training import checkpoint
from easylm_plus.training.checkpoint import Checkpoints, locate, read_meta, read_parameters
from easylm_plus.training.contents import compare_runs, describe
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.state import new_state, state_shardings

POLICY = {"every": 10, "keep": 2, "keep_best": ""}
P = PartitionSpec
SPECS = {"kernel": P("fsdp", "tensor"), "weight": P("fsdp"), "half": P(None, "fsdp")}
OPTIMIZER = adamw(base().optimizer, 10)


def parameters(seed=0):
    bits = np.random.default_rng(seed).integers(0, 2**16, (4, 8), np.uint16)
    return {"layers": {"kernel": jax.random.normal(jax.random.key(seed), (16, 8))},
            "norm": {"weight": jnp.linspace(0, 1, 8), "half": jnp.asarray(bits.view(ml_dtypes.bfloat16))}}  # fmt: skip


def a_state(seed=0, ema=True, sizes=None):
    """A state after a few made-up steps, over a mesh of these sizes."""
    state = new_state(parameters(seed), OPTIMIZER, ema)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    noise = lambda x: (x + 7 * jax.random.normal(next(keys), x.shape)).astype(x.dtype)
    state = jax.tree.map(noise, state)
    return jax.device_put(state, over(state, sizes or {}))


def over(state, sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    params = jax.tree_util.tree_map_with_path(lambda p, _: NamedSharding(mesh, SPECS[p[-1].key]), state.params)
    return state_shardings(state, params, mesh)


def target(state, sizes=None):
    shardings = over(state, sizes or {})
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def save(folder, step, state, scores=None, config=None, **policy):
    saved = Checkpoints(folder, {**POLICY, **policy})
    saved.save(step, state, {"loader": [step]}, {"config": config or {}, "data_hash": "d"}, scores or {})
    saved.close()
    return saved


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, state): one checkpoint written from eight devices."""
    folder, state = tmp_path_factory.mktemp("written"), a_state(sizes={"fsdp": 8})
    save(folder, 10, state)
    return folder, state


# --- what comes back ---


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {}], ids=str)
def test_round_trip_is_bitwise_on_any_mesh(written, sizes):
    folder, state = written
    wanted = target(state, sizes)
    restored, data = Checkpoints(folder, POLICY).restore(10, wanted)
    assert bits(restored) == bits(state) and data == {"loader": [10]}
    assert bits(restored) != bits(a_state(seed=1)), "another state would be told apart"
    assert jax.tree.map(lambda x: (x.sharding, x.dtype), restored) == jax.tree.map(
        lambda x: (x.sharding, x.dtype), wanted
    )


def test_from_mesh_to_mesh_to_one_device(written, tmp_path):
    folder, state = written
    for number, sizes in enumerate(({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {})):
        restored, _ = Checkpoints(folder, POLICY).restore(10, target(state, sizes))
        folder = tmp_path / str(number)
        save(folder, 10, restored)
    assert bits(restored) == bits(state)


@pytest.mark.parametrize("ema", [True, False])
def test_the_parameters_alone_are_the_weight_average_where_there_is_one(tmp_path, ema):
    state = a_state(ema=ema, sizes={"fsdp": 8})
    save(tmp_path, 10, state)
    found = read_parameters(tmp_path, 10, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert bits(found) == bits(state.ema if ema else state.params)
    assert describe(found) == describe(state.ema if ema else state.params)
    if ema:
        assert bits(found) != bits(state.params)


def test_a_save_is_not_disturbed_by_what_happens_to_the_arrays_after_it(tmp_path):
    """The step donates its state while the checkpoint is still being written."""
    state = a_state()
    wanted = bits(state)
    saved = Checkpoints(tmp_path, POLICY)
    saved.save(10, state, {}, {"config": {}, "data_hash": ""}, {})
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 3, s), donate_argnums=0)
    for _ in range(20):
        state = spoil(state)
    saved.close()
    assert bits(Checkpoints(tmp_path, POLICY).restore(10, target(state))[0]) == wanted


# --- which ones are kept ---


def kept_after(folder, scores, **policy):
    """The steps left after saving at those of `scores`; temporary ones are those that are no multiple of 10."""
    saved = Checkpoints(folder, {**POLICY, **policy})
    for step, score in scores.items():
        state = {"x": jnp.full(2, float(step))}
        saved.save(step, state, {}, {"config": {}, "data_hash": ""}, {} if score is None else {"eval/loss": score})
    saved.close()
    return checkpoint.steps(folder)


@pytest.mark.parametrize(
    "steps, policy, wanted",
    [
        ((10, 20, 30, 40), {}, [30, 40]),
        ((10, 20, 30), {"keep": 0}, [10, 20, 30]),
        ((10, 15, 20, 25), {}, [10, 20, 25]),  # 25 is temporary, 15 was
        ((10, 15, 20, 25, 30), {}, [20, 30]),
    ],
)
def test_the_last_ones_are_kept_and_temporary_ones_go(tmp_path, steps, policy, wanted):
    assert kept_after(tmp_path, dict.fromkeys(steps), **policy) == wanted


def test_the_best_one_is_kept_as_well(tmp_path):
    scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0, 50: 5.0}
    assert kept_after(tmp_path / "best", scores, keep_best="eval/loss") == [20, 40, 50]
    assert kept_after(tmp_path / "plain", scores) == [40, 50]


def test_the_best_one_is_kept_across_a_restart(tmp_path):
    kept_after(tmp_path, {10: 1.0, 20: 2.0}, keep_best="eval/loss")
    assert kept_after(tmp_path, {30: 3.0, 40: 4.0, 50: None}, keep_best="eval/loss") == [10, 40, 50]


def test_temporary_ones_are_due_after_minutes():
    now = datetime.datetime.now()
    ago = lambda minutes: now - datetime.timedelta(minutes=minutes)
    assert checkpoint.due(ago(31), 30, 1) and not checkpoint.due(ago(29), 30, 1) and not checkpoint.due(ago(999), 0, 1)


# --- what is refused ---


RUN = {"train": {"seed": 0, "steps": 9, "profile": ""}, "optimizer": {"b1": 0.9}, "data": {"sources": (), "path": "p"},
       "log": {"dir": "a"}}  # fmt: skip


def changed(**values):
    config = json.loads(json.dumps(RUN))
    for name, value in values.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def test_the_same_run_is_accepted():
    found = {"config": json.loads(json.dumps(RUN)), "data_hash": "d"}
    compare_runs(found, RUN, {}, "d", "place")
    compare_runs(found, changed(log__dir="b", train__profile="1:2", data__path="q"), {}, "d", "place")


@pytest.mark.parametrize(
    "new, data, lines",
    [
        (changed(train__seed=1), "d", ["  train.seed: found 0, now 1"]),
        (changed(optimizer__b1=0.8, train__steps=8), "d",
         ["  optimizer.b1: found 0.9, now 0.8", "  train.steps: found 9, now 8"]),
        (changed(data__sources=["x"]), "d", ["  data.sources: found [], now ['x']"]),
        (RUN, "e", ["  the data: found hash d, now e"]),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_the_names_of_what_changed(new, data, lines):
    with pytest.raises(UserError) as error:
        compare_runs({"config": json.loads(json.dumps(RUN)), "data_hash": "d"}, new, {}, data, "runs/x/9")
    found = str(error.value).splitlines()
    assert found[0] == "runs/x/9 was written by another run:" and found[1:-1] == lines
    assert "checkpoint.force=True" in found[-1]


def differ(old, new):
    """Whether a checkpoint of a run with the section `old` is refused by one with the section `new`."""
    try:
        known = {"size": 1, "filter": "plain", "causal": True}
        defaults = {"model": {key: known[key] for key in new}}  # a default for every key there is, and no other
        compare_runs({"config": {"model": old}, "data_hash": "d"}, {"model": new}, defaults, "d", "place")
    except UserError as error:
        return str(error).splitlines()[1:-1]
    return []


@pytest.mark.parametrize("value", ["", 0, 0.0, False, (), None], ids=repr)
def test_a_key_that_no_longer_exists_may_have_been_empty(value):
    assert differ({"size": 2, "old": value}, {"size": 2}) == []
    assert differ({"size": 2, "old": "set"}, {"size": 2}) == ["  model.old: found 'set', now None"]


def test_what_an_older_checkpoint_lacks_counts_as_the_default():
    """With another value the new run would compute something else than the old one did."""
    assert differ({"size": 2}, {"size": 2, "filter": "plain", "causal": True}) == []
    assert differ({"size": 2}, {"size": 2, "filter": "lfa"}) == ["  model.filter: found 'plain', now 'lfa'"]
    assert differ({"size": 2}, {"size": 2, "causal": False}) == ["  model.causal: found True, now False"]
    assert differ({"filter": "plain"}, {"filter": "plain", "size": 2}) == ["  model.size: found 1, now 2"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"kernel": s["kernel"][:8]}, r"kernel: found float32\[16, 8\], expected float32\[8, 8\]"),
        (lambda s: {"kernel": s["kernel"].astype(jnp.bfloat16)}, r"kernel: found float32\[16, 8\], expected bfloat16"),
        (lambda s: {**s, "bias": s["kernel"][0]}, r"bias: found nothing, expected float32\[8\]"),
        (lambda s: {"weight": s["kernel"]}, r"kernel: found float32\[16, 8\], expected nothing"),
    ],
)
def test_another_model_is_refused_by_the_name_of_the_array(tmp_path, change, message):
    state = {"kernel": jnp.ones((16, 8))}
    save(tmp_path, 10, state)
    abstract = jax.eval_shape(change, state)
    with pytest.raises(UserError, match=r"10 does not hold this model:\n(.*\n)*  " + message):
        Checkpoints(tmp_path, POLICY).restore(10, abstract)


# --- what is broken ---


def test_a_half_written_save_is_ignored_and_swept_away(tmp_path):
    state = {"x": jnp.arange(4.0)}
    save(tmp_path, 10, state)
    save(tmp_path, 20, state)
    half = tmp_path / "20.orbax-checkpoint-tmp"
    (tmp_path / "20").rename(half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert checkpoint.steps(tmp_path) == [10] and locate(tmp_path)[1] == 10
    saved = Checkpoints(tmp_path, POLICY)
    assert saved.latest() == 10
    restored, _ = saved.restore(10, jax.eval_shape(lambda: state))
    assert bits(restored) == bits(state)
    saved.save(20, state, {}, {"config": {}, "data_hash": ""}, {})
    saved.close()
    assert checkpoint.steps(tmp_path) == [10, 20] and not half.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda meta: shutil.rmtree(meta),
        lambda meta: (meta / "metadata").write_text('{"schema": 1, "arra'),
        lambda meta: (meta / "metadata").write_text(""),
        lambda meta: (meta / "metadata").write_text("{}"),
        lambda meta: (meta / "metadata").write_bytes(b"\xff\x00\x12"),
    ],
    ids=["no folder", "cut off", "empty", "no keys", "not text"],
)
def test_damaged_meta_is_one_clear_error(written, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(written[0], folder)
    damage(folder / "10" / "meta")
    with pytest.raises(UserError, match=r"copy/10: found no readable meta; expected a checkpoint of easylm_plus"):
        read_meta(folder, 10)


def test_another_schema_is_refused(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written[0], folder)
    path = folder / "10" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(UserError, match=r"found checkpoint schema 99, expected 1"):
        read_meta(folder, 10)


def test_locate(tmp_path):
    with pytest.raises(UserError, match=r"found no checkpoint; expected a run's log.dir or its checkpoint folder"):
        locate(tmp_path)
    save(tmp_path / "checkpoints", 10, {"x": jnp.ones(2)})
    assert locate(tmp_path) == locate(tmp_path / "checkpoints") == (tmp_path / "checkpoints", 10)
    with pytest.raises(UserError, match=r"has no step 11; it has 10"):
        locate(tmp_path, 11)
