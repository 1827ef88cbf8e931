"""What a checkpoint says of itself: its arrays, which of them make up a typed leaf, and the run that wrote them.

Orbax takes a leaf's type and static fields from the restore target and casts dtypes without a word; so all of it is
written down, and compared before a byte is read.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.numerics.leaves import KEPT
from easylm_plus.numerics.windows import Window
from easylm_plus.tree import path_name

LEAVES: dict[str, type] = {**KEPT, "Window": Window}  # those that a state may hold

# Keys that may change between a checkpoint and its resumption: where things are and what is shown, never what is
# computed. Everything else must be the same, or the resumed run would be neither of the two.
FREE = (
    r"(log|checkpoint|eval|mesh|init_from)\.",
    r"optimizer\.zero$",
    r"train\.(profile|max_skipped)$",
    r"data\.(path|prepare|prepare_input|workers|tokenizer)$",
)


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """path -> {shape, dtype} of every array (or abstract array) of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): {"shape": list(x.shape), "dtype": str(x.dtype)} for path, x in leaves}


def leaf_types(tree: Any) -> dict[str, dict[str, Any]]:
    """path -> {type, static fields} of every typed leaf of a tree; its arrays are those whose names start so."""
    is_typed = lambda x: type(x) in LEAVES.values()
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_typed):
        if not is_typed(leaf):
            continue
        name, values = path_name(path), {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
        static = {f.name for f in dataclasses.fields(leaf) if not f.metadata.get("pytree_node", True)}
        found[name] = {"type": type(leaf).__name__, **{key: values[key] for key in sorted(static)}}
        within = leaf_types({key: value for key, value in values.items() if key not in static})
        found |= {f"{name}/{key}": info for key, info in within.items()}
    return found


def compare_arrays(found: Mapping[str, Any], expected: Mapping[str, Any], place: str) -> None:
    """Raises UserError naming the first few arrays that differ in presence, shape or dtype."""
    show = lambda info: "nothing" if info is None else f"{info['dtype']}{info['shape']}"
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    if names:
        lines = [f"  {n}: found {show(found.get(n))}, expected {show(expected.get(n))}" for n in names[:5]]
        more = f"\n  ... and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(f"{place} does not hold this model:\n" + "\n".join(lines) + more)


def compare_leaves(found: Mapping[str, Any], expected: Mapping[str, Any], place: str) -> None:
    """Raises UserError naming the first typed leaf that differs: the same arrays can mean something else."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            show = lambda info: "plain arrays" if info is None else str(info)
            raise UserError(f"{place}: {name}: found {show(found.get(name))}, expected {show(expected.get(name))}")


def compare_runs(
    found: Mapping[str, Any], config: Mapping[str, Any], defaults: Mapping[str, Any], data_hash: str, place: str
) -> None:
    """Raises UserError if the checkpoint's config or data differ from this run's in anything that is computed.

    What an older version had no key for, it did as the default of that key does.
    """
    old, new = {**flatten(defaults), **flatten(found["config"])}, flatten(config)
    same = lambda key: (old.get(key) or None) == (new.get(key) or None)
    changed = [key for key in sorted({*old, *new}) if not same(key) and not any(re.match(f, key) for f in FREE)]
    lines = [f"  {key}: found {old.get(key)!r}, now {new.get(key)!r}" for key in changed]
    if found["data_hash"] != data_hash:
        lines.append(f"  the data: found hash {found['data_hash'][:12]}, now {data_hash[:12]}")
    if lines:
        advice = "--config.checkpoint.force=True resumes nevertheless; another log.dir starts afresh"
        raise UserError(f"{place} was written by another run:\n" + "\n".join(lines) + f"\n{advice}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> {"section.key": value}, with tuples as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def declared(arrays: Mapping[str, Mapping[str, Any]], place: str, shardings: Any = None) -> dict[str, Any]:
    """Those arrays of `describe` that are `place`, or in it, as nested dicts of ShapeDtypeStruct."""
    tree: dict[str, Any] = {}
    for name, info in arrays.items():
        if f"{name}/".startswith(f"{place}/"):
            node = tree
            *parents, last = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jax.ShapeDtypeStruct(tuple(info["shape"]), np.dtype(info["dtype"]), sharding=shardings)
    return tree


def put_together(node: Any, leaves: Mapping[str, Mapping[str, Any]], path: str = "") -> Any:
    """A state as nested dicts of arrays -> the same with the typed leaves that `leaf_types` has listed."""
    if path in leaves:
        own = dict(leaves[path])
        if (kind := own.pop("type")) not in LEAVES:
            raise UserError(f"{path}: found a leaf of type {kind!r}, expected one of {', '.join(LEAVES)}")
        parts = {key: put_together(child, leaves, f"{path}/{key}") for key, child in node.items()}
        return LEAVES[kind](**parts, **own)
    if not isinstance(node, dict):
        return node
    return {key: put_together(child, leaves, f"{path}/{key}" if path else key) for key, child in node.items()}
