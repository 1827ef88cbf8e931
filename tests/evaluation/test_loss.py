"""Held-out loss is the mean over learned tokens, whatever the batches; the entropy to beat is that of the tokens."""

import math

import jax
import numpy as np
import pytest
import tiny

from easylm_plus.evaluation.loss import make_evaluate, unigram_entropy
from easylm_plus.objectives.lm import LanguageModel


@pytest.fixture(scope="module")
def measured():
    """(parameters, batches, nll of each token by NumPy, weights and sources of the tokens, the evaluation)."""
    model, params = tiny.model(num_layers=1)
    batches = [tiny.random_batch(4, 16, 50, seed) for seed in range(3)]
    batches[2]["loss_weights"][:, 3:] = 0  # a batch that weighs little
    batches[2]["loss_weights"][0, 0] = 1
    logits = jax.jit(lambda b: model.apply({"params": params}, b["inputs"], b["positions"], b["segment_ids"]))
    nll = []
    for batch in batches:
        x = np.asarray(logits(batch), np.float64)
        x = x - x.max(-1, keepdims=True)
        x = x - np.log(np.exp(x).sum(-1, keepdims=True))
        nll.append(-np.take_along_axis(x, batch["targets"][..., None], -1)[..., 0])
    pick = lambda name: np.stack([b[name] for b in batches])
    found = make_evaluate(LanguageModel(model, 3), ["a", "b", "absent"])(params, batches)
    return np.stack(nll), pick("loss_weights"), pick("source_ids"), found


def test_the_mean_is_over_tokens(measured):
    nll, weights, _, found = measured
    assert found["eval/loss"] == pytest.approx((nll * weights).sum() / weights.sum(), rel=1e-5)
    of_batches = np.mean([(n * w).sum() / w.sum() for n, w in zip(nll, weights)])
    assert found["eval/loss"] != pytest.approx(of_batches, rel=1e-3)


def test_every_source_has_its_own(measured):
    nll, weights, sources, found = measured
    for i, name in enumerate("ab"):
        w = weights * (sources == i)
        assert found[f"eval/loss/{name}"] == pytest.approx((nll * w).sum() / w.sum(), rel=1e-5)
    assert set(found) == {"eval/loss", "eval/loss/a", "eval/loss/b"}, "nothing is said about a source without tokens"


def test_nothing_held_out_is_no_loss_of_zero():
    model, params = tiny.model(num_layers=1)
    assert math.isnan(make_evaluate(LanguageModel(model, 1), ["a"])(params, [])["eval/loss"])


def test_experts_drop_nothing_in_evaluation():
    model, params = tiny.model(num_experts=4, capacity_factor=0.5)
    batch = tiny.random_batch(4, 16, 50)
    loss = lambda model: make_evaluate(LanguageModel(model, 2), ["a", "b"])(params, [batch])["eval/loss"]
    objective = LanguageModel(model, 2)
    in_training = float(jax.jit(objective)(params, batch, objective.denominators(batch))[0])
    assert loss(model) == loss(model.roomy()) and abs(loss(model) - in_training) > 1e-3


def test_unigram_entropy():
    targets = np.array([[0, 0, 1, 1], [2, 2, 3, 9]])
    batch = {"targets": targets, "loss_weights": (targets < 4).astype(np.float32)}
    p = np.array([2, 2, 2, 1]) / 7
    assert unigram_entropy([batch], 10) == pytest.approx(-(p * np.log(p)).sum())
    assert unigram_entropy([batch, batch], 10) == pytest.approx(unigram_entropy([batch], 10))
    assert unigram_entropy([{**batch, "loss_weights": np.ones((2, 4))}], 10) > unigram_entropy([batch], 10)
    uniform = {"targets": np.arange(8)[None], "loss_weights": np.ones((1, 8))}
    assert unigram_entropy([uniform], 8) == pytest.approx(np.log(8))
