"""Weight differences: the model comes back bit for bit, and a wrong base is noticed."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_convert import GOLDEN, hashes, run

from easylm_plus.errors import UserError
from easylm_plus.interop.difference import FILE
from easylm_plus.interop.huggingface import load_hf, save_hf
from easylm_plus.training.checkpoint import locate, read_parameters


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a base, a model of the same shapes with extreme values, their difference)."""
    place = tmp_path_factory.mktemp("difference")
    shutil.copytree(GOLDEN / "mixtral_tiny", place / "base", ignore=shutil.ignore_patterns("*.npz", "meta.json"))
    model, params = load_hf(place / "base")
    rng = np.random.default_rng(0)
    changed = jax.tree.map(lambda x: np.array(x * rng.normal(1, 0.1, x.shape), np.float32), params)
    odd = changed["norm"]["weight"]
    odd[:6] = [np.inf, -0.0, 1e-42, 3e38, np.nan, -1e-30]  # what addition would not give back
    save_hf(model, changed, place / "target")
    (place / "target" / "generation_config.json").write_text("{}")
    run(input=place / "target", diff_base=place / "base", output=place / "difference")
    return place


def test_a_difference_gives_the_model_back_bit_for_bit(models, tmp_path):
    """From either of the base's formats, to either format."""
    run(input=models / "base", output=tmp_path / "base")
    for base in (models / "base", tmp_path / "base"):
        options = {"input": models / "difference", "diff_base": base, "recover": True, "force": True}
        run(output=tmp_path / "hf", to="hf", **options)
        assert hashes(tmp_path / "hf") == hashes(models / "target")
        run(output=tmp_path / "ours", **options)
        found, expected = read_parameters(*locate(tmp_path / "ours")), load_hf(models / "target")[1]
        same = lambda a, b: np.testing.assert_array_equal(a.view(np.uint32), np.asarray(b).view(np.uint32))
        jax.tree.map(same, found, expected)


def test_the_difference_is_not_the_model(models):
    target = load_file(models / "target/model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    stored = load_file(models / "difference/model.safetensors")["layers/1/self_attn/q_proj/kernel"]
    assert stored.dtype == np.uint32 and not np.isin(stored, target.view(np.uint32)).any()
    told = json.loads((models / "difference" / FILE).read_text())
    assert len(told["sha256"]["layers/1/mlp/experts/up_proj/kernel/3"]) == 64


def changed_base(models, tmp_path, name):
    shutil.copytree(models / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors[name].reshape(-1).view(np.uint32)[17] ^= 1
    save_file(tensors, tmp_path / "base/model.safetensors")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    (
        ("model.layers.1.self_attn.q_proj.weight", "layers/1/self_attn/q_proj/kernel"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "layers/0/mlp/experts/down_proj/kernel/3"),
        ("lm_head.weight", "lm_head/kernel"),
    ),
)
def test_one_wrong_bit_of_the_base_is_noticed(models, tmp_path, theirs, ours):
    base = changed_base(models, tmp_path, theirs)
    with pytest.raises(UserError, match=f"{ours} of .*base plus its difference has another checksum than the model"):
        run(input=models / "difference", diff_base=base, recover=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_base_of_another_shape_is_named(models, tmp_path):
    for options in ({"input": models / "target"}, {"input": models / "difference", "recover": True}):
        with pytest.raises(UserError, match=r"found \[.*\] in .*llama_tiny, .*; expected models of the same"):
            run(diff_base=GOLDEN / "llama_tiny", output=tmp_path / "out", **options)


def test_a_base_in_another_dtype_is_rounded_first(tmp_path):
    """LLaMA in float16, the model in bfloat16: whoever recovers has the same float16 base."""
    model, params = tiny.model(vocab=300, scan_layers=True)
    save_hf(model, params, tmp_path / "base", dtype=np.float16)
    save_hf(model, jax.tree.map(lambda x: x * 2, params), tmp_path / "target", dtype="bfloat16")
    run(input=tmp_path / "target", diff_base=tmp_path / "base", output=tmp_path / "difference")
    stored = load_file(tmp_path / "difference/model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.uint16)}
    options = {"diff_base": tmp_path / "base", "recover": True, "to": "hf"}
    run(input=tmp_path / "difference", output=tmp_path / "again", **options)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "target")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({}, "--recover needs --diff_base"),
        ({"diff_base": GOLDEN / "llama_tiny"}, "found no difference.json; expected one"),
    ),
)
def test_recovering_without_what_it_needs(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(input=GOLDEN / "llama_tiny", output=tmp_path / "out", recover=True, **options)


def test_a_difference_that_was_changed(models, tmp_path):
    shutil.copytree(models / "difference", tmp_path / "difference")
    path = tmp_path / "difference/model.safetensors"
    tensors = load_file(path)
    for change, message in (
        ({"norm/weight": tensors["norm/weight"][:3]}, r"norm/weight is uint32\(3,\), expected uint32\(64,\)"),
        ({"norm/weight": tensors["norm/weight"].view(np.float32)}, r"norm/weight is float32\(64,\), expected uint32"),
        ({"norm/weight": tensors["norm/weight"] + 1}, "norm/weight of .* has another checksum"),
    ):
        save_file(tensors | change, path)
        with pytest.raises(UserError, match=message):
            run(input=path.parent, diff_base=models / "base", recover=True, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda told: told["model"].update(newer=1), "model: found newer, which this version does not know"),
        (lambda told: told["model"].pop("hidden_size"), "model: found no hidden_size, expected a whole number"),
        (lambda told: told["model"].update(hidden_size="64"), "model: found hidden_size = '64', expected a whole"),
        (lambda told: told.pop("sha256"), "found no sha256, expected an object"),
        (lambda told: told["dtypes"].pop("norm/weight"), "found dtype None of norm/weight, expected one of float64"),
        (lambda told: told["dtypes"].update({"norm/weight": "float7"}), "found dtype 'float7' of norm/weight"),
        (lambda told: told.update(schema=2), "found schema 2, expected schema 1"),
        (lambda told: [], "found list, expected schema 1"),
    ),
)
def test_a_description_of_another_version(models, tmp_path, change, message):
    shutil.copytree(models / "difference", tmp_path / "difference")
    path = tmp_path / "difference/difference.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps([] if change(told) == [] else told))
    with pytest.raises(UserError, match=rf"difference\.json: {message}"):
        run(input=path.parent, diff_base=models / "base", recover=True, output=tmp_path / "out")


def test_a_difference_with_a_file_missing(models, tmp_path):
    shutil.copytree(models / "difference", tmp_path / "difference")
    Path(tmp_path / "difference/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"found no \*\.safetensors beside difference\.json"):
        run(input=tmp_path / "difference", diff_base=models / "base", recover=True, output=tmp_path / "out")
