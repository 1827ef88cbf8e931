"""Which weights are transformed, and into what: rules like "layers/.*/mlp=ternary".

A rule is "regular expression=transform". It is searched in the names of the weights as the tree has them,
"layers/mlp/up_proj/kernel" (stacked) or "layers/0/mlp/...", and with a star for the layer, "layers/*/mlp/...", so that
one rule serves both; the first rule that matches decides. Only matrices behind `project` are transformed: the kernels
of the blocks but the routers', never embeddings, the head, norms and biases.

CODED are what a weight becomes that does not learn: the base of adapters, or one of a model that is only used.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from easylm_plus.errors import UserError
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.nf4 import nf4
from easylm_plus.numerics.ternary import Ternary
from easylm_plus.tree import path_name

CODED: Mapping[str, Callable[[Any], Coded]] = {"nf4": nf4, "nf4_double": partial(nf4, double=True)}
TRANSFORMS = ("plain", "ternary", "fp8", "narrow", *CODED)  # narrow: kept as an FP8 level says
MATRIX = r"^layers/(?!.*/router/).*/kernel$"
BITNET = (r"layers/\*/(self_attn|mlp)/.*_proj=ternary",)  # all linear layers of the blocks, as in the paper


def assign(params: Any, rules: Sequence[str], default: str = "plain") -> dict[str, str]:
    """{name: transform} of all weights; `default` is that of matrices that no rule names.

    Raises UserError for a transform that is not known, for a rule that no weight matches, and for FP8 by name where
    FP8 cannot be.
    """
    parsed = [_parse(rule) for rule in rules]
    used: set[int] = set()
    assigned = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_kept):
        name = path_name(path)
        if not re.search(MATRIX, name):
            assigned[name] = "plain"
            continue
        assigned[name] = "narrow" if default == "fp8" and not_fp8(name, leaf.shape) else default
        for number, (pattern, transform) in enumerate(parsed):
            if _matches(pattern, name):
                used.add(number)
                assigned[name] = transform
                if transform == "fp8" and (reason := not_fp8(name, leaf.shape)):
                    raise UserError(f"numerics.rules: found {rules[number]!r}, which matches {name}: {reason}")
                break
    if idle := [rule for number, rule in enumerate(rules) if number not in used]:
        raise UserError(f"numerics.rules: found {idle[0]!r}, which matches no weight that can be transformed")
    return assigned


def not_fp8(name: str, shape: tuple[int, ...]) -> str:
    """Why a weight does not multiply in FP8; "" if it can."""
    if re.search(r"^(embed_tokens|embed_positions|lm_head)/", name):
        return "embedding or head"
    if "/router/" in name:
        return "router"
    if not re.search(MATRIX, name):
        return "norm, bias or filter"
    if shape[-1] % 16 or shape[-2] % 16:
        return "sides that are no multiples of 16"
    if "/experts/" in name:
        return "experts, whose products are grouped"
    return ""


def adapter_ranks(params: Any, rules: Sequence[str]) -> dict[str, int]:
    """{name: rank} of the matrices that rules like "self_attn/(q|v)_proj=8" give a low-rank adapter.

    Raises UserError for a rank that is no positive number, and for a rule that no matrix matches.
    """
    ranks: dict[str, int] = {}
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for rule in rules:
        pattern, _, rank = rule.rpartition("=")
        if not rank.isdecimal() or int(rank) < 1:
            raise UserError(f"numerics.lora: found {rule!r}, expected 'regular expression=rank'")
        matched = [name for name in names if re.search(MATRIX, name) and _matches(_compiled(rule, pattern), name)]
        if not matched:
            raise UserError(f"numerics.lora: found {rule!r}, which matches no matrix of the blocks")
        if experts := [name for name in matched if "/experts/" in name]:
            raise UserError(f"numerics.lora: found {rule!r}, which matches {experts[0]}: experts take no adapters")
        ranks = {**dict.fromkeys(matched, int(rank)), **ranks}
    return ranks


def attach(params: Any, rules: Sequence[str]) -> Any:
    """The tree with the weights that rules name turned into typed leaves; gradients pass through to the arrays.

    For models that are used as they are; those that learn go through levels.py. Weights that multiply in FP8 while they
    learn are used as they are kept, and so are those that are in codes already.
    """
    assigned = assign(params, rules)

    def turned(path: Any, leaf: Any) -> Any:
        transform = assigned[path_name(path)]
        if isinstance(leaf, LowRank):
            return dataclasses.replace(leaf, base=turned(path, leaf.base))
        if isinstance(leaf, Coded):
            return leaf
        if transform in CODED and not is_kept(leaf):
            return CODED[transform](leaf)
        return Ternary(leaf) if transform == "ternary" else leaf

    return jax.tree.map_with_path(turned, params, is_leaf=is_kept)


def for_use(rules: Sequence[str]) -> list[str]:
    """A run's rules for its weights as they are used: what is in codes says so itself, and what is not, as an average
    of the weights, is not rounded to codes for that."""
    parts = (rule.rpartition("=") for rule in rules)
    return [f"{pattern}=plain" if name in CODED else f"{pattern}={name}" for pattern, _, name in parts]


def _parse(rule: str) -> tuple[re.Pattern[str], str]:
    pattern, separator, name = rule.rpartition("=")
    if not separator or name not in TRANSFORMS:
        known = ", ".join(TRANSFORMS)
        raise UserError(f"numerics.rules: found {rule!r}, expected 'regular expression=transform' with one of {known}")
    return _compiled(rule, pattern), name


def _compiled(rule: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"numerics.rules: found {rule!r}, not a regular expression ({error})") from None


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    """Whether a rule means this weight, by its name or by that with a star for the layer."""
    return bool(pattern.search(name) or pattern.search(re.sub(r"^layers/(\d+/)?", "layers/*/", name)))
