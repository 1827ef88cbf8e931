"""From weights that were trained to weights that are used.

    trained  ->  `deployed`  ->  `filed`  ->  a checkpoint  ->  `served`  ->  what inference multiplies by

Ternary matrices get the codes and scales that training rounded to, bit by bit; embeddings and heads are rounded to
8 bits a row (int8_rows.py), since after packing they are most of a small model; all else stays as it is.
"""

import dataclasses
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.numerics import trits
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.int8_rows import int8_rows
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.packed_ternary import PackedTernary, packed
from easylm_plus.numerics.rules import assign
from easylm_plus.numerics.ternary import Ternary
from easylm_plus.numerics.trits import Trits
from easylm_plus.tree import path_name

EMBEDS = ("int8", "keep")
TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"


def deployed(params: Any, rules: Sequence[str], embed: str = "int8") -> Any:
    """A run's parameters as they are served.

    Args:
      params: arrays, or leaves that a checkpoint holds; of a run, so that what is ternary is its latent weights.
      rules: the run's numerics.rules, which say what is ternary.
      embed: int8 | keep, of the tokens' embedding and the head.

    Raises UserError for a rule that matches nothing, as one that names an embedding, the head or a norm; for a matrix
    that trained in FP8; and for one that is in codes of another kind already.
    """
    if embed not in EMBEDS:
        raise UserError(f"embed = {embed!r}: expected one of {', '.join(EMBEDS)}")
    assigned = assign(params, rules)

    def leaf(path: Any, kept: Any) -> Any:
        name = path_name(path)
        if assigned[name] in ("fp8", "narrow"):
            raise UserError(f"numerics.rules: {name} is {assigned[name]}; expected ternary or plain of what is packed")
        if assigned[name] == "ternary":
            return _ternary(name, kept)
        if embed == "int8" and name in (TABLE, HEAD) and not isinstance(kept, Coded):
            return int8_rows(decode(kept), transposed=name == HEAD)
        return kept

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_kept)


def frozen(view: Any) -> Any:
    """A model that multiplies as it trained (rules.attach), its ternary matrices rounded once instead of every time."""

    def once(leaf: Any) -> Any:
        if isinstance(leaf, LowRank):
            return dataclasses.replace(leaf, base=once(leaf.base))
        return packed(jnp.asarray(decode(leaf.latent))) if isinstance(leaf, Ternary) else leaf

    return jax.tree.map(once, view, is_leaf=lambda leaf: isinstance(leaf, Ternary) or is_kept(leaf))


def thawed(leaf: PackedTernary | Trits) -> Any:
    """Latents of training [..., in, out] that round to these codes and scales, on the host: codes times gamma would
    round to smaller scales, since zeros count in mean |W|."""
    values = np.asarray(decode(leaf))
    share = (values != 0).mean((-2, -1), keepdims=True, dtype=np.float32)
    return values / np.where(share, share, 1)


def _ternary(name: str, kept: Any) -> Any:
    if isinstance(kept, LowRank):
        raise UserError(f"{name}: found an adapter of a ternary weight; the two cannot be merged")
    if isinstance(kept, PackedTernary | Trits):
        return kept
    if isinstance(kept, Coded):
        raise UserError(f"{name}: found {type(kept).__name__}, expected trained weights to make ternary ones of")
    return packed(jnp.asarray(decode(kept)))


@singledispatch
def filed(leaf: Any) -> Any:
    """What a file keeps of a leaf: as it is, or in fewer bytes."""
    return leaf


@singledispatch
def served(leaf: Any) -> Any:
    """What is multiplied by, of a leaf that a file holds."""
    return leaf


filed.register(PackedTernary)(trits.filed)
served.register(Trits)(trits.served)


def all_filed(params: Any) -> Any:
    """`filed` of each leaf of a tree."""
    return jax.tree.map(filed, params, is_leaf=is_kept)


def all_served(params: Any) -> Any:
    """`served` of each leaf of a tree."""
    return jax.tree.map(served, params, is_leaf=is_kept)


def is_packed(params: Any) -> bool:
    """Whether there are weights that kernels multiply by."""
    base = lambda leaf: leaf.base if isinstance(leaf, LowRank) else leaf
    return any(isinstance(base(leaf), PackedTernary) for leaf in jax.tree.leaves(params, is_leaf=is_kept))
