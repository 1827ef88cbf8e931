"""What the loader packs gives the logits that each segment has alone: nothing leaks through attention, positions or,
with lfa_reset, Yuan's filter, whichever way rows are packed."""

import functools

import jax
import numpy as np
import pytest
import tiny

from data_pipelines.batches.batch_stats import Item, make_batch
from data_pipelines.batches.packing import pack
from data_pipelines.templates.template import Example
from easylm_plus.interop.huggingface import load_hf

LENGTH = 24
MODELS = {"llama": ("llama_tiny", {}), "yuan": ("yuan2_tiny", {"lfa_reset": True})}
PACKED = ("best_fit", "first_fit", "concat_split")


@functools.cache
def loaded(name, **overrides):
    model, params = load_hf(tiny.ROOT / "tests/golden" / name, **overrides)
    return model, jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))


def documents(vocab, longest):
    """Twelve documents of 2 positions and more."""
    rng = np.random.default_rng(0)
    for number in range(12):
        ids = rng.integers(0, vocab, rng.integers(3, longest + 2), np.int32)
        yield Item(0, str(number), Example(ids, np.ones(len(ids), np.float32)), len(ids) - 1)


def packed_and_alone(vocab, method):
    """The rows, and their segments in the same order as rows of their own."""
    items = list(documents(vocab, 60 if method == "concat_split" else LENGTH))
    rows = pack([item.example.positions for item in items], LENGTH, method)
    made = [[items[piece.example].piece(piece) for piece in row] for row in rows]
    alone = [[item] for row in made for item in row]
    return (make_batch(rows, LENGTH, ["a"]).arrays for rows in (made, alone))


def logits(apply, arrays, **changed):
    """[positions with a target, V]"""
    taken = {**arrays, **changed}
    every = np.asarray(apply(taken["inputs"], taken["positions"], taken["segment_ids"]))
    return every[arrays["segment_ids"] > 0]


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("family", MODELS)
def test_packed_logits_are_those_of_the_segments_alone(family, method):
    name, overrides = MODELS[family]
    model, apply = loaded(name, **overrides)
    packed, alone = packed_and_alone(model.config.vocab_size, method)
    assert len(packed["inputs"]) < len(alone["inputs"]) and packed["segment_ids"].max() > 1
    expected = logits(apply, alone)
    assert np.abs(logits(apply, packed) - expected).max() < 1e-4
    one_segment = np.minimum(packed["segment_ids"], 1)
    assert np.abs(logits(apply, packed, segment_ids=one_segment) - expected).max() > 0.01, "segments see each other"
    if family == "yuan":
        _, leaking = loaded(name)
        assert not loaded(name)[0].config.lfa_reset
        assert np.abs(logits(leaking, packed) - logits(leaking, alone)).max() > 0.01, "the filter looks across"


def test_what_a_split_costs():
    """A piece is learned without what came before it: its logits are not those of its place in the whole document."""
    model, apply = loaded("llama_tiny")
    (item,) = list(documents(model.config.vocab_size, LENGTH))[:1]
    size = item.example.positions
    pieces = [item.piece(piece) for row in pack([size], size // 2, "concat_split") for piece in row]
    whole, parts = (make_batch(rows, LENGTH, ["a"]).arrays for rows in ([[item]], [[piece] for piece in pieces]))
    apart = np.abs(logits(apply, parts) - logits(apply, whole)).max(axis=1)
    first = size // 2
    assert apart[:first].max() < 1e-4 and apart[first] > 0.01
