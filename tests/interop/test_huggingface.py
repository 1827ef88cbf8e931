"""Hugging Face folders: what is read arrives bit for bit, and what cannot be read is named.

That the numbers are right once they have arrived is proven in tests/models/test_golden.py.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easylm_plus.errors import UserError
from easylm_plus.interop.bitnet import quantization_config
from easylm_plus.interop.configs import read_config
from easylm_plus.interop.huggingface import load_hf, load_parameters
from easylm_plus.numerics.rules import BITNET

ONLINE = quantization_config("online")
GOLDEN = Path(__file__).parents[1] / "golden"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "llama_tiny", tmp_path / "llama", ignore=shutil.ignore_patterns("*.npz"))
    return tmp_path / "llama"


def change_config(folder, remove=(), **keys):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (raw | keys).items() if k not in remove}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- config.json ---


def test_configs_of_the_three_families():
    llama, llama3, qwen2 = (read_config(GOLDEN / name) for name in ("llama_tiny", "llama3_tiny", "qwen2_tiny"))
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim, llama.norm_eps) == (4, 4, 16, 1e-5)
    assert (llama3.num_kv_heads, llama3.rope_theta, llama3.rope_scaling) == (2, 5e5, "llama3")
    assert (llama3.rope_factor, llama3.rope_low_freq_factor, llama3.rope_high_freq_factor) == (8.0, 1.0, 4.0)
    assert llama3.rope_original_length == 64
    assert qwen2.qkv_bias and qwen2.tie_embeddings and qwen2.sliding_window == 0
    assert not llama.qkv_bias and not llama.tie_embeddings


def test_overrides_replace_keys():
    assert read_config(GOLDEN / "llama_tiny", max_length=7, attention="xla").max_length == 7


def test_rotary_parameters_in_the_newer_form(folder):
    old = read_config(GOLDEN / "llama3_tiny")
    raw = json.loads((GOLDEN / "llama3_tiny" / "config.json").read_text())
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), **raw.pop("rope_scaling")}
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder) == old


STABLELM = {"architectures": ["StableLmForCausalLM"], "layer_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("keys", "share"),
    (
        ({"partial_rotary_factor": 0.5}, 0.5),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 0.5),
        ({"rope_parameters": {"rope_theta": 1e4}}, 0.25),
        ({}, 0.25),
    ),
)
def test_the_share_that_turns_in_both_forms(folder, keys, share):
    change_config(folder, **STABLELM, **keys)
    assert read_config(folder).rotary_share == share


def test_defaults_of_bitnet(folder):
    change_config(folder, architectures=["BitNetForCausalLM"], remove=("hidden_act", "rope_theta"))
    config = read_config(folder)
    assert (config.activation, config.rope_theta) == ("relu2", 5e5)


@pytest.mark.parametrize(
    ("keys", "window"),
    (
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, 128),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 0),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}, 0),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": False}, 0),
        ({"sliding_window": 128}, 0),  # transformers' LLaMA knows no window and ignores the key
    ),
)
def test_sliding_window_where_it_is_used(folder, keys, window):
    change_config(folder, **keys)
    assert read_config(folder).sliding_window == window


# Qwen2's first layers see all, the others a window
MIXED_WINDOWS = {
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
}

BITNET_KEYS, M32 = {"architectures": ["BitNetForCausalLM"]}, {"architectures": ["YuanForCausalLM"]}
EXPERTS = {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"architectures": ["OPTForCausalLM"]}, "found architecture OPTForCausalLM, expected one of Llama"),
        ({"architectures": None}, "found architecture none"),
        ({"hidden_act": "tanh"}, "found hidden_act 'tanh', expected one of silu, "),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "found quantization_config of method 'gptq'",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "found rope scaling 'yarn', expected default"),
        ({"num_attention_heads": 6}, "num_kv_heads = 4: expected a divisor of num_heads = 6"),
        (MIXED_WINDOWS, "found max_window_layers 1"),
        ({"partial_rotary_factor": 0.5}, r"found partial_rotary_factor 0\.5, expected 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"found partial_rotary_factor 0\.5, expected 1"),
        ({**M32, "quantization_config": ONLINE}, r"method 'bitnet' \(linear_class 'autobitlinear'"),  # of Yuan
        ({**BITNET_KEYS, "quantization_config": ONLINE | {"quantization_mode": "later"}}, "mode 'later'"),
        ({**BITNET_KEYS, "quantization_config": ONLINE | {"linear_class": "bitlinear"}}, "class 'bitlinear'"),  # online
        ({**BITNET_KEYS, "quantization_config": ONLINE | {"use_rms_norm": True}}, "use_rms_norm True"),
        (
            {**BITNET_KEYS, "attention_bias": True, "quantization_config": quantization_config("autobitlinear")},
            "the latter without biases",
        ),
        (
            {**M32, "moe_config": EXPERTS | {"router_type": "top_k"}},
            "found router_type 'top_k', expected 'attn_router'",
        ),
        (
            {**M32, "moe_config": EXPERTS | {"moe_use_mixtral_gating": True}},
            "moe_use_mixtral_gating = True, which is not",
        ),
        ({**M32, "moe_config": EXPERTS | {"num_shared_experts": 1}}, "found num_shared_experts = 1"),
        ({**M32, "moe_config": EXPERTS | {"gated_linear_unit": False}}, "found gated_linear_unit False, expected True"),
    ),
)
def test_what_we_cannot_represent_is_an_error(folder, keys, message):
    change_config(folder, **keys)
    with pytest.raises(UserError, match=message):
        read_config(folder)


def test_keys_of_experts_that_change_nothing(folder):
    told = {"router_type": "attn_router", "moe_use_mixtral_gating": False, "router_aux_loss_coef": 0.01, "tag": "M32"}
    change_config(folder, **M32, moe_config=EXPERTS | told)
    assert read_config(folder).num_experts == 4


MIXTRAL = {"architectures": ["MixtralForCausalLM"]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"rope_scaling": {"type": "linear"}}, "rope scaling linear: found no factor, expected a number"),
        ({"rope_scaling": LLAMA3}, "rope scaling llama3: found no original_max_position_embeddings, expected a whole"),
        ({"rope_scaling": 2.0}, r"found rope_scaling = 2\.0, expected an object"),
        (MIXTRAL, "found no num_local_experts, expected a whole number of at least 1"),
        ({**MIXTRAL, "num_local_experts": 4}, "found no num_experts_per_tok"),
        ({**M32, "moe_config": {"moe_top_k": 2}}, "moe_config: found no ffn_hidden_size"),
        ({"num_attention_heads": 0}, "found num_attention_heads = 0, expected a whole number of at least 1"),
        ({"hidden_size": "64"}, "found hidden_size = '64', expected a whole number"),
        ({"hidden_size": 64.0}, r"found hidden_size = 64\.0, expected a whole number"),
        ({"num_hidden_layers": True}, "found num_hidden_layers = True, expected a whole number"),
        ({"rms_norm_eps": "1e-5"}, "found rms_norm_eps = '1e-5', expected a number"),
        ({"tie_word_embeddings": "no"}, "found tie_word_embeddings = 'no', expected true or false"),
        ({"architectures": "LlamaForCausalLM"}, "found architectures = 'LlamaForCausalLM', expected a list"),
        ({"architectures": [{}]}, "found architecture {}, expected one of"),
        ({"quantization_config": "gptq"}, "found quantization_config = 'gptq', expected an object"),
    ),
)
def test_a_key_of_another_kind_is_named(folder, keys, message):
    change_config(folder, **keys)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        read_config(folder)


@pytest.mark.parametrize(
    "text, message",
    (("[]", "found list, expected an object of keys"), ('{"architectures": ["Llama', "damaged JSON file")),
)
def test_a_config_that_is_no_object(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        read_config(folder)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not found; expected the config\.json of a Hugging Face model"):
        load_hf(tmp_path)


def test_a_missing_key_is_named(folder):
    change_config(folder, remove=("rms_norm_eps",))
    with pytest.raises(UserError, match=r"config\.json: .*rms_norm_eps"):
        read_config(folder)


# --- weights ---


def test_weights_that_are_rounded_online(tmp_path):
    """The released BitNet 2B4T's quantization_config: plain weights, which are ternary as the model runs."""
    shutil.copytree(GOLDEN / "bitnet_tiny", tmp_path / "bitnet")
    change_config(tmp_path / "bitnet", quantization_config=ONLINE)
    kinds = lambda **keys: jax.tree.structure(load_hf(tmp_path / "bitnet", **keys)[1])
    assert kinds() == kinds(numerics=BITNET) != kinds(numerics=())
    model, params = load_hf(tmp_path / "bitnet")
    with np.load(GOLDEN / "bitnet_tiny/golden.npz") as golden:
        ids, expected = golden["input_ids"], golden["logits"]
    far = lambda params: np.abs(np.asarray(jax.jit(model.apply)({"params": params}, ids)) - expected).max()
    # one activation lies on a tie (tests/models/test_bitnet.py compares all of it), which moves one token by 0.01
    assert far(params) < 0.02 < 0.2 < far(load_hf(tmp_path / "bitnet", numerics=())[1])


def test_dtypes_that_are_not_computed_in(folder):
    with pytest.raises(UserError, match="llama: found dtype float16, expected float32 or bfloat16"):
        load_hf(folder, "float16")


def test_every_tensor_is_placed_once_under_its_name():
    model, _ = load_hf(GOLDEN / "qwen2_tiny")
    theirs, seen = load_file(GOLDEN / "qwen2_tiny" / "model.safetensors"), {}
    load_parameters(GOLDEN / "qwen2_tiny", model, lambda name, array: seen.setdefault(name, array))
    assert len(seen) == 2 + 12 and sum(array.size for array in seen.values()) == sum(a.size for a in theirs.values())
    q_kernel, k_bias = (seen[f"layers/self_attn/{name}"][1] for name in ("q_proj/kernel", "k_proj/bias"))
    np.testing.assert_array_equal(q_kernel, theirs[Q_PROJ].T)
    np.testing.assert_array_equal(k_bias, theirs["model.layers.1.self_attn.k_proj.bias"])


def test_bfloat16_files(folder):
    exact = load_hf(folder)[1]
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), exact)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}, folder / "model.safetensors")
    for dtype in (jnp.float32, jnp.bfloat16):
        model, params = load_hf(folder, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert model.precision.param == dtype
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), params, rounded)


def test_several_files_with_an_index(folder):
    expected, tensors = load_hf(folder)[1], load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder)[1], expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is not there; model\.saf\S+ names 2 files"):
        load_hf(folder)


def test_unrolled_weights_are_those_of_the_stack():
    stacked, unrolled = (load_hf(GOLDEN / "llama_tiny", scan_layers=scan)[1] for scan in (True, False))
    for i in "01":
        same = lambda a, b, i=int(i): np.testing.assert_array_equal(a, b[i])
        jax.tree.map(same, unrolled["layers"][i], stacked["layers"])


def remove(tensors):
    del tensors[Q_PROJ]


def cut(tensors):
    tensors[Q_PROJ] = tensors[Q_PROJ][:-1].copy()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (remove, rf"found no tensor {Q_PROJ} \[64, 64\], which is our layers/1/self_attn/q_proj/kernel"),
        (cut, rf"{Q_PROJ} has shape \[63, 64\], expected \[64, 64\] \(our layers/1/self_attn/q_proj/kernel\)"),
    ),
)
def test_a_tensor_that_does_not_fit_is_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        load_hf(folder)


@pytest.mark.parametrize("extra", ("model.layers.0.self_attn.o_proj.bias", f"{Q_PROJ}_scale_inv"))
def test_a_tensor_that_we_would_drop_is_named(folder, extra):
    change_tensors(folder, lambda tensors: tensors.update({extra: np.ones(64, np.float32)}))
    with pytest.raises(UserError, match=extra):
        load_hf(folder)


def test_a_copy_of_the_head_and_rotary_tables_are_not_needed(folder):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)}
    change_tensors(folder, lambda tensors: tensors.update(tables))
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding; expected the same weights under tie_"):
        load_hf(folder)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head" not in load_hf(folder)[1]


def test_the_same_weights_in_another_form_beside_the_index(folder):
    """Mistral ships consolidated.safetensors beside the parts that its index names."""
    expected = load_hf(folder)[1]
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"layers.0.attention.wq.weight": np.ones((64, 64), np.float32)}, folder / "consolidated.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder)[1], expected)


@pytest.mark.parametrize(
    ("files", "message"),
    (
        ({"pytorch_model.bin": b"x"}, r"found only pytorch_model\.bin, which can run code when read; expected"),
        ({}, r"found no weights; expected \*\.safetensors"),
        ({"model.safetensors": b"not a safetensors file"}, r"model\.safetensors: damaged safetensors file"),
    ),
)
def test_folders_without_readable_weights(folder, files, message):
    (folder / "model.safetensors").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_hf(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged safetensors file"):
        load_hf(folder)
