"""Next-token prediction: pre-training and chat fine-tuning alike; the batch's loss weights say what is learned.

An objective is two functions of a batch. `denominators` sums what the loss is divided by, from the batch alone;
calling the objective runs the model on a micro-batch. The step computes the denominators of the whole batch *first*
and each micro-batch divides by that one global number, so neither accumulation nor ragged masks change the loss: a
row with one learned token counts as one token. (EasyLM averaged over rows; a row with one token weighed as much as
one with 2,048.)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from easylm_plus.models.transformer import Transformer
from easylm_plus.objectives.cross_entropy import blocked_cross_entropy

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Weighted mean of the negative log-likelihood of the next token, plus an optional z-loss.

    Args:
      num_sources: how many data sources the batch's source_ids count, for the loss per source.
      z_loss: coefficient of logsumexp^2 (PaLM used 1e-4); keeps the logits from drifting.
      chunk: tokens a device whose logits exist at a time.
    """

    model: Transformer
    num_sources: int
    z_loss: float = 0.0
    chunk: int = 1024

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """What the loss is divided by: of a whole batch, over all micro-batches and devices."""
        return {"loss": batch["loss_weights"].sum()}

    def __call__(
        self, params: Any, batch: Batch, denominators: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This micro-batch's share of the loss (shares add up), and sums for the log.

        The sums: nll and tokens by source, float32[num_sources]; z is the sum of logsumexp^2.
        """
        x_BTD: Any = self.model.apply(
            {"params": params}, batch["inputs"], batch["positions"], batch["segment_ids"], method="hidden"
        )
        head: Any = lambda p, x: self.model.apply({"params": p}, x, method="head")
        denominator = jnp.maximum(denominators["loss"], 1.0)
        weights = batch["loss_weights"] / denominator
        total, nll, lse = blocked_cross_entropy(
            head,
            self.model.head_parameters(params),
            x_BTD,
            batch["targets"],
            weights,
            self.z_loss * weights,
            self.chunk,
        )
        return total, self._sums(batch, nll, lse)

    def _sums(self, batch: Batch, nll: jax.Array, lse: jax.Array) -> dict[str, jax.Array]:
        weights = batch["loss_weights"]
        weigh = lambda value: jnp.where(weights != 0, weights * value, 0.0)
        member = jax.nn.one_hot(batch["source_ids"], self.num_sources, axis=0)  # [num_sources, B, T]
        by_source = lambda value: (member * value).sum((1, 2))
        return {"nll": by_source(weigh(nll)), "tokens": by_source(weights), "z": weigh(lse * lse).sum()}
