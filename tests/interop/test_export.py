"""Hugging Face folders written: what was read goes back bit for bit, and what is written is read as it was."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_convert import run

import easylm_plus
from data_pipelines.tokenizers.training import CHAT_TOKENS
from easylm_plus.errors import UserError
from easylm_plus.inference.load import open_model
from easylm_plus.interop import tables
from easylm_plus.interop.bitnet import quantization_config
from easylm_plus.interop.configs import parse_config, read_config, read_raw
from easylm_plus.interop.huggingface import load_hf, save_hf
from easylm_plus.interop.tensor_files import INDEX
from easylm_plus.interop.weights import piece_shapes
from easylm_plus.interop.write_configs import architecture_of, export_config, write_config
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.families import PRESETS
from easylm_plus.models.transformer import Transformer, unstack_layers
from easylm_plus.numerics.deploy import frozen
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.rules import BITNET, attach

ONLINE = quantization_config("online")
GOLDEN = Path(__file__).parents[1] / "golden"
END = CHAT_TOKENS[-1]
FAMILIES = (
    "llama_tiny",
    "llama3_tiny",
    "qwen2_tiny",
    "yuan2_tiny",
    "yuan2_m32_moe_tiny",
    "mixtral_tiny",
    "bitnet_tiny",
)
D, F, H, K, V, L, E, S = 32, 48, 4, 8, 60, 2, 3, 16
SHAPE = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_layers": L, "num_heads": H, "num_kv_heads": 2,
         "head_dim": K, "max_length": S}  # fmt: skip
BIASED = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
GPT2 = {"num_kv_heads": H, "norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh",
        "tie_embeddings": True, **BIASED}  # fmt: skip
CONFIGS = {
    "llama": {},
    "llama with biases": BIASED,
    "tied, wide heads": {"tie_embeddings": True, "head_dim": 16, "rope_theta": 5e5},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 64},
    "mistral": {"sliding_window": 8},
    "qwen2": {"qkv_bias": True, "sliding_window": 8},
    "mixtral": {"num_experts": E, "sliding_window": 8},
    "yuan": {"num_kv_heads": H, "lfa_variant": "yuan", "tie_embeddings": True},
    "yuan, shared qk": {"num_kv_heads": H, "share_qk": True},
    "yuan m32": {"num_kv_heads": H, "lfa_variant": "yuan", "num_experts": E, "router": "attention", "head_dim": 16,
                 "rotary_share": 0.5, "rope_dtype": "bfloat16", "tie_embeddings": True},
    "gpt2": GPT2,
    "bitnet": {"sub_norms": True, "activation": "relu2"},
    "stablelm": {"norm": "layer", "rotary_share": 0.25, "qkv_bias": True},
}  # fmt: skip


def model_config(case):
    return ModelConfig(**{**SHAPE, **CONFIGS[case]})


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- the tables ---


@pytest.mark.parametrize("case", CONFIGS)
def test_every_rule_is_undone_bit_for_bit(case):
    """Their random bits -> ours -> theirs; a rule that wrote another order would be seen."""
    config = model_config(case)
    shapes, seen = piece_shapes(config), set()
    rng = np.random.default_rng(0)
    for rule in tables.ARCHITECTURES[architecture_of(config)]:
        if not set(rule.ours) <= set(shapes):
            continue
        ours = tuple(rng.integers(0, 2**16, shapes[name], np.uint16) for name in rule.ours)
        theirs = rule.write(ours, config)
        back = rule.read(theirs, config)
        for name, there, again in zip(rule.ours, ours, back, strict=True):
            np.testing.assert_array_equal(there, again, err_msg=name)
        seen |= set(rule.ours)
        assert len(theirs) == len(rule.theirs)
    assert seen == set(shapes)


def test_a_rule_that_is_no_inverse_is_seen():
    q, k = (np.arange(8 * 4).reshape(4, 8) + i for i in (0, 100))
    config = ModelConfig(**{**SHAPE, "num_kv_heads": H, "head_dim": 2})
    written = tables._yuan_write((q, k), config)
    plain = (written[0].T, written[1].T)  # read as LLaMA's would be
    assert not np.array_equal(plain[0], q)
    np.testing.assert_array_equal(tables._yuan_read(written, config)[0], q)


# --- config.json ---


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_written_is_read_as_it_was(case):
    config = model_config(case)
    raw = json.loads(json.dumps(export_config(config, None, "here")))
    assert parse_config(raw, "there") == config
    assert parse_config({**raw, "vocab_size": V + 1}, "there") != config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_came_from_somewhere_keeps_its_other_keys(name):
    raw = read_raw(GOLDEN / name)
    config = parse_config(raw, name)
    exported = export_config(config, raw, name)
    assert parse_config(exported, name) == config
    assert exported["eos_token_id"] == raw["eos_token_id"] and exported["model_type"] == raw["model_type"]
    if name == "yuan2_tiny":
        assert export_config(config, {**raw, "use_flash_attention": True}, name)["use_flash_attention"]
        assert export_config(config, None, name)["use_flash_attention"] is False
    changed = dataclasses.replace(config, max_length=7)
    assert export_config(changed, raw, name)["max_position_embeddings"] == 7


REFUSED = {
    **{f"palm-{size}": "model.norm = 'layer_no_bias'" for size in ("8b", "62b", "540b")},
    **{f"gpt-fp8-{size}": "model.gated = False: StableLm" for size in ("125m", "7b", "13b", "175b")},
    **{f"switch-base-{count}": "MixtralForCausalLM has no place for this model: .*norm_topk" for count in (8, 64)},
}


def test_nested_keys_of_the_original_stay():
    """And its auto_map goes, since the Python files that it names do."""
    original = read_raw(GOLDEN / "yuan2_m32_moe_tiny")
    original["moe_config"] |= {"router_type": "attn_router", "aux_loss": 0.01}
    original["auto_map"] = {"AutoModelForCausalLM": "yuan_moe_hf_model.YuanForCausalLM"}
    config = dataclasses.replace(parse_config(original, "here"), experts_per_token=3)
    exported = export_config(config, original, "here")
    assert exported["moe_config"] == original["moe_config"] | {"moe_top_k": 3}
    assert "auto_map" not in exported


def test_rounding_online_is_stated():
    """Without it transformers computes a dense model of the weights, as it should of one with sub-norms alone."""
    original, config = read_raw(GOLDEN / "bitnet_tiny"), model_config("bitnet")
    assert export_config(config, None, "here", form="online")["quantization_config"] == ONLINE
    assert "quantization_config" not in export_config(config, None, "here")
    for keys in ({}, {"quantization_config": {**ONLINE, "modules_to_not_convert": None}}):
        exported = export_config(parse_config(original, "here"), original | keys, "here")
        assert exported.get("quantization_config") == keys.get("quantization_config"), "as the original has it"
    assert "quantization_config" not in export_config(model_config("llama"), None, "here")


def test_token_ids_of_a_model_of_our_own_are_never_a_default():
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    assert export_config(PRESETS["llama3-8b"], None, "here").items() >= ids.items()
    original = {**read_raw(GOLDEN / "llama_tiny"), "eos_token_id": [5, 6]}
    assert export_config(parse_config(original, "here"), original, "here")["eos_token_id"] == [5, 6]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(REFUSED)))
def test_presets_have_an_architecture(name):
    raw = export_config(PRESETS[name], None, name)
    assert parse_config(raw, name).hidden_size == PRESETS[name].hidden_size


@pytest.mark.parametrize("name", REFUSED)
def test_presets_that_have_none(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        export_config(PRESETS[name], None, name)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"logit_scale": 0.5}, r"model\.logit_scale = 0\.5: LlamaForCausalLM has no place for it \(1\.0 there\)"),
        ({"parallel_block": True}, "model.parallel_block = True: LlamaForCausalLM has no place"),
        ({"causal": False}, "model.causal = False"),
        ({"norm": "layer_no_bias"}, "model.norm = 'layer_no_bias'"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0}, "found rope scaling 'ntk'"),
        ({"qkv_bias": True, "mlp_bias": True}, "model.mlp_bias = True: Qwen2ForCausalLM"),
        ({"num_experts": 4, "norm_topk": False}, "model.norm_topk = False: MixtralForCausalLM"),
        ({"lfa_variant": "conv3"}, "model.lfa_variant = 'conv3'"),
        ({**GPT2, "num_kv_heads": 2}, "model.num_kv_heads = 2: GPT2LMHeadModel"),
    ),
)
def test_what_no_architecture_represents_is_named(change, message):
    with pytest.raises(UserError, match=message):
        export_config(ModelConfig(**{**SHAPE, **change}), None, "here")


def test_how_a_model_is_run_does_not_matter():
    config = ModelConfig(**SHAPE, attention="xla", remat="full", scan_layers=False, init="fan_in")
    assert write_config(config, "LlamaForCausalLM") == write_config(ModelConfig(**SHAPE), "LlamaForCausalLM")


# --- folders ---


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_weights_go_back_bit_for_bit(name, tmp_path):
    model, params = load_hf(GOLDEN / name)
    save_hf(model, params, tmp_path / "out")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "out"))
    copies = {n for n in theirs if n.endswith("inv_freq") or (n == "lm_head.weight" and model.config.tie_embeddings)}
    assert set(ours) == set(theirs) - copies
    for tensor, array in ours.items():
        assert array.dtype == theirs[tensor].dtype
        np.testing.assert_array_equal(array, theirs[tensor], err_msg=tensor)
    save_hf(*load_hf(tmp_path / "out"), tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(GOLDEN / name)


def test_shards_and_dtype(tmp_path):
    model, params = load_hf(GOLDEN / "llama_tiny")
    limit = 100_000
    easylm_plus.save_hf(model, params, tmp_path / "out", dtype=ml_dtypes.bfloat16, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "out" / name).stat().st_size < limit + 10_000 for name in files)
    sizes = [array.nbytes for name in files for array in load_file(tmp_path / "out" / name).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert read_raw(tmp_path / "out")["torch_dtype"] == "bfloat16"
    _, again = easylm_plus.load_hf(tmp_path / "out", dtype=jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), params, again)


def test_unrolled_and_stacked_layers_are_written_alike(tmp_path):
    for scan in (True, False):
        save_hf(*load_hf(GOLDEN / "qwen2_tiny", scan_layers=scan), tmp_path / str(scan))
    assert hashes(tmp_path / "True") == hashes(tmp_path / "False")


def test_what_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="found something there already; expected a new folder"):
        save_hf(*tiny.model(), tmp_path)


def test_parameters_that_are_not_the_models_are_named(tmp_path):
    model, params = tiny.model()
    wide = {**params, "norm": {"weight": jnp.ones(17)}}
    with pytest.raises(UserError, match=r"norm/weight: found \[17\], its config expects \[16\]"):
        save_hf(model, wide, tmp_path / "out")
    codes = {**params, "norm": {"weight": jnp.ones(16, jnp.int8)}}
    with pytest.raises(UserError, match="norm/weight is int8, expected plain floating point"):
        save_hf(model, codes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def words(tmp_path):
    """A folder with a tokenizer whose end is not token 2, and defaults of generation."""
    shutil.copytree(tiny.data() / "tokenizer", tmp_path / "words")
    tokens = json.loads((tmp_path / "words/tokenizer.json").read_text())["added_tokens"]
    first = next(token["content"] for token in tokens if token["id"] == 1)
    (tmp_path / "words/tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": first}))
    (tmp_path / "words/generation_config.json").write_text('{"temperature": 0.6}')
    for name in ("chat_template.jinja", "model.safetensors", "notes.txt"):
        (tmp_path / "words" / name).write_text(name)
    return tmp_path / "words"


def test_companions_come_along(words, tmp_path):
    save_hf(*tiny.model(), tmp_path / "out", tokenizer_from=words)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names and "notes.txt" not in names
    assert (tmp_path / "out/model.safetensors").read_bytes() != b"model.safetensors"


def test_token_ids_are_the_companions(words, tmp_path):
    tokens = json.loads((words / "tokenizer.json").read_text())["added_tokens"]
    end = next(token["id"] for token in tokens if token["content"] == END)
    assert end not in (0, 1, 2)
    save_hf(*tiny.model(), tmp_path / "out", tokenizer_from=words)
    raw = read_raw(tmp_path / "out")
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (1, end)
    (words / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 5], "pad_token_id": 7}))
    save_hf(*tiny.model(), tmp_path / "again", tokenizer_from=words)
    raw = read_raw(tmp_path / "again")
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, [end, 5], 7)
    save_hf(*tiny.model(), tmp_path / "alone")
    assert read_raw(tmp_path / "alone")["eos_token_id"] is None


@pytest.mark.parametrize("there", (False, True))
def test_a_tokenizer_that_is_not_there_is_named(tmp_path, there):
    if there:
        (tmp_path / "nowhere").mkdir()
    for _ in range(2):  # nothing is left that would be in the way
        with pytest.raises(UserError, match=r"tokenizer_from=.*nowhere: found no tokenizer there; expected a folder"):
            save_hf(*tiny.model(), tmp_path / "out", tokenizer_from=tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["nowhere"] * there


def test_numbers_too_large_for_the_dtype_are_an_error(tmp_path, recwarn):
    model, params = tiny.model()
    params["norm"]["weight"] = params["norm"]["weight"].at[3:5].set(1e5)
    told = "params: norm/weight: found 2 numbers beyond 65504, the largest of float16; expected another dtype"
    with pytest.raises(UserError, match=told):
        save_hf(model, params, tmp_path / "out", dtype=np.float16)
    assert not list(tmp_path.iterdir()) and not recwarn.list
    for name, there in (("float16", params["norm"]["weight"].at[3:5].set(jnp.inf)), ("bfloat16", jnp.full(16, 1e5))):
        save_hf(model, {**params, "norm": {"weight": there}}, tmp_path / name, dtype=name)  # as it was, or fits


def test_ternary_weights_are_exported_as_they_are_trained(tmp_path):
    model, params = load_hf(GOLDEN / "bitnet_tiny")
    save_hf(model, attach(params, BITNET), tmp_path / "ternary")
    save_hf(model, params, tmp_path / "plain")
    ternary, plain = hashes(tmp_path / "ternary"), hashes(tmp_path / "plain")
    assert ternary["model.safetensors"] == plain["model.safetensors"]
    kinds = lambda folder: jax.tree.structure(load_hf(tmp_path / folder)[1])
    assert kinds("plain") == jax.tree.structure(params) != kinds("ternary"), "config.json says which it was"
    with pytest.raises(
        UserError, match="params: found ternary weights, expected plain arrays, or those of a model with"
    ):
        save_hf(model, attach(params, ("mlp/.*=ternary",)), tmp_path / "part")
    with pytest.raises(UserError, match="params: found ternary weights"):
        save_hf(tiny.model()[0], attach(tiny.model()[1], BITNET), tmp_path / "llama")


def test_a_converted_checkpoint_still_rounds(words, tmp_path):
    model, params = tiny.model(vocab=300, sub_norms=True, activation="relu2", scan_layers=True)
    save_hf(model, attach(params, BITNET), tmp_path / "hf", tokenizer_from=words)
    run(input=tmp_path / "hf", output=tmp_path / "ours")
    opened, (_, expected) = open_model(tmp_path / "ours", template="text"), load_hf(tmp_path / "hf")
    expected = unstack_layers(frozen(expected))
    jax.tree.map(np.testing.assert_array_equal, opened.params, expected)
    assert jax.tree.structure(expected) != jax.tree.structure(unstack_layers(params)), "plain arrays would be dense"


def test_the_api_is_lazy_and_knows_its_names():
    assert {"load_hf", "save_hf"} <= set(dir(easylm_plus))
    with pytest.raises(AttributeError, match="no attribute 'save_hg'"):
        easylm_plus.save_hg  # noqa: B018


def test_precision_of_a_random_model_is_kept(tmp_path):
    """A model of our own, never anybody else's, goes out and comes back with the same logits."""
    model, params = tiny.model()
    save_hf(model, params, tmp_path / "out")
    again, weights = load_hf(tmp_path / "out", attention="xla")
    tokens = np.arange(12)[None] % 50
    logits = [jax.jit(m.apply)({"params": p}, tokens) for m, p in ((model, params), (again, weights))]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    assert isinstance(again, Transformer) and again.precision == precision("float32")


def test_gpt2_as_openai_published_it(tmp_path):
    """Its files have no `transformer.` before the names, and masks among the weights."""
    model, params = tiny.model(**{**GPT2, "num_kv_heads": 4}, scan_layers=True)
    save_hf(model, params, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    bare |= {f"h.{i}.attn.bias": np.tri(16, dtype=bool)[None, None] for i in range(2)}
    save_file(bare, tmp_path / "out/model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], params)
    save_file({**bare, "h.0.attn.biases": np.ones(3)}, tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match=r"found transformer\.h\.0\.attn\.biases"):
        load_hf(tmp_path / "out")
