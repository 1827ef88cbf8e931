"""Families without stored vectors compute what Hugging Face's own classes compute beside them (marker `parity`)."""

import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from easylm_plus.inference.generate import Generator
from easylm_plus.interop.configs import read_raw
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.objectives.lm import LanguageModel

SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
CASES = {
    "mistral": {"class": "Mistral", "config": {**SMALL, "sliding_window": 6}},
    "codellama": {"class": "Llama", "config": {**SMALL, "rope_theta": 1e6}},
    "llama3.2": {"class": "Llama", "config": {**SMALL, "tie_word_embeddings": True, "rope_theta": 5e5,
                                              "rope_scaling": LLAMA3}},
    "skywork": {"class": "Llama", "config": {**SMALL, "num_key_value_heads": 4, "vocab_size": 131,
                                             "rms_norm_eps": 1e-6}},
    "linear": {"class": "Llama", "config": {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}},
    "biases": {"class": "Llama", "config": {**SMALL, "attention_bias": True, "mlp_bias": True}},
    "mixtral": {"class": "Mixtral", "config": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2,
                                               "sliding_window": 6}},
    "bitnet": {"class": "BitNet", "config": SMALL},
    "stablelm": {"class": "StableLm", "config": {**SMALL, "use_qkv_bias": True, "partial_rotary_factor": 0.25,
                                                 "layer_norm_eps": 1e-5}},
    "gpt2": {"class": "GPT2", "model": "GPT2LMHeadModel", "config": {
        "vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}},
}  # fmt: skip
WRONG = {
    "mistral": {"sliding_window": 7},
    "codellama": {"rope_theta": 1e4},
    "llama3.2": {"rope_factor": 8.0},
    "skywork": {"norm_eps": 1e-2},
    "linear": {"rope_scaling": "none"},
    "biases": {"norm_eps": 1e-2},
    "mixtral": {"experts_per_token": 3},
    "bitnet": {"activation": "silu"},
    "stablelm": {"rotary_share": 0.5},
    "gpt2": {"activation": "relu"},
}
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory, peer):
    place = tmp_path_factory.mktemp("peer")
    script = Path(__file__).with_name("peer_models.py")
    subprocess.run([peer, script, place], input=json.dumps(CASES), text=True, check=True, timeout=200)
    return place


@pytest.fixture(params=CASES)
def case(request, folder):
    """(its name, its folder, what the peer computed)."""
    with np.load(folder / request.param / "expected.npz") as arrays:
        return request.param, folder / request.param, dict(arrays)


def test_logits(case):
    name, path, expected = case
    logits = lambda model, params: jax.jit(model.apply)({"params": params}, expected["input_ids"])
    np.testing.assert_allclose(logits(*load_hf(path)), expected["logits"], rtol=0, atol=5e-5)
    assert np.abs(logits(*load_hf(path, **WRONG[name])) - expected["logits"]).max() > 1e-3, "a wrong constant is seen"


def test_greedy_tokens_with_cache(case):
    _, path, expected = case
    tokens = expected["tokens"]
    assert Generator(*load_hf(path), stop_ids=())(tokens[:, :7].tolist(), 12) == tokens[:, 7:].tolist()


def test_gradients(case):
    _, path, expected = case
    model, params = load_hf(path)
    batch = tiny.next_token_batch(expected["input_ids"])
    objective = LanguageModel(model, num_sources=1)
    tree = jax.jit(jax.grad(lambda p: objective(p, batch, objective.denominators(batch))[0]))(params)
    theirs = {name.removeprefix("grad::"): x for name, x in expected.items() if name.startswith("grad::")}
    ours = tiny.under_their_names(tree, model.config, read_raw(path)["architectures"][0])
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(1.01 * value, theirs[name], rtol=1e-3, atol=1e-5)
