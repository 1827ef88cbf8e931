"""Held-out loss by source, and the entropy that a model has to beat."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from easylm_plus.objectives.lm import LanguageModel

Arrays = dict[str, Any]


def make_evaluate(
    objective: LanguageModel, sources: Sequence[str], replicated: Any = None
) -> Callable[[Any, Iterable[Arrays]], dict[str, float]]:
    """A function (params, batches) -> {"eval/loss": ..., "eval/loss/<source>": ...}, weighted by loss token.

    Of the model that will decode: its experts drop nothing.

    `replicated` is the sharding of the sums on a mesh: every process has to be able to read them.
    """

    objective = dataclasses.replace(objective, model=objective.model.roomy())

    @partial(jax.jit, out_shardings=replicated)
    def sums(params: Any, batch: Arrays) -> Any:
        return objective(params, batch, objective.denominators(batch))[1]

    def evaluate(params: Any, batches: Iterable[Arrays]) -> dict[str, float]:
        nll, tokens = np.zeros(len(sources)), np.zeros(len(sources))
        for batch in batches:
            parts = jax.device_get(sums(params, batch))
            nll, tokens = nll + parts["nll"], tokens + parts["tokens"]
        row = {"eval/loss": float(nll.sum() / tokens.sum()) if tokens.any() else float("nan")}
        return row | {f"eval/loss/{s}": float(nll[i] / tokens[i]) for i, s in enumerate(sources) if tokens[i]}

    return evaluate


def unigram_entropy(batches: Iterable[Arrays], vocab_size: int) -> float:
    """Entropy, in nats, of the learned tokens' own distribution: the loss of the best model without context."""
    counts = np.zeros(vocab_size)
    for batch in batches:
        np.add.at(counts, np.asarray(batch["targets"]).ravel(), np.asarray(batch["loss_weights"]).ravel())
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
