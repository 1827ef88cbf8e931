"""Where a run's first state comes from: its own last checkpoint, another model's weights, or a random start."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from easylm_plus.errors import UserError
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.models.transformer import Transformer, stack_layers, unstack_layers
from easylm_plus.training.checkpoint import locate, read_parameters
from easylm_plus.tree import path_name


@dataclasses.dataclass(frozen=True)
class Taken:
    """What became of one weight in a warm start."""

    name: str
    shape: tuple[int, ...]
    outcome: str  # "taken", or why it was not


def warm_start(params: Any, path: str | Path, model: Transformer, rename: Sequence[str]) -> tuple[Any, list[Taken]]:
    """Replaces the weights of `params` that `path` has under the same name and shape.

    Args:
      path: a run's folder, a Hugging Face folder or a llama2.c file.
      rename: "regex=replacement", applied in order to the names found there.

    Returns:
      (parameters, sharded and typed like `params`; what became of each weight on either side).
    """
    found = read_weights(path, model)
    known = {_renamed(path_name(p), rename): x for p, x in jax.tree_util.tree_leaves_with_path(found)}
    taken: list[Taken] = []

    def pick(path: Any, own: jax.Array) -> jax.Array:
        name = path_name(path)
        other = known.pop(name, None)
        if other is None:
            taken.append(Taken(name, own.shape, "not there: starts random"))
        elif other.shape != own.shape:
            taken.append(Taken(name, own.shape, f"has shape {list(other.shape)}: starts random"))
        else:
            taken.append(Taken(name, own.shape, "taken"))
            return jax.device_put(jnp.asarray(other, own.dtype), own.sharding)
        return own

    params = jax.tree_util.tree_map_with_path(pick, params)
    taken += [Taken(name, x.shape, "not in this model: left out") for name, x in known.items()]
    if not any(t.outcome == "taken" for t in taken):
        raise UserError(f"init_from.path = {path}: none of its weights fits this model; init_from.rename can help")
    return params, taken


def read_weights(path: str | Path, model: Transformer) -> Any:
    """The weights of a checkpoint of any kind we read, stacked or not as `model` has them."""
    path = Path(path)
    scan = model.config.scan_layers
    if path.is_file():
        params = load_llama2c(path)[1]
    elif (path / "config.json").is_file():
        return load_hf(path, model.precision.param, scan_layers=scan)[1]
    else:
        params = read_parameters(*locate(path), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    stacked = "0" not in params["layers"]
    if stacked == scan:
        return params
    return stack_layers(params) if scan else unstack_layers(params)


def table(taken: Sequence[Taken]) -> Table:
    """The warm start for the terminal: what was not taken by name, the rest as a count."""
    show = Table("weight", "shape", "outcome", title="init_from")
    for item in taken:
        if item.outcome != "taken":
            show.add_row(item.name, str(list(item.shape)), item.outcome)
    good = [item for item in taken if item.outcome == "taken"]
    show.add_row(f"{len(good)} weights", f"{sum(jnp.prod(jnp.array(i.shape)).item() for i in good):,}", "taken")
    return show


def _renamed(name: str, rules: Sequence[str]) -> str:
    for rule in rules:
        pattern, separator, replacement = rule.partition("=")
        if not separator:
            raise UserError(f"init_from.rename: found {rule!r}, expected 'regex=replacement'")
        try:
            name = re.sub(pattern, replacement, name)
        except (re.error, IndexError) as error:
            raise UserError(f"init_from.rename: found {rule!r}, not a regular expression ({error})") from None
    return name
