"""The model computes what Hugging Face's LLaMA, Llama 3 and Qwen2 compute, forwards, backwards and token by token.

The reference vectors (tests/golden/README.md) are float32 results of torch on random weights of ours. Logits agree
to 5e-5, gradients to 1e-3 relative and 1e-5 absolute, greedy tokens exactly. Each check is shown to fail on a model
that is wrong in one point.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.inference.generate import Generator
from easylm_plus.interop.huggingface import LLAMA, load_hf
from easylm_plus.models.transformer import Block, unstack_layers
from easylm_plus.objectives.lm import LanguageModel

FOLDER = Path(__file__).parents[1] / "golden"
MODELS = ("llama_tiny", "llama3_tiny", "qwen2_tiny")
PROMPT = 7
each_model = pytest.mark.parametrize("name", MODELS)
scanned_or_not = pytest.mark.parametrize("scan", (True, False), ids=("scanned", "unrolled"))


@functools.cache
def golden(name):
    with np.load(FOLDER / name / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded(name, **overrides):
    model, params = load_hf(FOLDER / name, **overrides)
    return model, params, jax.jit(lambda *args: model.apply({"params": params}, *args))


def check_logits(actual, name, prefix="", where=np.s_[:]):
    np.testing.assert_allclose(np.asarray(actual)[where], golden(name)[f"{prefix}logits"][where], rtol=0, atol=5e-5)


def loss_and_gradients(model, params, ids, targets):
    """Mean over the T - 1 targets of each row, as a batch of the language-model objective."""
    batch = {
        "inputs": ids,
        "targets": targets,
        "loss_weights": np.ones(ids.shape, np.float32) * (np.arange(ids.shape[1]) < ids.shape[1] - 1),
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        "segment_ids": np.ones_like(ids),
        "source_ids": np.zeros_like(ids),
    }
    objective = LanguageModel(model, num_sources=1, chunk=10)
    share = lambda params: objective(params, batch, objective.denominators(batch))[0]
    return jax.jit(jax.value_and_grad(share))(params)


def check_gradients(gradients, name):
    """Compares those that the reference holds, under its names."""
    ours = theirs_of(gradients)
    expected = {key.removeprefix("grad::"): value for key, value in golden(name).items() if key.startswith("grad::")}
    assert len(expected) >= 3
    for theirs, value in expected.items():
        np.testing.assert_allclose(ours[theirs], value, rtol=1e-3, atol=1e-5, err_msg=theirs)


def theirs_of(tree):
    """Our tree as {their name: array in their layout}."""
    tree, names = (tree if "0" in tree["layers"] else unstack_layers(tree)), {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        keys = [entry.key for entry in path]
        layer = keys[1] if keys[0] == "layers" else ""
        theirs = LLAMA["/".join([keys[0], "{i}", *keys[2:]] if layer else keys)].format(i=layer)
        names[theirs] = np.asarray(leaf).T if keys[-1] == "kernel" else np.asarray(leaf)
    return names


def kv_heads_tiled(params, config):
    """As if query head h used key head h mod G instead of h // R: q's and o's heads in that order."""
    order = np.arange(config.num_heads).reshape(config.heads_per_group, config.num_kv_heads).T.ravel()
    columns = (order[:, None] * config.head_dim + np.arange(config.head_dim)).ravel()
    attention = dict(params["layers"]["self_attn"])
    attention["q_proj"] = jax.tree.map(lambda x: x[..., columns], attention["q_proj"])
    attention["o_proj"] = jax.tree.map(lambda x: x[:, columns], attention["o_proj"])
    return {**params, "layers": {**params["layers"], "self_attn": attention}}


@each_model
@scanned_or_not
def test_logits(name, scan):
    apply = loaded(name, scan_layers=scan)[2]
    check_logits(apply(golden(name)["input_ids"]), name)


@each_model
def test_hidden_states_after_embedding_blocks_and_norm(name):
    model, params, _ = loaded(name, scan_layers=False)
    keep = lambda module, _: isinstance(module, Block) or module.name == "embed_tokens"
    last, state = model.apply({"params": params}, golden(name)["input_ids"], method="hidden", capture_intermediates=keep)
    inner = state["intermediates"]
    blocks = [inner["layers"][str(i)]["__call__"][0][0] for i in range(model.config.num_layers)]
    ours = [inner["embed_tokens"]["__call__"][0], *blocks[:-1], last]
    np.testing.assert_allclose(np.stack(ours), golden(name)["hidden_states"], rtol=0, atol=5e-5)


@each_model
@scanned_or_not
def test_loss_and_gradients(name, scan):
    model, params, _ = loaded(name, scan_layers=scan)
    ids = golden(name)["input_ids"]
    loss, gradients = loss_and_gradients(model, params, ids, np.roll(ids, -1, axis=1))
    np.testing.assert_allclose(loss, golden(name)["loss"], rtol=1e-6)
    check_gradients(gradients, name)


@each_model
@scanned_or_not
def test_greedy_tokens_with_cache(name, scan):
    model, params, _ = loaded(name, scan_layers=scan)
    tokens = golden(name)["gen_tokens"]
    generated = Generator(model, params, stop_ids=())(tokens[:, :PROMPT].tolist(), tokens.shape[1] - PROMPT)
    assert generated == tokens[:, PROMPT:].tolist()


@each_model
@pytest.mark.parametrize("attention", ("xla", "blocked"))
def test_left_padded_rows(name, attention):
    apply = loaded(name, attention=attention)[2]
    g = golden(name)
    mask = g["leftpad_attention_mask"]
    logits = apply(g["leftpad_input_ids"], g["leftpad_position_ids"], mask)
    check_logits(logits, name, "leftpad_", mask > 0)


# --- what must fail ---


@pytest.mark.parametrize(
    ("name", "wrong"),
    (
        ("llama_tiny", {"rope_theta": 11000.0}),
        ("llama3_tiny", {"rope_scaling": "none"}),
        ("llama3_tiny", {"rope_scaling": "linear"}),
        ("qwen2_tiny", {"rope_theta": 1e4}),
        ("qwen2_tiny", {"norm_eps": 1e-2}),
    ),
    ids=str,
)
def test_a_wrong_constant_is_noticed(name, wrong):
    logits = loaded(name, **wrong)[2](golden(name)["input_ids"])
    assert far_off(logits, name)


@pytest.mark.parametrize("name", ("llama3_tiny", "qwen2_tiny"))
@pytest.mark.parametrize("heads", ("tiled", "swapped"))
def test_wrong_grouping_of_heads_is_noticed(name, heads):
    model, params, _ = loaded(name)
    apply = jax.jit(lambda params: model.apply({"params": params}, golden(name)["input_ids"]))
    params = kv_heads_tiled(params, model.config) if heads == "tiled" else kv_heads_swapped(params)
    assert far_off(apply(params), name)


def kv_heads_swapped(params):
    halves = lambda x: jnp.roll(x, x.shape[-1] // 2, axis=-1)  # two key/value heads
    attention = dict(params["layers"]["self_attn"])
    attention |= {key: jax.tree.map(halves, attention[key]) for key in ("k_proj", "v_proj")}
    return {**params, "layers": {**params["layers"], "self_attn": attention}}


def far_off(logits, name):
    with pytest.raises(AssertionError):
        check_logits(logits, name)
    return np.abs(np.asarray(logits) - golden(name)["logits"]).max() > 100 * 5e-5


@each_model
def test_gradients_of_another_loss_are_noticed(name):
    model, params, _ = loaded(name)
    ids = golden(name)["input_ids"]
    _, gradients = loss_and_gradients(model, params, ids, ids)  # targets not shifted
    with pytest.raises(AssertionError):
        check_gradients(gradients, name)


def test_attending_to_padding_is_noticed():
    name, g = "llama_tiny", golden("llama_tiny")
    mask = g["leftpad_attention_mask"]
    logits = loaded(name)[2](g["leftpad_input_ids"], g["leftpad_position_ids"])
    with pytest.raises(AssertionError):
        check_logits(logits, name, "leftpad_", mask > 0)


def test_greedy_tokens_of_a_wrong_model_differ():
    model, params, _ = loaded("llama_tiny", rope_theta=100.0)
    tokens = golden("llama_tiny")["gen_tokens"]
    generated = Generator(model, params, stop_ids=())(tokens[:, :PROMPT].tolist(), tokens.shape[1] - PROMPT)
    assert generated != tokens[:, PROMPT:].tolist()
