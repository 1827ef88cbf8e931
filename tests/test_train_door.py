"""The training command from end to end: what it prints, writes and learns, and the ways its data are put on devices."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from data_pipelines.batches.batch_stats import digest
from data_pipelines.batches.training_data import chosen_sources
from data_pipelines.datasets import read_manifest
from data_pipelines.errors import InputError
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training import data as data_module
from easylm_plus.training.checkpoint import read_meta, steps
from easylm_plus.training.profile import Profiler

VALUES = {"train__steps": 30, "train__ema": 0.9, "checkpoint__every": 10, "checkpoint__keep": 2, "eval__every": 10,
          "eval__samples": 2, "log__every": 3, "train__profile": "2:4"}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, output) of a whole run as a process."""
    folder = tmp_path_factory.mktemp("run")
    status, output = tiny.run(f"--config={tiny.write_config(folder, **VALUES)}", "--config.train.seed=5")
    assert status == 0, output
    return folder, output


@pytest.fixture(scope="module")
def log(run):
    return [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]


def test_the_banner_tells_what_runs(run):
    _, output = run
    for words in ("14,288 parameters, float32", "1 x cpu", "letters 60", "sums 60", "8 rows x 64 = 512 tokens a step",
                  "30 steps, 15,360 tokens", "a device", "starts from random weights", "attention", "xla",
                  "dot f32 x f32", "done: 30 steps"):  # fmt: skip
        assert words in output
    for noise in ("Warning", "WARNING", "Traceback"):
        assert noise not in output


def test_the_log_has_each_step_once(log):
    training = [row for row in log if "loss" in row]
    assert [row["step"] for row in training] == list(range(3, 31, 3))
    for row in training:
        assert {"loss/sums", "loss/letters", "grad_norm", "learning_rate", "tokens_per_second", "examples"} <= set(row)
        assert not any(key.startswith("eval/") for key in row)
    evaluations = [row for row in log if "loss" not in row]
    assert [row["step"] for row in evaluations] == [0, 10, 20, 30]
    assert all(set(row) == {"step", "eval/loss", "eval/loss/sums", "eval/loss/letters"} for row in evaluations)


def test_it_learns(log):
    training, held_out = ([row[key] for row in log if key in row] for key in ("loss", "eval/loss"))
    assert training[-1] < 0.7 * training[0] and held_out[-1] < 0.7 * held_out[0]
    assert held_out[0] == pytest.approx(np.log(300), abs=1.5), "random weights know nothing"


def test_what_is_on_disk(run):
    folder, _ = run
    assert steps(folder / "checkpoints") == [20, 30]
    meta = read_meta(folder / "checkpoints", 30)
    assert meta["config"]["train"]["seed"] == 5 and meta["config"]["data"]["path"] == str(tiny.data())
    assert load_tokenizer(folder / "checkpoints/tokenizer").vocab_size == 300
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "trace").rglob("*.pb")), "the profile that was asked for"
    assert list(folder.glob("events.out.tfevents*"))


def test_a_finished_run_is_left_alone(run):
    folder, _ = run
    before = (folder / "metrics.jsonl").read_text()
    status, output = tiny.run(f"--config={folder / 'tiny_config.py'}", "--config.train.seed=5")
    assert status == 0 and f"starts from step 30 of {folder}/checkpoints" in output, output
    assert (folder / "metrics.jsonl").read_text() == before and steps(folder / "checkpoints") == [20, 30]


def test_a_warm_start_takes_the_weight_average(run, tmp_path):
    folder, _ = run
    values = {**VALUES, "init_from__path": str(folder), "train__steps": 1, "mesh__fsdp": 4, "mesh__tensor": 2,
              "train__profile": "", "train__seed": 5, "optimizer__warmup_steps": 0}  # fmt: skip
    status, output = tiny.inside(f"--config={tiny.write_config(tmp_path, **values)}")
    folded = "".join(output.split())  # the table breaks long paths
    assert status == 0 and f"startsfromweightsof{folder}" in folded, output
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert first["step"] == 0 and first["eval/loss"] == pytest.approx(last["eval/loss"], abs=1e-5)


def test_forcing_resumes_with_another_config_and_other_data(run, tmp_path):
    """The data order starts anew, since the old position means nothing in other data."""
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    values = {**VALUES, "train__steps": 32, "data__sources": ("sums=5", "letters=2"), "train__seed": 6,
              "mesh__fsdp": 4, "mesh__tensor": 2, "checkpoint__force": True, "train__profile": ""}  # fmt: skip
    status, output = tiny.inside(f"--config={tiny.write_config(tmp_path / 'run', **values)}")
    assert status == 0 and "starts from step 30" in output, output
    assert steps(tmp_path / "run/checkpoints")[-1] == 32


def test_a_run_that_resumes_within_its_profile_is_not_stopped_by_it(tmp_path):
    profiler = Profiler("2:4", str(tmp_path))
    profiler.before(3)
    profiler.after(4, jax.numpy.ones(1))
    assert not list(tmp_path.rglob("*.pb"))


# --- from the config to batches on devices ---


def config(**values):
    return tiny.config("unused", **values)


def test_a_batch_arrives_whole_on_any_mesh():
    mesh = make_mesh({"replica": 2, "fsdp": 2, "sequence": 2})
    wanted = config(train__accumulate=1)
    cut = data_module.batch_sharding(wanted, mesh)
    data = data_module.open_data(wanted)
    rows = data_module.local_rows(cut, 8, 64)
    assert rows == range(8)
    batch = next(data_module.make_loader(wanted, data, rows))
    placed = data_module.put(batch, cut, rows, 8)
    shapes = data_module.batch_shapes(wanted, cut)
    for name, array in batch.arrays.items():
        assert np.array_equal(placed[name], array) and placed[name].sharding == cut
        assert (placed[name].shape, placed[name].dtype) == (shapes[name].shape, shapes[name].dtype)
    assert {shard.data.shape for shard in placed["inputs"].addressable_shards} == {(2, 32)}


def test_the_hash_of_examples_tells_batches_apart():
    data = data_module.open_data(config())
    first, again = (data_module.make_loader(config(), data) for _ in range(2))
    hashes = [digest(next(first)) for _ in range(4)]
    assert hashes == [digest(next(again)) for _ in range(4)] and len(set(hashes)) == 4


def test_the_length_of_a_run():
    data = data_module.open_data(config())
    total = lambda **values: data_module.total_steps(config(train__steps=0, **values), data)
    assert data_module.total_steps(config(train__steps=7), data) == 7
    assert total(train__tokens=5 * 8 * 64) == 5 and total(train__tokens=5 * 8 * 64 + 1) == 6
    assert total(train__epochs=1.0, data__packing="none") == 15, "120 examples, 8 a step"
    assert total(train__epochs=2.0, data__packing="none") == 30
    packed = total(train__epochs=2.0)
    loader = data_module.make_loader(config(), data)
    examples = sum(len(row) for _ in range(packed) for row in next(loader).examples)
    assert examples == pytest.approx(240, rel=0.15), "an estimate from measured lengths"


def test_sources_and_weights():
    manifest = read_manifest(tiny.data())
    chosen = lambda *wanted: dict(zip(("names", "weights"), chosen_sources(wanted, manifest)))
    assert chosen() == {"names": ["letters", "sums"], "weights": {"letters": 1, "sums": 2}}
    assert chosen("sums") == {"names": ["sums"], "weights": {"sums": 2}}
    assert chosen("sums=5", "letters") == {"names": ["sums", "letters"], "weights": {"sums": 5, "letters": 1}}
    with pytest.raises(InputError, match=r"data.sources: found 'sum', expected one of letters, sums"):
        chosen_sources(("sum",), manifest)


def test_the_data_hash_names_data_tokenizer_and_template():
    hashes = {data_module.open_data(config(**values)).hash for values in ({}, {}, {"data__length": 32})}
    assert len(hashes) == 2 and jax.process_count() == 1


# --- experts ---


def test_experts_through_the_door(tmp_path):
    """What routing does is logged, over steps and over a restart; an expert has room for half of an even share."""
    experts = {"model__num_experts": 4, "model__capacity_factor": 0.5, "objective__router_balance": 0.01,
               "objective__router_z": 0.001, "train__accumulate": 1, "mesh__expert": 4, "checkpoint__every": 5,
               "log__every": 4, "eval__every": 0}  # fmt: skip
    for steps_so_far in (5, 8):
        config = f"--config={tiny.write_config(tmp_path, train__steps=5, **experts)}"
        more = (f"--config.train.steps={steps_so_far}", "--config.checkpoint.force=True")
        status, output = tiny.inside(config, *more)
        assert status == 0 and "4, products tiled" in output, output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        assert 0.2 < row["router/dropped"] < 0.8, "half, or less where a row ends in padding"
        assert 1 <= row["router/balance"] < 2 and 1 <= row["router/max_load"] <= 4 and row["router/z"] > 0
