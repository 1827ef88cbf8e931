"""Where a run's first state comes from: its own last checkpoint, another model's weights, or a random start."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from rich.table import Table

from easylm_plus.errors import UserError
from easylm_plus.interop.huggingface import load_parameters, read_config
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.models.transformer import Transformer, stack_layers, unstack_layers
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.deploy import thawed
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.packed_ternary import PackedTernary
from easylm_plus.numerics.trits import Trits
from easylm_plus.training.checkpoint import locate, read_parameters
from easylm_plus.tree import path_name


@dataclasses.dataclass(frozen=True)
class Taken:
    """What became of one weight in a warm start."""

    name: str
    shape: tuple[int, ...]
    outcome: str  # "taken", or why it was not


def warm_start(
    params: Any,
    path: str | Path,
    model: Transformer,
    rename: Sequence[str],
    fresh: Callable[[], Any] | None = None,
    codings: Mapping[str, Callable[[Any], Coded]] = MappingProxyType({}),
    ternary: Collection[str] = (),
) -> tuple[Any, list[Taken]]:
    """Replaces the weights of `params` that `path` has under the same name and shape.

    One weight after the other goes from the host to where `params` has it, so no device ever holds more than its part
    of them, and every process of a job puts its own parts in place.

    Args:
      params: arrays, or where there is `fresh` only their shapes, dtypes and shardings.
      path: a run's folder, a Hugging Face folder or a llama2.c file.
      rename: "regex=replacement", applied in order to the names found there.
      fresh: makes the tree, of which weights are taken that are not found.
      codings: of weights that are kept in codes (numerics/rules.py's CODED), by name: they are rounded matrix by
        matrix, and only their codes are put in place. Those that are in the same codes already stay as they are.
      ternary: names of weights that multiply as their ternary rounding; found packed, they get latents that round to
        what was found.

    Returns:
      (parameters, sharded and typed like `params`; what became of each weight on either side).
    """
    own = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    new: dict[str, Any] = {}
    outcomes: dict[str, Taken] = {}

    def place(name: str, found: Any) -> None:
        name = _renamed(name, rename)
        if name not in own:
            outcomes[name] = Taken(name, found.shape, "not in this model: left out")
        elif found.shape != own[name].shape:
            outcomes[name] = Taken(name, own[name].shape, f"has shape {list(found.shape)}: starts random")
        else:
            if name in codings:
                new[name] = _put_codes(found, own[name], codings[name])
            else:
                packed = isinstance(found, PackedTernary | Trits)
                new[name] = _put(found, own[name], thawed if packed and name in ternary else decode)
            outcomes[name] = Taken(name, found.shape, "taken")

    read_weights(path, model, place)
    if not new:
        raise UserError(f"init_from.path = {path}: none of its weights fits this model; init_from.rename can help")
    outcomes |= {name: Taken(name, own[name].shape, "not there: starts random") for name in own if name not in outcomes}
    if fresh is not None and (rest := {name: own[name].sharding for name in own if name not in new}):
        new |= jax.jit(lambda: _named(fresh(), rest), out_shardings=rest)()
    return jax.tree_util.tree_map_with_path(lambda p, x: new.get(path_name(p), x), params), [*outcomes.values()]


def _named(params: Any, names: Collection[str]) -> dict[str, Any]:
    """Some of a tree's leaves, by name."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {name: leaf for name, leaf in leaves.items() if name in names}


def read_weights(path: str | Path, model: Transformer, place: Callable[[str, Any], None]) -> None:
    """Hands the weights of a checkpoint of any kind we read to `place`, stacked or not as `model` has them.

    They are arrays of the host, or leaves of such arrays, to be decoded.
    """
    path = Path(path)
    scan = model.config.scan_layers
    if path.is_dir() and (path / "config.json").is_file():
        load_parameters(path, Transformer(read_config(path, scan_layers=scan), model.precision), place)
        return
    params = jax.device_get(load_llama2c(path)[1] if path.is_file() else read_parameters(*locate(path)))
    if ("0" not in params["layers"]) != scan:
        params = stack_layers(params) if scan else unstack_layers(params)
    for name, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_kept):
        place(path_name(name), leaf)


def _put(found: Any, like: jax.Array, values: Callable[[Any], Any]) -> jax.Array:
    """A weight of the host on the devices, typed and sharded as another; `values` of a leaf, matrix by matrix."""

    def part(index: Any) -> np.ndarray:
        if not is_kept(found):
            return np.asarray(found[index], like.dtype)
        stack, sides = index[:-2], index[-2:]
        own = found[stack]
        out = np.empty(like.sharding.shard_shape(like.shape), like.dtype)
        for matrix in np.ndindex(own.shape[:-2]):
            out[matrix] = values(own[matrix])[sides]
        return out

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _put_codes(found: Any, like: Any, coding: Callable[[Any], Coded]) -> Any:
    """A weight of the host in codes, where a plain one would be as `like` is."""
    expected = jax.eval_shape(coding, like)
    if jax.tree.map(_kind, found) != jax.tree.map(_kind, expected):
        encode = jax.jit(coding)
        each = [
            jax.device_get(encode(np.asarray(decode(found[index]), like.dtype)))
            for index in np.ndindex(like.shape[:-2])
        ]
        found = jax.tree.map(lambda whole, *parts: np.stack(parts).reshape(whole.shape), expected, *each)
    put = lambda x, place: jax.make_array_from_callback(x.shape, place, lambda index: x[index])
    return jax.tree.map(put, found, expected.placed(like.sharding))


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def table(taken: Sequence[Taken]) -> Table:
    """The warm start for the terminal: what was not taken by name, the rest as a count."""
    show = Table("weight", "shape", "outcome", title="init_from")
    for item in taken:
        if item.outcome != "taken":
            show.add_row(item.name, str(list(item.shape)), item.outcome)
    good = [item for item in taken if item.outcome == "taken"]
    show.add_row(f"{len(good)} weights", f"{sum(math.prod(i.shape) for i in good):,}", "taken")
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
