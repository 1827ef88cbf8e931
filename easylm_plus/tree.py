"""Names of the places in a tree."""

from typing import Any


def path_name(path: Any) -> str:
    """A tree path as "layers/self_attn/q_proj/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
