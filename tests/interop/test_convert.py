"""The conversion door: to our checkpoints and back, byte for byte; what it refuses, and what it leaves behind."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from converting import run
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from test_llama2c import write

from easylm_plus.errors import UserError
from easylm_plus.inference.load import open_model
from easylm_plus.interop.configs import read_config
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.models.transformer import Transformer
from easylm_plus.training import stream
from easylm_plus.training.checkpoint import Checkpoints, locate, read_meta, read_parameters
from easylm_plus.training.restore import read_weights

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("llama_tiny", "qwen2_tiny", "yuan2_tiny", "yuan2_m32_moe_tiny", "mixtral_tiny", "bitnet_tiny")


def truncate(path):
    path.write_bytes(path.read_bytes()[:8190])


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- there and back ---


def published(name):
    """The tensors of a golden folder, without those that follow from others."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    tied = json.loads((GOLDEN / name / "config.json").read_text()).get("tie_word_embeddings", False)
    return {k: x for k, x in tensors.items() if not k.endswith("inv_freq") and not (tied and k == "lm_head.weight")}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, tmp_path):
    """hf -> ours -> hf -> ours -> hf: parameters as load_hf reads them, tensors as the folder had them."""
    run(input=GOLDEN / name, output=tmp_path / "ours")
    _, expected = load_hf(GOLDEN / name, numerics=())
    found = read_parameters(*locate(tmp_path / "ours"))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    assert_same_tensors(load_file(tmp_path / "hf/model.safetensors"), published(name))
    run(input=tmp_path / "hf", output=tmp_path / "again")
    run(input=tmp_path / "again", output=tmp_path / "hf2", to="hf")
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "hf2")
    assert read_config(tmp_path / "hf") == read_config(GOLDEN / name)
    raw, was = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", GOLDEN / name))
    assert raw["eos_token_id"] == was["eos_token_id"], "other keys of the original stay"


FIRST_LAYER = lambda right: lambda self, name, index: right(self, name, (0, *index[1:]) if index else index)
FIRST_EXPERT = lambda right: lambda self, name, index: right(self, name, (*index[:1], 0) if len(index) > 1 else index)
ZEROS = lambda right: lambda self, name, index: np.zeros_like(right(self, name, index))
TURNED = lambda right: lambda self, name, index: right(self, name, index)[::-1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    (
        ("llama_tiny", FIRST_LAYER),
        ("mixtral_tiny", FIRST_EXPERT),
        ("yuan2_m32_moe_tiny", FIRST_LAYER),
        ("qwen2_tiny", ZEROS),
        ("llama_tiny", TURNED),
    ),
)
def test_an_export_of_other_pieces_is_seen(name, wrong, tmp_path, monkeypatch):
    """The comparison above would notice, whatever is wrong with the reading of our checkpoints."""
    run(input=GOLDEN / name, output=tmp_path / "ours")
    monkeypatch.setattr(stream.Chunked, "_map", wrong(stream.Chunked._map))
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_same_tensors(load_file(tmp_path / "hf/model.safetensors"), published(name))


def test_one_changed_number_is_seen(tmp_path):
    """The comparison above would notice: a single bit of a single chunk."""
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours")
    chunk = tmp_path / "ours/0/state/params.layers.mlp.up_proj.kernel/1.0.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    _, expected = load_hf(GOLDEN / "llama_tiny")
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, read_parameters(*locate(tmp_path / "ours")), expected)


@pytest.mark.parametrize(("change", "message"), ((lambda p: p.unlink(), "no file"), (truncate, "8190 bytes")))
def test_a_damaged_piece_is_named(tmp_path, change, message):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours")
    change(tmp_path / "ours/0/state/params.layers.self_attn.v_proj.kernel/1.0.0")
    with pytest.raises(UserError, match=rf"v_proj\.kernel/1\.0\.0: found {message}, expected 16384 bytes of layers"):
        run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")


def test_the_checkpoint_is_one_like_any_other(hub, tmp_path):
    """It opens with its tokenizer and template, starts a run, and restores onto a mesh."""
    run(input=hub, output=tmp_path / "ours")
    opened, theirs = open_model(tmp_path / "ours"), open_model(hub)
    assert (
        type(opened.template) is type(theirs.template) and opened.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    )
    tokens = np.arange(12)[None]
    logits = [jax.jit(o.model.apply)({"params": o.params}, tokens) for o in (opened, theirs)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-6)
    assert opened.model.precision.name == "float32"
    for scan in (True, False):
        found = {}
        config = read_config(hub, scan_layers=scan)
        read_weights(tmp_path / "ours", Transformer(config, opened.model.precision), found.__setitem__)
        expected = {}
        read_weights(hub, Transformer(config, opened.model.precision), expected.__setitem__)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
    sharding = NamedSharding(jax.make_mesh((8,), ("fsdp",)), PartitionSpec())
    sharded = read_parameters(*locate(tmp_path / "ours"), sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(sharded))


def test_companions_travel_both_ways(hub, tmp_path):
    run(input=hub, output=tmp_path / "ours")
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (hub / name).read_bytes()


def test_a_run_of_ours_is_exported_from_its_average(tmp_path):
    """A checkpoint of training, in unrolled layers and written by orbax as it likes; the EMA goes out, not the rest."""
    model, params = tiny.model(vocab=300)
    average = jax.tree.map(lambda x: x + 1, params)
    run_config = {"model": vars(model.config), "numerics": {"precision": "bf16", "deterministic": True},
                  "data": {"template": "chat", "length": 64, "date": ""}}  # fmt: skip
    checkpoints = Checkpoints(tmp_path / "run", {"every": 1, "keep": 0, "keep_best": ""})
    state = {"params": params, "ema": average, "step": jnp.zeros((), jnp.int32)}
    checkpoints.save(3, state, {}, {"config": run_config}, {})
    checkpoints.close()
    words = shutil.copytree(tiny.data() / "tokenizer", tmp_path / "run/tokenizer") / "tokenizer.json"
    run(input=tmp_path / "run", output=tmp_path / "hf", to="hf", dtype="bfloat16")
    again = load_hf(tmp_path / "hf", jnp.bfloat16, scan_layers=False)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), again, average)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == words.read_bytes()
    with pytest.raises(UserError, match="has no step 2; it has 3"):
        run(input=tmp_path / "run", output=tmp_path / "copy", step=2)
    run(input=tmp_path / "run", output=tmp_path / "copy", step=3)
    copied = read_meta(tmp_path / "copy", 0)["config"]
    assert copied["data"]["template"] == "chat" and copied["numerics"] == run_config["numerics"]


def test_a_tokenizer_of_ones_own(hub, tmp_path):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "file", tokenizer=hub / "tokenizer.json", to="hf")
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "folder", tokenizer=hub, to="hf")
    assert (tmp_path / "file/tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()
    assert (tmp_path / "folder/tokenizer_config.json").is_file()
    with pytest.raises(UserError, match="nowhere: found no tokenizer there; expected its file or folder"):
        run(input=hub, output=tmp_path / "none", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_dtype(tmp_path, dtype):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours", dtype=dtype)
    meta = read_meta(tmp_path / "ours", 0)
    assert {info["dtype"] for info in meta["arrays"].values()} == {dtype}
    assert meta["config"]["numerics"]["precision"] == "bf16_pure"
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
        read_parameters(*locate(tmp_path / "ours")), load_hf(GOLDEN / "llama_tiny")[1],
    )  # fmt: skip


@pytest.mark.parametrize("tied", (True, False))
def test_llama2c(tmp_path, tied):
    """A file of the format that test_llama2c.py writes becomes a Hugging Face folder."""
    write(tmp_path / "model.bin", tied)
    run(input=tmp_path / "model.bin", output=tmp_path / "hf", to="hf")
    expected, found = load_llama2c(tmp_path / "model.bin")[1], load_hf(tmp_path / "hf")[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_folder_of_pieces_is_written_anew(hub, tmp_path):
    """Hugging Face to Hugging Face: other files, another dtype, the same tensors."""
    run(input=hub, output=tmp_path / "out", to="hf", dtype="float16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float16)),
        load_hf(tmp_path / "out")[1], load_hf(hub)[1],
    )  # fmt: skip
    assert len(list(hub.glob("*.safetensors"))) > 1 == len(list((tmp_path / "out").glob("*.safetensors")))
