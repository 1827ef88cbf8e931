"""Every transform of weights with every model family: made, trained, saved, loaded, and made to speak.

CI runs each transform once, and between them each family, but for what differs from another by a number, or is two of
them together that other files have together; the marker `slow` all pairs.
"""

import functools
import itertools
import re

import jax
import numpy as np
import pytest
import tiny
from models.test_every_family import FAMILIES, VARIANTS, shrunk

from easylm_plus.compression.schemes import SCHEMES, scheme
from easylm_plus.compression.walk import walk
from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.interop.weights import of_params
from easylm_plus.models.transformer import Transformer, init_parameters
from easylm_plus.numerics.deploy import all_filed, all_served
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.leaves import KEPT, is_kept
from easylm_plus.numerics.rules import MATRIX, attach
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training import checkpoint
from easylm_plus.training.assembly import assemble
from easylm_plus.tree import path_name

ROWS, LENGTH, VOCAB = 4, 16, 64
ALL, QV = ("layers/.*=ternary",), ("self_attn/(q|v|qk)_proj=4",)
TRAINED = {  # what a run is configured with
    "plain": {},
    "ternary": {"rules": ALL},
    "turning ternary": {"rules": ("self_attn/.*_proj=ternary",), "ternary_warmup": 2},
    **{level: {"fp8_level": level} for level in ("O1", "O2", "O3")},
    **{f"ternary, {level}": {"fp8_level": level, "rules": ALL} for level in ("O1", "O2", "O3")},
    "adapters": {"lora": QV},
    "adapters, O3": {"lora": QV, "fp8_level": "O3"},
    "adapters on nf4": {"lora": QV, "rules": ("layers/.*=nf4",)},
    "adapters on nf4_double": {"lora": QV, "rules": ("layers/.*=nf4_double",)},
}
SCHEMES_TRIED = (
    "int8", "int6", "int5:group=16", "int4:group=16,method=gptq", "int4:group=16,method=awq,asym", "int3", "int2",
    "nf4", "nf4:double", "fp8", "ternary", "sparse:share=0.5,method=sparsegpt", "sparse:share=0.7,method=wanda",
    "2:4:method=sparsegpt",
)  # fmt: skip
NAMES = (*FAMILIES, *VARIANTS)
LIGHT = tuple(name for name in NAMES if not shrunk(name).num_experts and "yuan" not in name)  # compiled soon
# of these, level by level: tests/parallel/test_zero.py and test_ternary_meshes.py
LATER = ("ternary, O1", "ternary, O3", "adapters on nf4_double", "int6", "int3")
# in the order of TRAINED: experts and filters with what is compiled soon, but for experts that are ternary codes
FIRST = (
    "yuan-m32", "switch-base-8", "yuan-2b", "mistral-7b", "qwen2-7b", "llama2-70b", "llama-7b", "mixtral-8x7b",
    "llama3.2-1b", "palm-8b", "gpt3-125m", "stablelm2-1.6b", "bitnet-3b",
)  # fmt: skip
PROMPT, MORE = [[5, 9, 2, 33]], 4


def covering(transforms, families):
    """Each transform once, with one family after the other."""
    return {(transform, families[i % len(families)]) for i, transform in enumerate(transforms)}


def pairs(transforms, families):
    """All pairs, of which those that cover `families` in turn are not marked slow, nor what is for LATER."""
    quick = {pair for pair in covering(transforms, families) if pair[0] not in LATER}
    every = itertools.product(transforms, NAMES)
    return [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in every]


def config_of(family, transform):
    config = base("llama-7b")
    config.model.update(vars(shrunk(family, attention="xla")))
    config.update_from_flattened_dict({f"numerics.{key}": value for key, value in TRAINED[transform].items()})
    config.numerics.precision = "float32"
    config.optimizer.update({"learning_rate": 1e-2, "schedule": "constant"})
    config.objective.chunk = 64
    return config


@functools.cache
def assembled(family, transform):
    mesh = make_mesh({}, jax.devices()[:1])
    return assemble(config_of(family, transform), mesh, 2, 100), mesh


@functools.cache
def trained(family):
    """Parameters of a plain model, on the host, moved off their starting values."""
    run, mesh = assembled(family, "plain")
    with sharding.use(mesh, run.rules):
        params = jax.jit(lambda: init_parameters(run.model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.1, x.shape), np.float32), params)


@functools.cache
def speaker(model):
    """A generator, compiled once for all weights of the same kinds."""
    return Generator(model, {}, ())


def logits_of(model, params):
    """Of what follows a prompt."""
    tokens, segments, _ = speaker(model)._padded(PROMPT)
    prefill = speaker(model)._prefill
    return np.asarray(prefill(jax.device_get(params), tokens, segments, slots=tokens.shape[1] + MORE)[0])


def said(model, params):
    """Logits of what follows a prompt, and what follows it greedily."""
    speaker(model).params = jax.device_get(params)
    return logits_of(model, params), speaker(model)(PROMPT, MORE)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("transform", "family"), pairs(tuple(TRAINED), FIRST))
def test_trained(transform, family, tmp_path):
    """Two steps learn what learns and move nothing else; what is saved is loaded bit for bit, and says the same."""
    run, mesh = assembled(family, transform)
    batch = tiny.random_batch(ROWS, LENGTH, VOCAB)
    with sharding.use(mesh, run.rules):
        state = jax.jit(run.make_state)(jax.tree.map(np.asarray, trained(family)))
        before = jax.device_get(state.params)
        for _ in range(2):
            state, metrics = run.step(state, batch)
            assert metrics["ok"] and np.isfinite(metrics["loss"])
    learns = lambda params: [decode(x) for x in jax.tree.leaves(run.numerics.trained(params), is_leaf=is_kept)]
    moved = [bool(np.any(np.asarray(a) != np.asarray(b))) for a, b in zip(learns(before), learns(state.params))]
    assert moved.count(False) <= 1, "but for a bias that nothing depends on"
    saved = checkpoint.Checkpoints(tmp_path, {"every": 1, "keep": 1, "keep_best": ""})
    meta = {"config": config_of(family, transform).to_dict(), "data_hash": ""}
    saved.save(2, run.to_saved(state), {"owes_evaluation": False}, meta, {})
    saved.wait()
    again, _ = saved.restore(2, run.saved)
    assert bits(again) == bits(run.to_saved(state))
    saved.close()
    rules = TRAINED[transform].get("rules", ())
    loaded = attach(all_served(checkpoint.read_parameters(tmp_path, 2)), rules)
    here = attach(run.named(state.params), rules)
    (logits, tokens), (expected, others) = said(run.model, loaded), said(run.model, here)
    np.testing.assert_array_equal(logits, expected)
    assert tokens == others and np.isfinite(logits).all()
    if "ternary" in transform:
        assert np.abs(logits_of(run.model, run.named(state.params)) - logits).max() > 1e-3, "latents are something else"


@pytest.mark.parametrize(("text", "family"), pairs(SCHEMES_TRIED, NAMES[len(TRAINED) :] + LIGHT))
def test_made_smaller(text, family, tmp_path):
    """All matrices become leaves, fewer bytes are filed, and what is loaded says what it said before."""
    model, asked = Transformer(shrunk(family, attention="xla")), scheme(text)
    weights = of_params(model.config, trained(family), "the tree")
    batches = [tiny.random_batch(ROWS, LENGTH, VOCAB, seed) for seed in (0, 1)]
    result = walk(weights, model.precision, asked, asked.ends, batches[:1] if asked.calibrated else (), batches[1:])
    assert np.isfinite(result.after) and result.after != result.before
    assert result.matrix_bytes[1] < result.matrix_bytes[0]
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(result.params, is_leaf=is_kept)}
    matrices = [name for name in leaves if re.search(MATRIX, name)]
    assert matrices and all(is_kept(leaves[name]) for name in matrices)
    filed = all_filed(result.params)
    checkpoint.write_parameters(tmp_path, filed, {"config": {}})
    loaded = checkpoint.read_parameters(tmp_path, 0)
    assert bits(loaded) == bits(filed)
    (logits, tokens), (expected, others) = said(model, all_served(loaded)), said(model, result.params)
    np.testing.assert_array_equal(logits, expected)
    assert tokens == others
    assert np.abs(logits - logits_of(model, trained(family))).max() > 1e-4, "the transform does something"


def test_nothing_is_left_out():
    assert {text.partition(":")[0] if not text.startswith("2:4") else "2:4" for text in SCHEMES_TRIED} == set(SCHEMES)
    kinds = {"Scaled", "LowRank", "PackedTernary", "Trits", "Integers", "NF4", "Int8Rows", "TwoFour", "Sparse"}
    assert set(KEPT) == kinds, "a new kind of leaf belongs into this file"
    quick = covering(TRAINED, FIRST) | covering(SCHEMES_TRIED, NAMES[len(TRAINED) :] + LIGHT)
    assert {family for transform, family in quick if transform not in LATER} == set(NAMES)


@pytest.mark.parametrize(
    ("keys", "message"),
    (
        ({"rules": ("layers/.*/nothing=ternary",)}, "matches no weight that can be transformed"),
        ({"rules": ("lm_head=ternary",)}, "matches no weight that can be transformed"),
        ({"rules": ("norm=ternary",)}, "matches no weight that can be transformed"),
        ({"rules": ("layers/.*=nf4",)}, "'=nf4', which does not learn; expected numerics.lora"),
        ({"rules": ("layers=int9",)}, "expected 'regular expression=transform' with one of"),
        ({"lora": ("embed=4",)}, "matches no matrix of the blocks"),
    ),
)
def test_what_cannot_be(keys, message, monkeypatch):
    monkeypatch.setitem(TRAINED, "wrong", keys)
    with pytest.raises(UserError, match=message):
        assemble(config_of("llama-7b", "wrong"), make_mesh({}, jax.devices()[:1]), 2, 100)


@pytest.mark.parametrize("text", ("int7", "int4:group=5", "int4:width=3", "sparse:share=2", "2:4:method=gptq"))
def test_widths_and_groups_that_cannot_be(text):
    with pytest.raises(UserError, match="--quantize="):
        scheme(text)("layers/mlp/up_proj/kernel", np.ones((32, 48), np.float32))
