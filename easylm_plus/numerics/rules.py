"""Which weights are transformed, and into what: rules like "layers/.*/mlp=ternary".

A rule is "regular expression=transform". It is searched in the names of the weights as the tree has them,
"layers/mlp/up_proj/kernel" (stacked) or "layers/0/mlp/...", and with a star for the layer, "layers/*/mlp/...", so that
one rule serves both; the first rule that matches decides. Only matrices behind `project` are transformed: the kernels
of the blocks but the routers', never embeddings, the head, norms and biases.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from easylm_plus.errors import UserError
from easylm_plus.numerics.ternary import Ternary
from easylm_plus.tree import path_name

TRANSFORMS: dict[str, Callable[[jax.Array], Any]] = {"plain": lambda w: w, "ternary": Ternary}
MATRIX = r"^layers/(?!.*/router/).*/kernel$"
BITNET = (r"layers/\*/(self_attn|mlp)/.*_proj=ternary",)  # all linear layers of the blocks, as in the paper


def attach(params: Any, rules: Sequence[str]) -> Any:
    """The tree with the weights that rules name turned into typed leaves; gradients pass through to the arrays.

    Raises UserError for a transform that is not known and for a rule that no weight matches.
    """
    parsed = [_parse(rule) for rule in rules]
    used: set[int] = set()

    def transformed(path: Any, leaf: jax.Array) -> Any:
        name = path_name(path)
        starred = re.sub(r"^layers/(\d+/)?", "layers/*/", name)
        for number, (pattern, transform) in enumerate(parsed):
            if re.search(MATRIX, name) and (pattern.search(name) or pattern.search(starred)):
                used.add(number)
                return transform(leaf)
        return leaf

    out = jax.tree.map_with_path(transformed, params)
    if idle := [rule for number, rule in enumerate(rules) if number not in used]:
        raise UserError(f"numerics.rules: found {idle[0]!r}, which matches no weight that can be transformed")
    return out


def _parse(rule: str) -> tuple[re.Pattern[str], Callable[[jax.Array], Any]]:
    pattern, separator, name = rule.rpartition("=")
    if not separator or name not in TRANSFORMS:
        known = ", ".join(TRANSFORMS)
        raise UserError(f"numerics.rules: found {rule!r}, expected 'regular expression=transform' with one of {known}")
    try:
        return re.compile(pattern), TRANSFORMS[name]
    except re.error as error:
        raise UserError(f"numerics.rules: found {rule!r}, not a regular expression ({error})") from None
