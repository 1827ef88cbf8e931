"""Prediction of target tokens: pre-training and chat fine-tuning alike; the batch's loss weights say what is learned.

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
    """Weighted mean of the negative log-likelihood of the target tokens, plus optional regularisers.

    Args:
      num_sources: how many data sources the batch's source_ids count, for the loss per source.
      z_loss: coefficient of logsumexp^2 (PaLM used 1e-4); keeps the logits from drifting.
      chunk: tokens a device whose logits exist at a time.
      router_balance, router_z: coefficients of `routing_losses`, for models with experts.
    """

    model: Transformer
    num_sources: int
    z_loss: float = 0.0
    chunk: int = 1024
    router_balance: float = 0.0
    router_z: float = 0.0

    def denominators(self, batch: Batch) -> dict[str, jax.Array]:
        """What the losses are divided by: of a whole batch, over all micro-batches and devices."""
        return {"loss": batch["loss_weights"].sum(), "tokens": (batch["segment_ids"] != 0).sum()}

    def __call__(
        self, params: Any, batch: Batch, denominators: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """This micro-batch's share of the loss (shares add up), and sums for the log.

        The sums: nll and tokens by source, float32[num_sources]; z is the sum of logsumexp^2; with experts also
        "router", what `routing_losses` gives times the tokens it is of.
        """
        inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
        hidden: Any = self.model.apply({"params": params}, *inputs, method="hidden", mutable=["router"])
        head: Any = lambda p, x: self.model.apply({"params": p}, x, method="head")
        weights = batch["loss_weights"] / jnp.maximum(denominators["loss"], 1.0)
        total, nll, lse = blocked_cross_entropy(
            head,
            self.model.head_parameters(params),
            hidden[0],
            batch["targets"],
            weights,
            self.z_loss * weights,
            self.chunk,
        )
        sums = self._sums(batch, nll, lse)
        if self.model.config.num_experts:
            routing = routing_losses(stacked_statistics(hidden[1]["router"]["layers"]))
            tokens = (batch["segment_ids"] != 0).sum()
            share = tokens / jnp.maximum(denominators["tokens"], 1)
            total += share * (self.router_balance * routing["balance"] + self.router_z * routing["z"])
            sums["router"] = {"tokens": tokens, **{name: tokens * value for name, value in routing.items()}}
        return total, sums

    def _sums(self, batch: Batch, nll: jax.Array, lse: jax.Array) -> dict[str, Any]:
        weights = batch["loss_weights"]
        weigh = lambda value: jnp.where(weights != 0, weights * value, 0.0)
        member = jax.nn.one_hot(batch["source_ids"], self.num_sources, axis=0)  # [num_sources, B, T]
        by_source = lambda value: (member * value).sum((1, 2))
        return {"nll": by_source(weigh(nll)), "tokens": by_source(weights), "z": weigh(lse * lse).sum()}


def stacked_statistics(layers: Any) -> dict[str, jax.Array]:
    """What the layers have sown (models/moe.py), [L, ...], scanned or not."""
    if "mlp" in layers:
        return layers["mlp"]["stats"]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(layer["mlp"]["stats"] for layer in layers.values()))


def routing_losses(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means over the layers.

    balance   E sum_e f_e p_e, with f_e expert e's share of the choices and p_e its mean probability: 1 where all are
              alike (Switch, arXiv:2101.03961, eq. 4). Of a micro-batch by itself, as everybody has it: with
              accumulation it is not quite the loss of the whole batch. Hugging Face's is K times it, over all layers
              at once
    z         mean logsumexp^2 of the router's logits (ST-MoE, arXiv:2202.08906, eq. 5)
    dropped   share of the choices that found no room; not differentiated
    max_load  the choices of the busiest expert over those of an average one; not differentiated
    """
    tokens_L = jnp.maximum(stats["tokens"], 1)
    choices_L = jnp.maximum(stats["choices"].sum(-1), 1)
    f_LE = stats["choices"] / choices_L[:, None]
    E = f_LE.shape[-1]
    return {
        "balance": (E * f_LE * stats["probabilities"] / tokens_L[:, None]).sum(-1).mean(),
        "z": (stats["z"] / tokens_L).mean(),
        "dropped": (stats["dropped"] / choices_L).mean(),
        "max_load": (E * f_LE.max(-1)).mean(),
    }
