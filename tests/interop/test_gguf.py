"""GGUF files hold what our weights are: read back with PyPI's gguf."""

import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

gguf = pytest.importorskip("gguf")

from gguf_models import LLAMA3, SMALL, random_model, written  # noqa: E402

from easylm_plus.errors import UserError  # noqa: E402
from easylm_plus.interop import gguf_files  # noqa: E402
from easylm_plus.interop.gguf_files import encoded  # noqa: E402
from easylm_plus.interop.gguf_names import TABLES, architecture_for, rope_factors  # noqa: E402
from easylm_plus.interop.weights import Latents, of_params  # noqa: E402
from easylm_plus.models.config import ModelConfig  # noqa: E402
from easylm_plus.models.families import preset  # noqa: E402
from easylm_plus.models.rope import frequencies  # noqa: E402
from easylm_plus.numerics.formats import decode  # noqa: E402
from easylm_plus.numerics.packed_ternary import PackedTernary, pack, packed  # noqa: E402
from easylm_plus.numerics.rules import BITNET  # noqa: E402
from easylm_plus.numerics.ternary import ternary_codes  # noqa: E402
from easylm_plus.training.checkpoint import write_parameters  # noqa: E402
from easylm_plus.training.stream import open_checkpoint  # noqa: E402

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MEANT = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/up_proj",
         "mlp/down_proj")  # fmt: skip


def read(path):
    """(keys, name -> tensor) of a file."""
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor):
    """Its numbers, float32, with the axes as NumPy has them."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


def weight(params, layer, name):
    part, leaf = name.split("/")
    return np.asarray(params["layers"][str(layer)][part][leaf]["kernel"])


# --- blocks ---


@pytest.mark.parametrize("kind", ("q4_0", "q8_0", "tq1_0", "tq2_0"))
def test_blocks_are_those_of_the_package(kind):
    with np.load(tiny.ROOT / "tests/golden/quant/gguf_blocks.npz") as golden:
        source, expected, back = (golden[f"{kind}.{part}"] for part in ("src", "bytes", "dequant"))
    found = encoded(source, kind)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gguf.quants.dequantize(found, gguf.GGMLQuantizationType[kind.upper()]), back)
    assert (encoded(1.1 * source[::-1], kind) != expected).mean() > 0.1


@pytest.mark.parametrize("kind", ("tq1_0", "tq2_0", "f16", "bf16", "f32"))
def test_codes_are_exact(kind):
    codes = np.random.default_rng(0).integers(-1, 2, (2100, 512)).astype(np.int8)
    codes[3, :256] = 0
    kind_of = gguf.GGMLQuantizationType[kind.upper()]
    np.testing.assert_array_equal(gguf.quants.dequantize(encoded(codes, kind), kind_of), codes)


def test_q4_0_cannot_hold_codes():
    codes = np.random.default_rng(0).integers(-1, 2, (4, 256)).astype(np.int8)
    assert (gguf.quants.dequantize(encoded(codes, "q4_0"), gguf.GGMLQuantizationType.Q4_0) != codes).any()


def test_bfloat16_rounds_to_even_and_f16_does_not_overflow():
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    np.testing.assert_array_equal(encoded(x, "bf16").view(ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16))
    with pytest.raises(UserError, match=r"here: found 1 numbers beyond 65504, the largest of f16; expected bf16"):
        encoded(np.array([[1e5, 1.0]], np.float32), "f16", "here")


# --- whole files ---


@pytest.mark.parametrize("kind", ("tq2_0", "tq1_0", "f16", "f32"))
@pytest.mark.parametrize("sub_norms", (True, False), ids=("bitnet", "llama"))
def test_ternary_weights_are_codes_and_gamma(tmp_path, kind, sub_norms):
    model, params = random_model(num_layers=2, sub_norms=sub_norms)
    told = written(tmp_path / "x.gguf", model, params, kind, rules=BITNET)
    keys, tensors = read(tmp_path / "x.gguf")
    assert keys["general.architecture"] == told.architecture == ("bitnet" if sub_norms else "llama")
    for layer in range(2):
        for theirs, ours in zip(LINEAR, MEANT, strict=True):
            codes, inverse = ternary_codes(weight(params, layer, ours))
            name = f"blk.{layer}.{theirs}"
            found = values(tensors[f"{name}.weight"])
            assert tensors[f"{name}.weight"].tensor_type.name == kind.upper()
            assert tensors[f"{name}.scale"].data[0] == np.float32(1 / inverse)
            if theirs in ("attn_q", "attn_k") and not sub_norms:
                assert (found != codes.T).any()
                heads = 4 if theirs == "attn_q" else 2
                found = found.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(found.shape)  # neighbours to halves
            np.testing.assert_array_equal(found, np.asarray(codes).T)
    bits = {"tq2_0": 2.0625, "tq1_0": 1.6875, "f16": 16, "f32": 32}[kind]
    assert told.block_bits == pytest.approx(bits, abs=1e-3)
    assert told.bytes == (tmp_path / "x.gguf").stat().st_size and told.bits == 8 * told.bytes / told.weights


def test_packed_weights_are_not_rounded_again(tmp_path):
    model, params = random_model(sub_norms=True)
    config = {"model": vars(model.config), "numerics": {"precision": "float32"}, "data": {}}
    rng = np.random.default_rng(5)
    expected = {}
    for name in MEANT:
        part, leaf = name.split("/")
        shape = weight(params, 0, name).shape
        codes = rng.choice((-1, 0, 1), shape, p=(0.1, 0.8, 0.1)).astype(np.int8)
        expected[name] = (codes, np.float32(rng.uniform(0.1, 0.3)))
        kept = PackedTernary(pack(jnp.asarray(codes)), jnp.asarray(expected[name][1]), shape[0])
        params["layers"]["0"][part][leaf]["kernel"] = kept
    write_parameters(tmp_path / "run", params, {"config": config})
    weights, _, _ = open_checkpoint(tmp_path / "run")
    gguf_files.write_gguf(weights, tmp_path / "x.gguf", "tq2_0", [])
    _, tensors = read(tmp_path / "x.gguf")
    for theirs, ours in zip(LINEAR, MEANT, strict=True):
        np.testing.assert_array_equal(values(tensors[f"blk.0.{theirs}.weight"]), expected[ours][0].T)
        assert tensors[f"blk.0.{theirs}.scale"].data[0] == expected[ours][1]
        again = packed(decode(params["layers"]["0"][ours.split("/")[0]][ours.split("/")[1]]["kernel"]))
        assert abs(float(again.scale) / expected[ours][1] - 1) > 0.5, "rounded again it would be another scale"


@pytest.mark.parametrize("scan", (True, False), ids=("stacked", "unstacked"))
def test_pieces_know_which_are_ternary(scan):
    model, params = random_model(num_layers=2, scan_layers=scan)
    weights = of_params(model.config, params, "params")
    latents = Latents(weights, ("mlp/up_proj=ternary",) if scan else ("layers/1/mlp/up_proj=ternary",))
    name = "layers/{i}/mlp/up_proj/kernel"
    assert [latents.is_ternary(name, (i,)) for i in (0, 1)] == ([True, True] if scan else [False, True])
    assert not latents.is_ternary(name.replace("up", "down"), (1,)) and not latents.is_ternary("norm/weight", ())
    codes, gamma = latents.ternary(name, (1,))
    expected, inverse = ternary_codes(weights.read((name,), (1,))[0])
    np.testing.assert_array_equal(codes, expected)
    assert codes.dtype == np.int8 and gamma == np.float32(1 / inverse)
    assert (latents.ternary(name, (0,)) is None) == (not scan)
    with pytest.raises(UserError, match="matches no weight"):
        Latents(weights, ("mlp/nothing=ternary",))


def test_biases_with_ternary_matrices_are_a_llama(tmp_path):
    """llama.cpp's qwen2 reads the scales of the feed-forward and does not multiply by them."""
    model, params = random_model(qkv_bias=True)
    assert written(tmp_path / "x.gguf", model, params, "tq2_0", rules=BITNET).architecture == "llama"
    assert written(tmp_path / "y.gguf", model, params, "f16").architecture == "qwen2"


def test_some_matrices_may_be_ternary(tmp_path):
    model, params = random_model()
    written(tmp_path / "x.gguf", model, params, "tq2_0", rules=("mlp/.*=ternary",))
    kinds = {name: tensor.tensor_type.name for name, tensor in read(tmp_path / "x.gguf")[1].items()}
    assert kinds["blk.0.ffn_up.weight"] == "TQ2_0" and kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["token_embd.weight"] == "Q8_0"


def test_keys_of_a_llama(tmp_path):
    model, params = random_model(num_layers=2, tie_embeddings=False, **LLAMA3)
    written(tmp_path / "x.gguf", model, params, "q8_0", name="mine", ends="f32")
    keys, tensors = read(tmp_path / "x.gguf")
    expected = {
        "general.name": "mine", "general.file_type": 7, "general.quantization_version": 2, "llama.vocab_size": 320,
        "llama.context_length": 128, "llama.embedding_length": 256, "llama.block_count": 2,
        "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64, "llama.rope.freq_base": 5e5, "llama.attention.key_length": 64,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {key: keys[key] for key in expected} == expected
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 320
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "F32" and kinds["blk.1.attn_k.weight"] == "Q8_0"
    np.testing.assert_array_equal(values(tensors["output.weight"]), np.asarray(params["lm_head"]["kernel"]).T)
    factors = tensors["rope_freqs.weight"].data
    plain = frequencies(ModelConfig(**{**SMALL, "rope_theta": 5e5}))
    np.testing.assert_allclose(plain / factors, frequencies(model.config), rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == pytest.approx(8)
    assert rope_factors(preset("llama-7b")) is None


@pytest.mark.parametrize(
    ("overrides", "architecture", "key", "value"),
    (
        ({"qkv_bias": True}, "qwen2", None, None),
        ({"qkv_bias": True, "o_bias": True}, "llama", None, None),
        ({"sliding_window": 60}, "llama", "context_length", 60),
        ({"rope_scaling": "linear", "rope_factor": 4.0}, "llama", "rope.scaling.factor", 4.0),
        ({"rope_scaling": "ntk", "rope_factor": 2.0}, "llama", "rope.freq_base", pytest.approx(1e4 * 2 ** (64 / 62))),
        ({"head_dim": 32}, "llama", "rope.dimension_count", 32),
        ({"sub_norms": True}, "bitnet", None, None),
    ),
    ids=str,
)  # fmt: skip
def test_variants(tmp_path, overrides, architecture, key, value):
    model, params = random_model(**overrides)
    assert written(tmp_path / "x.gguf", model, params, "f32").architecture == architecture
    keys, tensors = read(tmp_path / "x.gguf")
    assert key is None or keys[f"{architecture}.{key}"] == value
    bias = [name for name in tensors if name.endswith(".bias")]
    assert len(bias) == 3 * model.config.qkv_bias + model.config.o_bias


def test_the_tables_are_undone(tmp_path):
    rng = np.random.default_rng(0)
    config = ModelConfig(**{**SMALL, "qkv_bias": True, "o_bias": True, "mlp_bias": True})
    for rule in TABLES["llama"]:
        shape = (256, 128) if "k_proj/kernel" in rule.ours[0] else (128,) if "k_proj" in rule.ours[0] else (256, 256)
        array = rng.normal(size=shape)
        again = rule.read(rule.write((array,), config), config)[0]
        np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("name", ("llama-7b", "koala-13b", "llama2-70b", "llama3.1-8b", "mistral-7b", "skywork-13b",
                                  "qwen2-7b", "phind-34b", "codellama-7b", "llama3.2-1b"))  # fmt: skip
def test_families_that_llama_cpp_holds(name):
    assert architecture_for(preset(name), name) == ("qwen2" if name == "qwen2-7b" else "llama")


@pytest.mark.parametrize(
    ("config", "told"),
    (
        (preset("bitnet-2b4t"), "model.activation = 'relu2': llama.cpp's bitnet has 'silu' only"),
        (preset("bitnet-700m"), "model.tie_embeddings = False: llama.cpp's bitnet has True only"),
        (preset("bitnet-700m", tie_embeddings=True, head_dim=32), "model.head_dim = 32: .* expects .* = 64"),
        (preset("yuan-2b"), "model.lfa_variant = 'yuan'"),
        (preset("mixtral-8x7b"), "model.num_experts = 8"),
        (preset("gpt2-124m"), "model.norm = 'layer'"),
        (preset("stablelm2-1.6b"), "model.norm = 'layer'"),
        (preset("llama-7b", rotary_share=0.5), "model.rotary_share = 0.5"),
        (preset("bitnet-700m", tie_embeddings=True, rope_scaling="llama3", rope_factor=8.0), "model.rope_scaling"),
    ),
    ids=str,
)  # fmt: skip
def test_what_llama_cpp_cannot_hold(config, told):
    with pytest.raises(UserError, match=f"here: {told}"):
        architecture_for(config, "here")


@pytest.mark.parametrize(
    ("overrides", "kind", "rules", "told"),
    (
        ({}, "tq2_0", (), "--gguf_type=tq2_0: params has no ternary matrix; expected one that was trained with"),
        ({}, "q4_0", BITNET, "--gguf_type=q4_0: found params: layers/0/.*, which is ternary; expected one of tq2_0"),
        ({}, "q8_0", BITNET, "--gguf_type=q8_0: found params"),
        ({"intermediate_size": 384}, "tq1_0", BITNET, "model.intermediate_size = 384, the inputs of .*down_proj/kernel:"
                                                      " tq1_0 has blocks of 256; expected a multiple"),
        ({"num_heads": 5, "num_kv_heads": 5}, "tq2_0", BITNET, r"model.num_heads \* head_dim = 320"),
        ({"hidden_size": 272}, "q8_0", (), "model.hidden_size = 272.*: q8_0 has blocks of 32"),
        ({"vocab_size": 290}, "f32", (), "tokenizer.json: found 300 tokens, more than model.vocab_size = 290"),
    ),
    ids=("not_ternary", "q4_0", "q8_0", "ffn", "heads", "hidden", "vocab"),
)  # fmt: skip
def test_what_a_type_cannot_hold(tmp_path, overrides, kind, rules, told):
    model, params = random_model(**overrides)
    with pytest.raises(UserError, match=told):
        written(tmp_path / "x.gguf", model, params, kind, rules=rules)


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"GGUF files need the package gguf .*: pip install 'easylm_plus\[gguf\]'"):
        written(tmp_path / "x.gguf", *random_model(), "f16")


def test_without_the_package_all_else_works():
    script = "import sys; sys.modules['gguf'] = None; import easylm_plus.convert"
    subprocess.run([sys.executable, "-c", script], cwd=tiny.ROOT, check=True, timeout=tiny.PATIENCE)
