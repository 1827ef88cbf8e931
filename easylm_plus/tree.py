"""Nested dicts, and the names of the places in them: "layers/self_attn/q_proj/kernel"."""

from functools import reduce
from typing import Any


def path_name(path: Any) -> str:
    """The name of a tree path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def at(tree: Any, name: str) -> Any:
    """What is under a name."""
    return reduce(lambda node, key: node[key], name.split("/"), tree)


def put(tree: dict[str, Any], name: str, leaf: Any) -> None:
    """Puts a leaf under a name, with whatever dicts are missing on the way."""
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def replaced(tree: dict[str, Any], name: str, leaf: Any) -> dict[str, Any]:
    """The tree with another leaf under a name; the one it is made of stays as it is."""
    key, _, rest = name.partition("/")
    return {**tree, key: replaced(tree[key], rest, leaf) if rest else leaf}
