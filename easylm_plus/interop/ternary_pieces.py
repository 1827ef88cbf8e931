"""The ternary matrices among a model's weights, as what they multiply by: codes and one scale a matrix.

A weight is ternary because a rule says so, and then it is kept as the latent of training, whose codes are computed
here as training computes them; or it is kept packed, and then its codes and its scale are those that are there.
Rounding packed weights once more would give another scale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.interop.weights import Index, Weights, indices, put, stored, stored_shapes
from easylm_plus.numerics.packed_ternary import PackedTernary, unpack
from easylm_plus.numerics.rules import assign
from easylm_plus.numerics.ternary import ternary_codes


class TernaryPiece(NamedTuple):
    """A matrix W = codes * gamma."""

    codes: np.ndarray  # int8[in, out], -1, 0 and 1
    gamma: np.float32


class TernaryPieces:
    """Which pieces of some weights are ternary, and their codes.

    Args:
      weights: whatever hands out pieces; packed ones are known where it tells the `kind` of a piece.
      rules: those of the run that made them (numerics.rules).

    Raises UserError as `assign` does, as for a rule that matches nothing.
    """

    def __init__(self, weights: Weights, rules: Sequence[str] = ()):
        self._weights, self._scan = weights, weights.config.scan_layers
        tree: dict[str, Any] = {}
        for key, shape in stored_shapes(weights.config, self._scan).items():
            put(tree, key, jax.ShapeDtypeStruct(shape, jnp.float32))
        self._assigned = assign(tree, rules)

    def __contains__(self, piece: tuple[str, Index]) -> bool:
        name, index = piece
        return self._packed(name, index) or self._assigned[stored(name, index, self._scan)[0]] == "ternary"

    def __bool__(self) -> bool:
        """Whether any piece is."""
        names = (name for group in self._weights.groups for name in group)
        return any((name, index) in self for name in names for index in indices(name, self._weights.config))

    def read(self, name: str, index: Index) -> TernaryPiece:
        """A piece that is ternary."""
        if self._packed(name, index):
            leaf = self._weights.kept((name,), index)[0]  # type: ignore[attr-defined]
            return TernaryPiece(unpack(np.asarray(leaf.codes), leaf.inputs).T, np.float32(leaf.scale))
        codes, inverse = ternary_codes(jnp.asarray(self._weights.read((name,), index)[0]))
        return TernaryPiece(np.asarray(codes, np.int8), np.float32(1 / inverse))

    def _packed(self, name: str, index: Index) -> bool:
        kind = getattr(self._weights, "kind", None)
        return kind is not None and kind(name, index) is PackedTernary
