"""A cache in int8: half the bytes, answers that are nearly those of the whole pass, and no word is lost on the way."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.models.families import preset
from easylm_plus.models.kv_cache import Rows8, empty, read, rows8, write
from easylm_plus.models.transformer import Transformer
from easylm_plus.numerics.precision import precision

GOLDEN = Path(__file__).parents[1] / "golden"


def test_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 16)), jnp.float32).at[0, 1].set(0)
    kept = rows8(x)
    error = np.abs(read(kept, jnp.float32) - x)
    assert (error <= np.abs(x).max(-1, keepdims=True) / 254 * 1.001).all() and not error[0, 1].any()
    one_scale = np.round(x * 127 / np.abs(x).max()) / 127 * np.abs(x).max()
    assert (np.abs(one_scale - x) > np.abs(x).max(-1, keepdims=True) / 254 * 1.001).mean() > 0.1
    cache = write(empty("int8", (2, 3, 8, 16), jnp.float32), x, 2)
    np.testing.assert_array_equal(read(cache, jnp.float32)[:, :, 2:7].swapaxes(1, 2), read(kept, jnp.float32))
    assert not np.asarray(read(cache, jnp.float32)[:, :, :2]).any() and cache.codes.dtype == jnp.int8


@pytest.mark.parametrize("scan", (True, False))
def test_half_the_bytes(scan):
    config = preset("debug", head_dim=64, scan_layers=scan)
    size = lambda kind: sum(
        x.nbytes
        for x in jax.tree.leaves(
            Transformer(dataclasses.replace(config, kv_cache=kind), precision("bf16")).init_cache(2, 32).layers
        )
    )
    assert size("int8") == size("compute") * (64 + 4) / 128


@functools.cache
def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


def logits_with(name, kind, ids=None):
    """Of all tokens, one after the other, through a cache."""
    model, params = load_hf(GOLDEN / name, kv_cache=kind)
    ids = golden(name)["input_ids"] if ids is None else ids
    step = jax.jit(lambda token, cache: model.apply({"params": params}, token, None, None, cache))
    cache, out = model.init_cache(len(ids), ids.shape[1]), []
    for column in ids.T:
        logits, cache = step(column[:, None].astype(np.int32), cache)
        out.append(logits[:, 0])
    return np.stack(out, 1), cache


@pytest.mark.parametrize("name", ("llama3_tiny", "yuan2_tiny"))
def test_logits_are_nearly_those_of_the_whole_pass(name):
    expected = golden(name)["logits"]
    exact, _ = logits_with(name, "compute")
    found, cache = logits_with(name, "int8")
    assert isinstance(cache.layers.k, Rows8)
    size = np.abs(expected).max()
    assert np.abs(exact - expected).max() < 1e-4 * size
    assert 1e-4 * size < np.abs(found - expected).max() < 2e-2 * size


def test_greedy_tokens(monkeypatch):
    """Another token than the reference's is only taken where two are closer than int8 is off by; and seldom."""
    ids = golden("llama3_tiny")["gen_tokens"]
    expected, _ = logits_with("llama3_tiny", "compute", ids)
    ordered = np.sort(expected, -1)
    margin = ordered[..., -1] - ordered[..., -2]

    def misses():
        found, _ = logits_with("llama3_tiny", "int8", ids)
        return found.argmax(-1) != expected.argmax(-1), np.abs(found - expected).max(-1)

    missed, off = misses()
    assert missed.mean() < 0.1 and off.max() < 0.05 * np.abs(expected).max()
    assert (margin[missed] < 2 * off[missed]).all()
    monkeypatch.setattr("easylm_plus.models.attention.read", lambda kept, dtype: (kept.codes / 127).astype(dtype))
    assert misses()[0].mean() > 0.3, "without the scales"


def test_generation_through_both_caches():
    """The batched loop and the stream take the same cache."""
    model, params = load_hf(GOLDEN / "llama3_tiny", kv_cache="int8")
    prompt = golden("llama3_tiny")["input_ids"][0, :7].tolist()
    generator = Generator(model, params, ())
    assert generator([prompt], 8)[0] == list(generator.stream(prompt, 8))


def test_another_kind_is_refused():
    with pytest.raises(UserError, match=r"model\.kv_cache = 'int4': expected one of compute, int8"):
        preset("debug", kv_cache="int4")
