"""Whole tensors dealt out to ranks: FP8-LM's ZeRO (arXiv:2310.18313, Algorithm 1).

A matrix that is scaled as a whole is easiest kept whole: its owner alone has its master weights and moments, and needs
no collective for its scale. Matrices are dealt out greedily, the largest first, each to the rank with the least so far.
(Cutting every matrix, all parts sharing one scale, is the default elsewhere in this code base: see `sharding.py`.)

All ranks run one program on arrays of one shape, so matrices of one size lie in a stack [N, C, D, F]: those that rank
n owns are in row n, which the axis of the ranks cuts, and where it owns fewer than C the rest is padding. For 32 ranks
that is none at LLaMA 7B, 18 % at 13B, and more for models of few matrices.

A tree of parameters by name, less what is dealt out, plus the stacks under DEALT, is called laid.

Legend: N ranks, C slots of a stack, D and F the sides of a matrix, `...` stack axes of a weight (layers, experts).
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.tree import path_name

DEALT = "dealt"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rank owns each tensor, and how many elements each rank has then."""

    owner: tuple[int, ...]
    load: tuple[int, ...]


def plan(sizes: Sequence[int], ranks: int, before: Sequence[int] | None = None) -> Plan:
    """Algorithm 1 for tensors of these numbers of elements; `before`: what each rank owns already, from other groups.

    Equal tensors are dealt in the released code's order: i = 0, N, 2N, ..., 1, N + 1, ... (not that of the paper,
    which does not say).
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i % ranks))
    total = list(before) if before is not None else [0] * ranks
    load, owner = [0] * ranks, [0] * len(sizes)
    for i in order:
        owner[i] = rank = total.index(min(total))
        total[rank] += sizes[i]
        load[rank] += sizes[i]
    return Plan(tuple(owner), tuple(load))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Matrices of one size and kind.

    sides: of the stack's matrices; others of the same size are reshaped
    weights: those that they belong to, by name, one after the other
    matrix: int[N, C], which matrix of all of these weights' is in a slot; their number where it is padding
    """

    sides: tuple[int, int]
    weights: tuple[str, ...]
    matrix: np.ndarray


class Deal:
    """Who owns what, and the ways between parameters by name and laid ones.

    Args:
      shapes: of all parameters, a tree of ShapeDtypeStruct.
      kinds: {name: kind} of the weights [..., D, F] to be dealt out; a stack has matrices of one kind.
      ranks: N.
    """

    def __init__(self, shapes: Any, kinds: Mapping[str, str], ranks: int):
        self._treedef: Any
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(shapes)
        self._names = [path_name(path) for path, _ in leaves]
        self.number = {name: number for number, name in enumerate(self._names)}  # of every parameter
        self.shapes = {name: leaf.shape for name, (_, leaf) in zip(self._names, leaves) if name in kinds}
        stacks = {name: shape[:-2] for name, shape in self.shapes.items()}
        matrices = [(name, *shape[-2:]) for name, shape in self.shapes.items() for _ in np.ndindex(shape[:-2])]
        dealt = plan([D * F for _, D, F in matrices], ranks)
        self.imbalance = max(dealt.load) * ranks / sum(dealt.load)

        owned: dict[str, list[list[int]]] = defaultdict(lambda: [[] for _ in range(ranks)])
        weights: dict[str, list[str]] = defaultdict(list)
        count: dict[str, int] = defaultdict(int)
        for (name, D, F), rank in zip(matrices, dealt.owner, strict=True):
            key = f"{kinds[name]}_{D * F}"
            owned[key][rank].append(count[key])
            count[key] += 1
            weights[key] += [name] * (name not in weights[key])
        self.stacks: dict[str, Stack] = {}
        self._slot: dict[str, np.ndarray] = {}  # of each weight's matrices, int[...]: n C + c
        for key, ranks_own in owned.items():
            slots = max(map(len, ranks_own))
            matrix = np.array([own + [count[key]] * (slots - len(own)) for own in ranks_own])
            sides = self.shapes[weights[key][0]][-2:]
            self.stacks[key] = Stack(sides, tuple(weights[key]), matrix)
            slot_of = np.argsort(matrix.ravel(), kind="stable")[: count[key]]
            ends = np.cumsum([math.prod(stacks[name]) for name in weights[key]])
            for name, slots_of_weight in zip(weights[key], np.split(slot_of, ends[:-1])):
                self._slot[name] = slots_of_weight.reshape(stacks[name])

    def pack(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """{name: array [..., D, F], or a leaf of such and of factors [...]} of all that is dealt out -> {stack: the
        same of [N, C, ...]}. Padding is 0, a factor of 1."""

        def stacked(stack: Stack, *weights: jax.Array) -> jax.Array:
            is_factor = weights[0].ndim == self._slot[stack.weights[0]].ndim
            sides = () if is_factor else stack.sides
            flat = [x.reshape(-1, *sides) for x in weights]
            padding = jnp.full((1, *sides), int(is_factor), flat[0].dtype)
            return jnp.concatenate([*flat, padding])[stack.matrix]

        return {
            key: jax.tree.map(lambda *xs, stack=stack: stacked(stack, *xs), *(named[name] for name in stack.weights))
            for key, stack in self.stacks.items()
        }

    def unpack(self, stacks: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `pack`."""

        def taken(name: str, x: jax.Array) -> jax.Array:
            own = x.reshape(-1, *x.shape[2:])[self._slot[name]]
            return own if x.ndim == 2 else own.reshape(self.shapes[name])

        names = [(name, stacks[key]) for key, stack in self.stacks.items() for name in stack.weights]
        return {name: jax.tree.map(partial(taken, name), stack) for name, stack in names}

    def lay(self, tree: Any) -> dict[str, Any]:
        """A tree by name, with a leaf or more in the place of each parameter -> laid."""
        return self.set_aside(tree, self.pack(dict(zip(self._names, self._treedef.flatten_up_to(tree), strict=True))))

    def set_aside(self, tree: Any, stacks: Mapping[str, Any]) -> dict[str, Any]:
        """A tree by name, of which what is dealt out is left out -> laid, with these stacks."""
        leaves = zip(self._names, self._treedef.flatten_up_to(tree), strict=True)
        rest = [None if name in self.shapes else leaf for name, leaf in leaves]
        return {**jax.tree.unflatten(self._treedef, rest), DEALT: stacks}

    def named(self, laid: Mapping[str, Any]) -> Any:
        """The inverse of `lay`."""
        return self.put_back(laid, self.unpack(laid[DEALT]))

    def put_back(self, laid: Mapping[str, Any], dealt: Mapping[str, Any]) -> Any:
        """A laid tree, its stacks put aside, and {name: leaf} of what was dealt out -> a tree by name."""
        rest = self._treedef.flatten_up_to({key: part for key, part in laid.items() if key != DEALT})
        leaves = zip(self._names, rest, strict=True)
        return jax.tree.unflatten(self._treedef, [dealt.get(name, leaf) for name, leaf in leaves])

    def of_matrices(self, key: str, values: Mapping[str, Any]) -> np.ndarray:
        """{name: a number, or numbers [...] a matrix} -> [N, C] of a stack; 0 for padding."""
        stack = self.stacks[key]
        flat = [np.broadcast_to(values[name], self._slot[name].shape).ravel() for name in stack.weights]
        return np.concatenate([*flat, np.zeros(1, flat[0].dtype)])[stack.matrix]
