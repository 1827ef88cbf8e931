"""Hugging Face's packed BitNet formats, both ways: bytes, both conventions of the scale, and a model that they hold."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from converting import converted, refuse
from safetensors.numpy import load_file, save_file

from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.inference.load import open_model
from easylm_plus.interop.bitnet import (
    PackedTensors,
    is_ternary_name,
    pack_rows,
    packed_tensors,
    quantization_config,
    unpack_rows,
)
from easylm_plus.interop.configs import read_raw
from easylm_plus.interop.huggingface import load_hf, open_weights, save_hf
from easylm_plus.interop.tensor_files import safetensors_of
from easylm_plus.interop.weights import piece_shapes, ternary_names
from easylm_plus.numerics import deploy
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.packed_ternary import PackedTernary, pack, packed
from easylm_plus.numerics.rules import BITNET, assign, attach
from easylm_plus.numerics.verbs import project
from easylm_plus.training.checkpoint import locate, read_parameters
from easylm_plus.training.restore import warm_start
from easylm_plus.training.stream import open_checkpoint

GOLDEN = tiny.ROOT / "tests/golden/quant"
OFFLINE = ("autobitlinear", "bitlinear")
Q_PROJ, UP = "model.layers.1.self_attn.q_proj.weight", "layers/mlp/up_proj/kernel"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def is_packed(x):
    return isinstance(x, PackedTernary)


# --- bytes ---


@pytest.mark.parametrize("case", sorted({k.rpartition(".")[0] for k in golden("hf_pack")} - {"12"}))
def test_packing_is_that_of_transformers(case):
    """Padding of theirs unpacks to -1, and is not ours."""
    codes, bytes_, unpacked = (golden("hf_pack")[f"{case}.{part}"] for part in ("codes", "packed", "unpacked"))
    np.testing.assert_array_equal(pack_rows(codes), bytes_)
    np.testing.assert_array_equal(unpack_rows(bytes_, len(codes)), codes)
    whole = unpack_rows(bytes_, len(unpacked))
    np.testing.assert_array_equal(whole, unpacked)
    assert (whole[len(codes) :] == -1).all()


def test_rows_that_lie_side_by_side_are_another_matrix():
    codes = golden("hf_pack")["64x96.codes"]
    side_by_side = np.concatenate([codes[i::4] for i in range(4)])
    assert (pack_rows(side_by_side) != golden("hf_pack")["64x96.packed"]).mean() > 0.5


@pytest.mark.parametrize("form", OFFLINE)
def test_a_layer_by_either_convention(form):
    """transformers' own outputs; by the other convention it is another layer."""
    arrays = golden("bitlinear_ste")
    scale = arrays["offline.bitlinear_weight_scale(divide)" if form == "bitlinear" else
                   "offline.autobitlinear_weight_scale(multiply)"]  # fmt: skip
    x, y = jnp.asarray(arrays["plain.x"]), arrays[f"offline.{form}_y"]

    class Tensors:
        place = "here"
        tensors = {"w": arrays["offline.packed"], "w_scale": scale}  # noqa: RUF012
        names = tensors.keys
        read = tensors.get
        dtype = lambda self, name: self.read(name).dtype
        shape = lambda self, name: self.read(name).shape

    def layer(form):
        read = PackedTensors(Tensors(), form, {"w": (64, 96)})
        assert read.names() == {"w"} and read.shape("w") == (64, 96)
        codes, gamma = read.ternary("w")
        np.testing.assert_array_equal(read.read("w"), codes * np.float32(gamma))
        return np.asarray(project(x, PackedTernary(jnp.asarray(pack(codes.T)), jnp.float32(gamma), 96)))

    np.testing.assert_allclose(layer(form), y, rtol=0, atol=1e-5)
    (other,) = set(OFFLINE) - {form}
    assert np.abs(layer(other) - y).max() > 10 * np.abs(y).max()
    codes, gamma = PackedTensors(Tensors(), form, {"w": (64, 96)}).ternary("w")
    again, back = packed_tensors(codes, gamma, form)
    np.testing.assert_array_equal(again, arrays["offline.packed"])
    np.testing.assert_allclose(back, scale, rtol=1.2e-7)


# --- a model ---


def write_golden(folder, form, **changes):
    """The golden model as transformers packs it."""
    arrays, raw = golden("tiny_bitnet_model"), json.loads((GOLDEN / "tiny_bitnet_config.json").read_text())
    raw |= {"architectures": ["BitNetForCausalLM"], "quantization_config": quantization_config(form)} | changes
    tensors = {name.removeprefix("param."): x for name, x in arrays.items() if name.startswith("param.")}
    for name, codes in arrays.items():
        if name.startswith("packed."):
            name = name.removeprefix("packed.")
            inverse = arrays[f"inv_scale.{name}"]
            tensors[f"{name}.weight"] = codes
            tensors[f"{name}.weight_scale"] = inverse if form == "bitlinear" else 1 / inverse
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(params=OFFLINE)
def folder(request, tmp_path):
    return write_golden(tmp_path / request.param, request.param)


def logits(model, params, ids=None):
    ids = golden("tiny_bitnet_model")["ids"] if ids is None else ids
    return np.asarray(jax.jit(model.apply)({"params": params}, ids))


def test_a_packed_model_computes_what_transformers_does(folder):
    arrays = golden("tiny_bitnet_model")
    model, params = load_hf(folder)
    leaf = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert is_packed(leaf) and leaf.shape == (2, 64, 96)
    np.testing.assert_allclose(logits(model, params), arrays["logits_packed"], rtol=0, atol=1e-5)
    start, tokens = arrays["ids"][0, :5].tolist(), arrays["greedy_from_ids0_first5"].tolist()
    assert Generator(model, params, stop_ids=())([start], len(tokens)) == [tokens]
    again = attach(jax.tree.map(decode, params, is_leaf=is_packed), BITNET)
    assert np.abs(logits(model, again) - arrays["logits_packed"]).max() > 0.1, "rounded again gamma is another"
    float_activations = jax.tree.map(decode, params, is_leaf=is_packed)
    assert np.abs(logits(model, float_activations) - arrays["logits_packed"]).max() > 1e-3


def test_the_wrong_convention_is_gibberish(folder):
    """Nothing but config.json tells them apart."""
    raw = read_raw(folder)
    (other,) = set(OFFLINE) - {raw["quantization_config"]["linear_class"]}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization_config(other)}))
    assert np.abs(logits(*load_hf(folder)) - golden("tiny_bitnet_model")["logits_packed"]).max() > 0.1


def test_absent_keys_mean_bitlinear(tmp_path):
    folder = write_golden(tmp_path / "b", "bitlinear", quantization_config={"quant_method": "bitnet"})
    np.testing.assert_allclose(logits(*load_hf(folder)), golden("tiny_bitnet_model")["logits_packed"], atol=1e-5)


def test_pieces_are_codes_and_gamma(folder):
    weights = open_weights(folder)
    name = "layers/{i}/self_attn/q_proj/kernel"
    assert ternary_names(weights) == weights.packed_names == set(filter(is_ternary_name, piece_shapes(weights.config)))
    codes, gamma = weights.ternary(name, (1,))
    assert codes.dtype == np.int8 and set(np.unique(codes)) == {-1, 0, 1}
    np.testing.assert_array_equal(weights.read((name,), (1,))[0], codes * np.float32(gamma))
    assert weights.ternary("embed_tokens/embedding", ()) is None


def same_bytes(one, other):
    first, second = (load_file(place / "model.safetensors") for place in (one, other))
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name].view(np.uint8), second[name].view(np.uint8)) for name in first)


@pytest.mark.parametrize("scan", (True, False))
def test_there_and_back(folder, tmp_path, monkeypatch, scan):
    """Through a checkpoint of ours, in which codes are codes; and into the other convention."""
    converted(input=folder, output=tmp_path / "ours")
    params = read_parameters(*locate(tmp_path / "ours"))
    expected = load_hf(folder)[1]
    assert is_packed(params["layers"]["mlp"]["up_proj"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, expected))
    converted(input=tmp_path / "ours", output=tmp_path / "back", to="hf")
    assert read_raw(tmp_path / "back")["quantization_config"] == read_raw(folder)["quantization_config"]
    if folder.name == "autobitlinear":
        assert same_bytes(folder, tmp_path / "back")
    np.testing.assert_allclose(logits(*load_hf(tmp_path / "back")), logits(*load_hf(folder)), atol=1e-5)
    (other,) = set(OFFLINE) - {folder.name}
    converted(input=folder, output=tmp_path / "other", to="hf", hf_ternary=other)
    np.testing.assert_allclose(logits(*load_hf(tmp_path / "other")), logits(*load_hf(folder)), atol=1e-5)
    assert not same_bytes(folder, tmp_path / "other")
    model, params = load_hf(folder, scan_layers=scan)
    save_hf(model, params, tmp_path / "saved", ternary=folder.name)
    np.testing.assert_allclose(logits(*load_hf(tmp_path / "saved")), logits(model, params), atol=1e-5)


# --- from a run of ours ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with ternary rules on all layers."""
    folder = tmp_path_factory.mktemp("ternary")
    values = {"numerics__rules": BITNET, "model__sub_norms": True, "model__scan_layers": True, "train__steps": 2,
              "mesh__replica": 2, "mesh__fsdp": 2, "mesh__tensor": 2}  # fmt: skip
    status, output = tiny.inside(f"--config={tiny.write_config(folder, **values)}")
    assert status == 0, output[-2000:]
    return folder


def test_a_ternary_run_goes_out_ternary(run, tmp_path):
    """Packed by default; before, its latents went out as the weights of a dense model."""
    opened = open_model(run)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = logits(opened.model, opened.params, ids)
    for form in (None, "bitlinear", "online"):
        options = {} if form is None else {"hf_ternary": form}
        converted(input=run, output=tmp_path / str(form), to="hf", **options)
        assert read_raw(tmp_path / str(form))["quantization_config"] == quantization_config(form or "autobitlinear")
        model, params = load_hf(tmp_path / str(form))
        np.testing.assert_allclose(logits(model, params, ids), expected, atol=1e-4)
    latents = load_hf(tmp_path / "online", numerics=())[1]
    assert np.abs(logits(model, latents, ids) - expected).max() > 0.05, "as a dense model"
    tensors = load_file(tmp_path / "None" / "model.safetensors")
    assert tensors[Q_PROJ].dtype == np.uint8 and tensors[Q_PROJ].shape == (4, 16)
    own, leaf = read_parameters(*locate(run)), load_hf(tmp_path / "None")[1]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(leaf.codes, packed(jnp.asarray(own["layers"]["mlp"]["up_proj"]["kernel"])).codes)
    converted(input=run, output=tmp_path / "narrow", to="hf", dtype="bfloat16")
    narrow = load_hf(tmp_path / "narrow")[1]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(narrow.codes, leaf.codes)  # of the latents as they were trained


def test_a_ternary_run_stays_trainable_as_ours(run, tmp_path):
    converted(input=run, output=tmp_path / "ours")
    weights = open_checkpoint(tmp_path / "ours")[0]
    assert not weights.packed_names and weights.dtype("layers/{i}/mlp/up_proj/kernel") == np.float32
    opened = open_model(tmp_path / "ours")
    assert deploy.is_packed(opened.params) and opened.config["numerics"]["rules"], (
        "rounded only as it is opened to be used"
    )


def test_a_difference_of_a_ternary_run_is_ternary(run, tmp_path):
    """Its latents come back as latents: what they mean is told with them."""
    model, params = tiny.model(vocab=300, sub_norms=True, scan_layers=True)
    save_hf(model, params, tmp_path / "base", tokenizer_from=tiny.data() / "tokenizer")
    converted(input=run, diff_base=tmp_path / "base", output=tmp_path / "difference")
    again = {"input": tmp_path / "difference", "diff_base": tmp_path / "base", "recover": True}
    converted(output=tmp_path / "ours", **again)
    opened, expected = open_model(tmp_path / "ours", template="text"), open_model(run)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    np.testing.assert_array_equal(*(logits(m.model, m.params, ids) for m in (opened, expected)))
    converted(output=tmp_path / "hf", to="hf", **again)
    assert read_raw(tmp_path / "hf")["quantization_config"] == quantization_config("autobitlinear")
    refuse("expected --quantize=ternary, which is exactly it", output=tmp_path / "x", quantize="int4", **again)


def test_training_goes_on_from_packed_weights(run, tmp_path):
    """With the codes and scales that were packed, not with smaller ones: the first loss is that of the model found."""
    converted(input=run, output=tmp_path / "hf", to="hf")
    found = load_hf(tmp_path / "hf")
    model, packed_params = found
    shapes = jax.eval_shape(lambda: tiny.model(vocab=300, sub_norms=True, scan_layers=True)[1])
    put = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), shapes)
    names = {name for name, transform in assign(shapes, BITNET).items() if transform == "ternary"}
    starts = [warm_start(shapes, tmp_path / "hf", model, (), ternary=chosen)[0] for chosen in (names, ())]
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected, right, wrong = (logits(model, p, ids) for p in (packed_params, *(attach(p, BITNET) for p in starts)))
    np.testing.assert_allclose(right, expected, atol=1e-4)
    assert np.abs(wrong - expected).max() > 0.01


# --- refusals ---


def test_what_cannot_be_expressed(folder, tmp_path):
    refuse("found packed ternary weights, expected latents for the form 'online'", input=folder,
           output=tmp_path / "x", to="hf", hf_ternary="online")  # fmt: skip
    refuse("counts only with --to=hf", input=folder, output=tmp_path / "x", hf_ternary="bitlinear")
    refuse("found no ternary weights", input=tiny.ROOT / "tests/golden/llama_tiny", output=tmp_path / "x", to="hf",
           hf_ternary="bitlinear")  # fmt: skip
    refuse("in packed ternary codes; a difference has none", input=folder, output=tmp_path / "x", diff_base=folder)
    model, params = load_hf(folder)
    params["layers"]["mlp"]["up_proj"]["kernel"] = decode(params["layers"]["mlp"]["up_proj"]["kernel"])
    with pytest.raises(
        UserError, match="up_proj/kernel not ternary in every layer; Hugging Face's formats have all layers"
    ):
        save_hf(model, params, tmp_path / "x")


def test_damaged_folders(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    for change, message in (
        ({Q_PROJ: np.full((64, 64), 0.5, np.float32)}, "weight is float32, expected uint8|numbers than -1, 0 and 1"),
        ({Q_PROJ + "_scale": None}, "found no tensor .*q_proj.weight_scale"),
        ({Q_PROJ + "_scale": np.zeros(1, np.float32)}, r"found \[0.0\], expected one positive number"),
        ({Q_PROJ: np.zeros((17, 64), np.uint8)}, r"has shape \[68, 64\], expected \[64, 64\]"),
    ):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "bad")
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, tmp_path / "bad/model.safetensors")
        with pytest.raises(UserError, match=message):
            load_hf(tmp_path / "bad")
    assert safetensors_of(folder) is not None


# --- against transformers ---


@pytest.mark.parity
def test_transformers_opens_what_is_written(peer, tmp_path):
    """By from_pretrained, and what it saves again is opened here. bitlinear computes the same; autobitlinear divides
    by the activations' scale before the product, so that here and there an activation falls to the other side of a tie,
    which moves tokens by 0.01."""
    arrays = golden("tiny_bitnet_model")
    np.save(tmp_path / "ids.npy", arrays["ids"])
    for form in OFFLINE:
        model, params = load_hf(write_golden(tmp_path / form, form))
        save_hf(model, params, tmp_path / f"{form} out", ternary=form)
        script = Path(__file__).with_name("peer_bitnet.py")
        places = [tmp_path / f"{form} out", tmp_path / "ids.npy", tmp_path / "logits.npy", tmp_path / f"{form} again"]
        subprocess.run([peer, script, *places], check=True, timeout=200, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
        theirs = np.load(tmp_path / "logits.npy")
        far = np.abs(theirs - logits(model, params))
        assert far.max() < (1e-5 if form == "bitlinear" else 0.02) and np.median(far) < 1e-5
        np.testing.assert_allclose(logits(*load_hf(tmp_path / f"{form} again")), logits(model, params), atol=1e-5)
    other = jax.tree.map(lambda x: x.replace(scale=1 / x.scale) if is_packed(x) else x, params, is_leaf=is_packed)
    assert np.abs(theirs - logits(model, other)).max() > 0.1
