"""What a run has learned in FP8 is what evaluation, chat, conversion and other runs read: codes times their factors."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from converting import converted
from safetensors.numpy import load_file

from data_pipelines.conversation import Conversation, Turn
from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.inference.load import open_model
from easylm_plus.interop import weights
from easylm_plus.models.transformer import Transformer, init_parameters
from easylm_plus.numerics.formats import decode, is_scaled
from easylm_plus.numerics.precision import precision
from easylm_plus.training import restore
from easylm_plus.training.checkpoint import locate, read_meta, read_parameters
from easylm_plus.training.contents import compare_runs
from easylm_plus.training.metrics import read_rows
from easylm_plus.training.restore import warm_start
from easylm_plus.training.stream import open_checkpoint
from easylm_plus.tree import path_name

STEPS = 6
VALUES = {
    "numerics__fp8_level": "O3", "numerics__fp8_window": 16, "optimizer__zero": "sharded", "mesh__replica": 2,
    "mesh__fsdp": 2, "mesh__tensor": 2, "model__scan_layers": True, "model__hidden_size": 32, "train__steps": STEPS,
    "checkpoint__every": STEPS, "eval__every": STEPS, "eval__samples": 2, "log__params_hash": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an O3 run on eight devices."""
    folder = tmp_path_factory.mktemp("o3")
    status, output = tiny.inside(f"--config={tiny.write_config(folder, **VALUES)}")
    assert status == 0 and "O3: " in output, output[-2000:]
    return folder


def evaluations(folder):
    """The held-out losses of a run's log."""
    return [row["eval/loss"] for row in read_rows(folder / "metrics.jsonl") if "eval/loss" in row]


@pytest.fixture(scope="module")
def kept(run):
    """name -> the weight as the checkpoint has it, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(read_parameters(*locate(run)), is_leaf=is_scaled)
    return {path_name(path): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def values(kept):
    """name -> what it stands for."""
    assert {name for name, leaf in kept.items() if is_scaled(leaf)} == {
        *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
        *(f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"),
    }
    return {name: np.asarray(decode(leaf)) for name, leaf in kept.items()}


@pytest.fixture
def decoded(monkeypatch):
    """Shapes of what is decoded on the host."""
    shapes = []

    def watched(leaf):
        if is_scaled(leaf):
            shapes.append(leaf.shape)
        return decode(leaf)

    for module in (weights, restore):
        monkeypatch.setattr(module, "decode", watched)
    return shapes


def test_evaluation_chat_and_inspection_read_it(run):
    """Three doors at a time; the held-out loss is that of the run's own log, of the same examples in other rows."""
    doors = {
        "evaluate": (f"--checkpoint={run}", "--examples=4", "--max_new_tokens=4", f"--output={run / 'figures.json'}"),
        "chat": (f"--checkpoint={run}", "--prompt=Add: 3 + 4", "--max_new_tokens=4"),
        "inspect": (f"--checkpoint={run}", "--only=params/layers/mlp"),
    }
    processes = {name: tiny.start(*options, door=f"easylm_plus.{name}") for name, options in doors.items()}
    outputs = {name: tiny.output_of(process) for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0 and "Traceback" not in outputs[name], outputs[name][-2000:]
    measured = json.loads((run / "figures.json").read_text())["eval/loss"]
    assert measured == pytest.approx(evaluations(run)[-1], abs=1e-5)
    assert "params/layers/mlp/up_proj/kernel" in outputs["inspect"] and "2x32x32" in outputs["inspect"]
    assert outputs["inspect"].count("Scaled: code float16, scale_inv float32") == 3
    assert outputs["chat"].strip() == answers(open_model(run))[0], "as in this process"


QUESTIONS = [Conversation("chat", "0", (Turn("user", text, 0.0),)) for text in ("Add: 3 + 4", "Reverse: a b c")]


def answers(opened):
    return opened.chatter().reply(QUESTIONS, 4)


def logits(opened):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    return np.asarray(tiny.applied(opened.model)({"params": opened.params}, tokens))


def test_codes_without_their_factor_are_another_model(run):
    opened = open_model(run)
    turned = lambda how: opened._replace(params=jax.tree.map(how, opened.params, is_leaf=is_scaled))
    dense, bare = turned(decode), turned(lambda x: x.code if is_scaled(x) else x)
    np.testing.assert_allclose(logits(opened), logits(dense), rtol=0, atol=1e-6)
    assert answers(opened) == answers(dense)
    assert np.abs(logits(opened) - logits(bare)).max() > 0.1


def test_ternary_weights_with_latents_in_codes_are_read_as_ternary(tmp_path):
    """By the run's own held-out evaluation, and by the other doors."""
    rules = ("mlp/.*=ternary", "self_attn/(q|k|v)_proj=plain")
    values = {"numerics__fp8_level": "O2", "numerics__rules": rules, "train__steps": 3, "eval__every": 3}
    status, output = tiny.inside(f"--config={tiny.write_config(tmp_path, **values, mesh__fsdp=4, mesh__tensor=2)}")
    assert status == 0, output[-2000:]
    figures = tmp_path / "figures.json"
    options = (f"--checkpoint={tmp_path}", "--examples=4", "--exact=", f"--output={figures}")
    assert tiny.run(*options, door="easylm_plus.evaluate")[0] == 0
    assert json.loads(figures.read_text())["eval/loss"] == pytest.approx(evaluations(tmp_path)[-1], abs=1e-5)
    opened = open_model(tmp_path)
    latents = opened._replace(params=read_parameters(*locate(tmp_path)))
    assert np.abs(logits(opened) - logits(latents)).max() > 0.01, "not as their latents"


# --- conversion and other runs ---


def test_conversion_writes_values_matrix_by_matrix(run, values, decoded, tmp_path):
    """To Hugging Face and back in float32, in which codes times factors are exact; in bfloat16 rounded once."""
    converted(input=run, output=tmp_path / "hf", to="hf")
    assert len(decoded) == 2 * 7 and {len(shape) for shape in decoded} == {2}, "2 layers of 7 matrices"
    tensor = load_file(tmp_path / "hf/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tensor.T, values["layers/mlp/up_proj/kernel"][1], strict=True)
    converted(input=tmp_path / "hf", output=tmp_path / "ours")
    converted(input=run, output=tmp_path / "direct")
    for folder in ("ours", "direct"):
        for path, found in jax.tree_util.tree_leaves_with_path(read_parameters(*locate(tmp_path / folder))):
            np.testing.assert_array_equal(found, values[path_name(path)], strict=True)
    converted(input=run, output=tmp_path / "narrow", dtype="bfloat16")
    for path, found in jax.tree_util.tree_leaves_with_path(read_parameters(*locate(tmp_path / "narrow"))):
        np.testing.assert_array_equal(found, values[path_name(path)].astype(found.dtype))


def test_weights_of_a_run_have_the_dtype_of_their_values(run):
    opened, _, _ = open_checkpoint(run)
    assert {str(opened.dtype(name)) for names in opened.groups for name in names} == {"float32"}


@pytest.mark.parametrize("scan", [True, False])
def test_a_bf16_run_starts_from_it(run, values, decoded, scan):
    """In the dtype of the new run's masters, here bfloat16, cut over a mesh, stacked or not."""
    shape = dataclasses.replace(open_model(run).model.config, scan_layers=scan)
    model = Transformer(shape, precision("bf16_pure"))
    fresh = jax.jit(lambda: init_parameters(model, jax.random.key(3)))()
    decoded.clear()
    found, taken = warm_start(fresh, run, model, ())
    assert {item.outcome for item in taken} == {"taken"}
    assert {len(shape) for shape in decoded} == {2}, "matrix by matrix"
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        wanted = values[path_name(path) if scan else re.sub(r"layers/\d/", "layers/", path_name(path))]
        if not scan and "layers/" in path_name(path):
            wanted = wanted[int(path_name(path).split("/")[1])]
        np.testing.assert_array_equal(leaf, wanted.astype(leaf.dtype), strict=True)


def test_an_o3_run_starts_from_plain_weights(run, tmp_path):
    """Those of the O3 run: it begins where that ended."""
    converted(input=run, output=tmp_path / "plain")
    (folder := tmp_path / "new").mkdir()
    start = {**VALUES, "train__steps": 3, "eval__samples": 0, "init_from__path": str(tmp_path / "plain")}
    status, output = tiny.inside(f"--config={tiny.write_config(folder, **start)}")
    folded = "".join(output.split())  # the table breaks long paths
    assert status == 0 and f"weightsof{tmp_path / 'plain'}" in folded, output[-2000:]
    first, *_, last = evaluations(folder)
    assert first == pytest.approx(evaluations(run)[-1], abs=1e-5) and last != pytest.approx(first, abs=1e-2)


# --- a run that is not the same ---


REFUSED = {
    "level": ({"numerics__fp8_level": "O2"}, "numerics.fp8_level: found 'O3', now 'O2'"),
    "window": ({"numerics__fp8_window": 1}, "numerics.fp8_window: found 16, now 1"),
    "master": ({"optimizer__master": "bf16"}, "optimizer.master: found '', now 'bf16'"),
    "moments": ({"optimizer__first_moment": "e5m2"}, "optimizer.first_moment: found '', now 'e5m2'"),
    "rounding": ({"optimizer__rounding": "nearest"}, "optimizer.rounding: found 'stochastic', now 'nearest'"),
    "rules": ({"numerics__rules": ("q_proj=plain",)}, "numerics.rules: found [], now ['q_proj=plain']"),
}
KERNEL = "layers/mlp/down_proj/kernel"
FORCED = {  # what does not fit even so: the first array of each
    "window": f"numerics/input/{KERNEL}/count: found int32[2], expected nothing",
    "master": f"params/{KERNEL}: found nothing, expected bfloat16[2, 32, 32]",
    "moments": f"opt_state/m/{KERNEL}/code: found float8_e4m3fn[2, 32, 32], expected float8_e5m2[2, 32, 32]",
}


def resumed(run, folder, **changes):
    """(exit status, what is said) of a run with changes that finds the checkpoints of another."""
    path = tiny.write_config(folder, **{**VALUES, **changes}, checkpoint__dir=str(run / "checkpoints"))
    status, output = tiny.inside(f"--config={path}")
    return status, output.partition("error: ")[2]


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused_in_one_message(name, run, tmp_path):
    values, line = REFUSED[name]
    status, told = resumed(run, tmp_path, **values)
    assert status == 1 and "Traceback" not in told
    lines = told.strip().splitlines()
    assert lines[0].endswith("/6 was written by another run:") and lines[1] == f"  {line}" and len(lines) == 3
    if name in FORCED:
        status, told = resumed(run, tmp_path, **values, checkpoint__force=True)
        lines = told.strip().splitlines()
        assert status == 1 and lines[0].endswith("/6 does not hold this model:") and f"  {FORCED[name]}" in lines


def test_where_masters_lie_may_change(run):
    """Another mesh and `optimizer.zero` are no other run."""
    meta, defaults = read_meta(*locate(run)), base().to_dict()
    moved = {**VALUES, "optimizer__zero": "none", "mesh__replica": 1, "mesh__fsdp": 4}
    compare_runs(meta, tiny.config(run, **moved).to_dict(), defaults, meta["data_hash"], "place")
    with pytest.raises(UserError, match=r"optimizer\.b1: found 0\.9, now 0\.8"):
        other = tiny.config(run, **moved, optimizer__b1=0.8).to_dict()
        compare_runs(meta, other, defaults, meta["data_hash"], "place")


@pytest.mark.slow
def test_a_run_whose_tensors_are_dealt_out_whole(tmp_path):
    """Its checkpoints are by name, like all; it continues from one exactly, and so does a run that cuts them."""
    values = {**VALUES, "optimizer__zero": "whole_tensor", "mesh__replica": 8, "mesh__fsdp": 1, "mesh__tensor": 1,
              "train__accumulate": 1, "train__steps": 4, "checkpoint__every": 2, "eval__every": 4}  # fmt: skip
    config = tiny.write_config(tmp_path, **values)
    status, output = tiny.inside(f"--config={config}")
    assert status == 0, output[-2000:]
    last = lambda: jax.tree.leaves(read_parameters(*locate(tmp_path)))
    wanted, losses = last(), evaluations(tmp_path)
    place = locate(tmp_path)[0]
    for zero in ("whole_tensor", "sharded"):
        shutil.rmtree(place / "4")
        status, output = tiny.inside(f"--config={config}", f"--config.optimizer.zero={zero}")
        assert status == 0 and "step 2 of" in output, output[-2000:]
        assert all((x == y).all() for x, y in zip(last(), wanted)) == (zero == "whole_tensor")
        assert evaluations(tmp_path)[-1] == pytest.approx(losses[-1], abs=0 if zero == "whole_tensor" else 1e-3)
