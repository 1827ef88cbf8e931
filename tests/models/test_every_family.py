"""What holds for every family: decoding is training, meshes and stacking change nothing, every weight learns.

Each is a preset with its sizes shrunk, so a new row of models/families.py is tested by adding its name.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from easylm_plus.inference.generate import _decode, _prefill
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.families import PRESETS
from easylm_plus.models.transformer import Transformer, abstract_parameters, init_parameters, unstack_layers
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

FAMILIES = (
    "llama-7b", "llama2-70b", "llama3.2-1b", "mistral-7b", "qwen2-7b", "yuan-2b", "yuan-m32", "mixtral-8x7b",
    "switch-base-8", "palm-8b", "gpt3-125m", "gpt-fp8-125m", "bitnet-3b", "bitnet-2b4t", "stablelm2-1.6b",
)  # fmt: skip
VARIANTS = {"yuan-2b ema": {"lfa_variant": "ema"}, "yuan-2b share_qk": {"lfa_variant": "none", "share_qk": True}}
NAMES = (*FAMILIES, *VARIANTS)
MESHES = ({"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2, "expert": 2})  # with experts
DENSE_MESH = {"fsdp": 2, "sequence": 2, "tensor": 2}
VOCAB, ROWS, LENGTH = 64, 8, 16
each_family = pytest.mark.parametrize("name", NAMES)


def shrunk(name: str, **overrides: object) -> ModelConfig:
    full = PRESETS[name.split()[0]]
    heads = {full.num_heads: 4, 1: 1}.get(full.num_kv_heads, 2)
    small = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": heads, "head_dim": 8, "max_length": 32, "sliding_window": full.sliding_window and 4,
        "num_experts": full.num_experts and 4, "logit_scale": 1.0 if full.logit_scale == 1 else 32**-0.5,
        "init": "palm" if full.init == "palm" else "fan_in",
    }  # fmt: skip
    return dataclasses.replace(full, **{**small, **VARIANTS.get(name, {}), **overrides})


@functools.cache
def built(name: str, **overrides: object) -> tuple[Transformer, dict]:
    """The model, with parameters moved off their starting values: no norm weight is 1 and no bias 0."""
    model = Transformer(shrunk(name, **overrides))
    return model, stacked(name) if model.config.scan_layers else unstack_layers(stacked(name))


@functools.cache
def stacked(name: str) -> dict:
    fresh = jax.jit(lambda: init_parameters(Transformer(shrunk(name, scan_layers=True)), jax.random.key(0)))()
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.1, x.shape), np.float32), fresh)


def test_all_lines_of_presets_are_here():
    line = lambda name: name.split("-")[0].rstrip("0123456789.")
    assert {line(name) for name in PRESETS} - {line(name) for name in FAMILIES} == {
        "debug", "tiny", "koala", "codellama", "phind", "skywork",
    }, "these are LLaMA in all but their sizes"  # fmt: skip


# --- decoding ---

PROMPTS = [[5, 9, 2], [1, 33, 60, 12, 12, 7, 48, 21, 3], [17]]
MORE = np.random.default_rng(0).integers(0, VOCAB, (3, 4)).astype(np.int32)


def whole_passes(model, params):
    """Logits [3, 1 + N, V] after each prompt and each of MORE; rows are padded on the right, where nothing looks."""
    rows = [prompt + more.tolist() for prompt, more in zip(PROMPTS, MORE)]
    tokens = np.asarray([row + [0] * (13 - len(row)) for row in rows])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    return np.stack([row[len(prompt) - 1 :][: 1 + MORE.shape[1]] for row, prompt in zip(logits, PROMPTS)])


@functools.cache
def decoding(model):
    """(prefill, decode), compiled once."""
    prefill = jax.jit(functools.partial(_prefill, model), static_argnames="slots")
    return prefill, jax.jit(functools.partial(_decode, model))


def step_by_step(model, params, padding=0):
    """The same with a cache, in one batch padded on the left; `padding` is the segment of the pads."""
    slots = max(map(len, PROMPTS))
    tokens, segments = np.full((2, 3, slots), padding, np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, slots - len(prompt) :], segments[row, slots - len(prompt) :] = prompt, 1
    prefill, decode = decoding(model)
    logits, cache = prefill(params, tokens, segments, slots=slots + MORE.shape[1])
    steps = [logits]
    for n, token in enumerate(MORE.T):
        logits, cache = decode(params, cache, token, np.asarray([len(prompt) + n for prompt in PROMPTS]))
        steps.append(logits)
    return np.stack(steps, axis=1)


@each_family
def test_a_left_padded_batch_decodes_as_each_row_in_one_pass(name):
    model, params = built(name, **({"capacity_factor": 9.0} if "switch" in name else {}))  # a whole pass drops nothing
    expected = whole_passes(model, params)
    np.testing.assert_allclose(step_by_step(model, params), expected, rtol=0, atol=2e-5)
    assert np.abs(step_by_step(model, params, padding=1) - expected).max() > 1e-2, "padding that is seen"


# --- meshes and stacking ---


def loss_and_gradients(model, params, sizes):
    """On a mesh of eight devices, or on one where there are no sizes."""
    objective = LanguageModel(model, 2, chunk=32, router_balance=0.1, router_z=0.01)
    share = lambda params, batch: objective(params, batch, objective.denominators(batch))[0]
    batch = tiny.random_batch(ROWS, LENGTH, VOCAB)
    if not sizes:
        return jax.jit(jax.value_and_grad(share))(params, batch)
    mesh, config = make_mesh(sizes), model.config
    with sharding.use(mesh, sharding.rules_for(mesh, config.num_heads, config.num_kv_heads)):
        shapes, axes = abstract_parameters(model)
        params = jax.device_put(params, sharding.shardings(axes, shapes, mesh))
        cut = NamedSharding(mesh, sharding.spec_of(("batch", "length"), (ROWS, LENGTH), mesh))
        return jax.jit(jax.value_and_grad(share))(params, jax.device_put(batch, cut))


def unrolled(name):
    return built(name, scan_layers=False, remat="full")


@functools.cache
def on_one_device(name):
    """Of layers that are unrolled and recomputed."""
    return loss_and_gradients(*unrolled(name), {})


def assert_alike(gradients, others):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, others)


def on_meshes():
    """Each family on a mesh, or on two that have experts. Marked slow: one of the two, but for one such family, and
    families whose weights are cut as those of another one here are."""
    alike = ("llama-7b", "llama3.2-1b", "mistral-7b", "gpt-fp8-125m", "bitnet-3b", "yuan-2b share_qk")
    for name in NAMES:
        meshes = MESHES if shrunk(name).num_experts else (DENSE_MESH,)
        quick = {"switch-base-8": MESHES[0], "yuan-m32": MESHES[1]}
        for sizes in meshes:
            slow = quick.get(name, sizes) != sizes or name in alike
            yield pytest.param(name, sizes, marks=pytest.mark.slow if slow else (), id=f"{name}-{'-'.join(sizes)}")


@pytest.mark.parametrize(("name", "sizes"), list(on_meshes()))
def test_neither_a_mesh_nor_stacked_layers_change_loss_or_gradients(name, sizes):
    """Stacked and kept for the backward pass, on eight devices, beside unrolled and recomputed, on one."""
    loss, gradients = on_one_device(name)
    other, others = loss_and_gradients(*built(name), sizes)
    assert float(other) == pytest.approx(float(loss), abs=1e-5)
    assert_alike(gradients, unstack_layers(jax.device_get(others)))


@each_family
def test_every_weight_learns(name):
    for path, gradient in jax.tree.leaves_with_path(on_one_device(name)[1]):
        weight, size = jax.tree_util.keystr(path), np.abs(gradient).max()
        # a shift of all keys alike, which softmax does not see unless positions turn it
        idle = "k_proj']['bias" in weight and built(name)[0].config.positions == "learned"
        assert size < 1e-6 if idle else 1e-6 < size < np.inf, weight


def test_a_gradient_of_one_device_only_is_noticed():
    """What a mean over devices of each device's own mean would give."""
    loss, gradients = on_one_device("mixtral-8x7b")
    model, params = unrolled("mixtral-8x7b")
    objective = LanguageModel(model, 2, chunk=32, router_balance=0.1, router_z=0.01)
    own = jax.jit(jax.value_and_grad(lambda params, batch: objective(params, batch, objective.denominators(batch))[0]))
    batch = tiny.random_batch(ROWS, LENGTH, VOCAB)
    parts = [own(params, {key: value[rows] for key, value in batch.items()}) for rows in np.split(np.arange(ROWS), 2)]
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, *parts)
    assert abs(float(mean[0]) - float(loss)) > 1e-3
    with pytest.raises(AssertionError):
        assert_alike(gradients, mean[1])
