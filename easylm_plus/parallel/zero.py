"""Whole tensors dealt out to ranks: FP8-LM's ZeRO (arXiv:2310.18313, Algorithm 1).

A matrix that is scaled as a whole is easiest kept whole: its owner alone has its master weights and moments, and needs
no collective for its scale. Matrices are dealt out greedily, the largest first, each to the rank with the least so far.
(Cutting every matrix, all parts sharing one scale, is the default elsewhere in this code base: see `sharding.py`.)

All ranks run one program on arrays of one shape, so matrices of one size lie in a stack [C, N, D, F]: those that rank n
owns have second index n, along which the axis of the ranks cuts, and where it owns fewer than C the rest is padding.
For 32 ranks that is none at LLaMA 7B, 18 % at 13B, and more for models of few matrices. Everything goes slot by slot,
so that no more than N matrices are ever held twice.

    named    a tree of parameters (or moments, ...) by name, as the model has them
    stacks   {key of a stack: leaf of arrays [C, N, ...]}
    laid     a named tree without what is dealt out, and its stacks under DEALT: how the state has it
    lay      named -> laid;  named  laid -> named;  pack and unpack  the same for what is dealt out alone

Legend: N ranks, C slots of a stack, D and F the sides of a matrix, `...` stack axes of a weight (layers, experts).
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.parallel.collectives import as_bits
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
    first: the number of each weight's first matrix, by name; a weight's are numbered one after the other
    count: of all matrices
    matrix: int[C, N], the number of the matrix in a slot; `count` where it is padding
    """

    kind: str
    sides: tuple[int, int]
    first: dict[str, int]
    count: int
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
        matrices = [name for name, shape in self.shapes.items() for _ in range(math.prod(shape[:-2]))]
        dealt = plan([math.prod(self.shapes[name][-2:]) for name in matrices], ranks)

        alike: dict[str, list[tuple[str, int]]] = defaultdict(list)  # the matrices of a stack: weight and owner
        for name, rank in zip(matrices, dealt.owner, strict=True):
            alike[f"{kinds[name]}_{math.prod(self.shapes[name][-2:])}"].append((name, rank))
        self.stacks = {key: self._stack(kinds[own[0][0]], own, ranks) for key, own in alike.items()}

    def _stack(self, kind: str, own: Sequence[tuple[str, int]], ranks: int) -> Stack:
        names = [name for name, _ in own]
        by_rank = [[number for number, (_, owner) in enumerate(own) if owner == rank] for rank in range(ranks)]
        slots = max(map(len, by_rank))
        matrix = np.array([numbers + [len(own)] * (slots - len(numbers)) for numbers in by_rank]).T
        first = {name: names.index(name) for name in dict.fromkeys(names)}
        return Stack(kind, self.shapes[names[0]][-2:], first, len(own), matrix)

    @property
    def keys(self) -> dict[str, str]:
        """{the name of a stack in a laid tree: its key}."""
        return {f"{DEALT}/{key}": key for key in self.stacks}

    @property
    def padding(self) -> float:
        """Elements of the stacks beyond those of the matrices, as a share of these."""
        stacks = self.stacks.values()
        elements = sum(stack.count * math.prod(stack.sides) for stack in stacks)
        return sum(stack.matrix.size * math.prod(stack.sides) for stack in stacks) / elements - 1

    def pack(self, named: Mapping[str, Any], own: Callable[[Any], Any] = lambda slot: slot) -> dict[str, Any]:
        """{name: array [..., D, F], or a leaf of such and of factors [...]} of all that is dealt out -> stacks.

        own: applied to each slot, [N, D, F] and [N], before it is put into its stack. Padding is 0, a factor of 1.
        """

        def stacked(stack: Stack) -> Any:
            # not a loop of the program: `own` may have collectives, and XLA:CPU mixes up those of several loops (0.12)
            weights = [named[name] for name in stack.first]
            slots = [own(jax.tree.map(lambda *xs, m=m: self._slot(stack, m, xs), *weights)) for m in stack.matrix]
            return jax.tree.map(_stacked, *slots)

        return {key: stacked(stack) for key, stack in self.stacks.items()}

    def _slot(self, stack: Stack, matrix: np.ndarray, weights: Sequence[jax.Array]) -> jax.Array:
        """The matrices of these numbers, int[N] -> [N, D, F]; or their factors, [N]."""
        is_factor = weights[0].ndim == len(self.shapes[next(iter(stack.first))]) - 2
        sides = () if is_factor else stack.sides
        slot = jnp.full((len(matrix), *sides), int(is_factor), weights[0].dtype)
        for first, weight in zip(stack.first.values(), weights, strict=True):
            flat = weight.reshape(-1, *sides)
            here = (matrix >= first) & (matrix < first + len(flat))
            slot = jnp.where(
                here.reshape(-1, *(1 for _ in sides)), flat[np.clip(matrix - first, 0, len(flat) - 1)], slot
            )
        return slot

    def unpack(
        self, stacks: Mapping[str, Any], bring: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> dict[str, Any]:
        """The inverse of `pack`. bring: says where the bits of a slot have to be, [N, ...], before they are taken."""
        found: dict[str, Any] = {}
        for key, stack in self.stacks.items():
            taken = jax.tree.map(lambda x, stack=stack: self._taken(stack, x, bring), stacks[key])
            is_taken = lambda x: isinstance(x, list)
            for i, name in enumerate(stack.first):
                found[name] = jax.tree.map(lambda arrays, i=i: arrays[i], taken, is_leaf=is_taken)
        return found

    def _taken(self, stack: Stack, x: jax.Array, bring: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
        """Of one array of a stack, [C, N, ...]: that of each of its weights."""
        shapes = [self.shapes[name] if x.ndim > 2 else self.shapes[name][:-2] for name in stack.first]
        counts = [math.prod(self.shapes[name][:-2]) for name in stack.first]
        bits, matrix = as_bits(x), jnp.asarray(stack.matrix)

        def put(c: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
            slot = bring(bits[c])

            def into(weight: jax.Array, first: int) -> jax.Array:
                number = matrix[c] - first
                number = jnp.where(number < 0, len(weight), number)  # an index below 0 would count from the end
                return weight.at[number].set(slot.reshape(-1, *weight.shape[1:]), mode="drop")

            return list(map(into, weights, stack.first.values()))

        empty = [jnp.zeros((n, *shape[-2:]) if x.ndim > 2 else n, bits.dtype) for n, shape in zip(counts, shapes)]
        weights = jax.lax.fori_loop(0, len(stack.matrix), put, empty)
        return [jax.lax.bitcast_convert_type(w, x.dtype).reshape(shape) for w, shape in zip(weights, shapes)]

    def lay(self, tree: Any, own: Callable[[Any], Any] = lambda slot: slot) -> dict[str, Any]:
        """A named tree, with a leaf or more in the place of each parameter -> laid."""
        named = dict(zip(self._names, self._treedef.flatten_up_to(tree), strict=True))
        return self.set_aside(tree, self.pack(named, own))

    def set_aside(self, tree: Any, stacks: Mapping[str, Any]) -> dict[str, Any]:
        """A named tree, of which what is dealt out is left out -> laid, with these stacks."""
        leaves = zip(self._names, self._treedef.flatten_up_to(tree), strict=True)
        rest = [None if name in self.shapes else leaf for name, leaf in leaves]
        return {**jax.tree.unflatten(self._treedef, rest), DEALT: stacks}

    def named(self, laid: Mapping[str, Any], bring: Callable[[jax.Array], jax.Array] = lambda x: x) -> Any:
        """The inverse of `lay`."""
        return self.put_back(laid, self.unpack(laid[DEALT], bring))

    def put_back(self, laid: Mapping[str, Any], dealt: Mapping[str, Any]) -> Any:
        """A laid tree, its stacks put aside, and {name: leaf} of what was dealt out -> named."""
        rest = self._treedef.flatten_up_to({key: part for key, part in laid.items() if key != DEALT})
        leaves = zip(self._names, rest, strict=True)
        return jax.tree.unflatten(self._treedef, [dealt.get(name, leaf) for name, leaf in leaves])

    def of_matrices(self, key: str, values: Mapping[str, Any]) -> np.ndarray:
        """{name: a number, or numbers [...] a matrix} -> [C, N] of a stack; 0 for padding."""
        stack = self.stacks[key]
        flat = [np.broadcast_to(values[name], self.shapes[name][:-2]).ravel() for name in stack.first]
        return np.concatenate([*flat, np.zeros(1, flat[0].dtype)])[stack.matrix]


def _stacked(*arrays: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.stack(list(map(as_bits, arrays))), arrays[0].dtype)
