"""A model's weights, wherever they lie, one matrix at a time.

A piece is one of our weights of one layer (and one expert): the name "layers/{i}/mlp/up_proj/kernel" and the index
(3,), or (3, 1) for expert 1 of layer 3, or () for what is there once. Whoever has weights hands them out piece by
piece, whoever wants some asks piece by piece, so that a conversion never holds a model.

Pieces that are ternary can be had as codes and gamma as well. Those of `packed_names` are nothing but that: as floats
they are codes times gamma, of which the codes' own gamma cannot be computed again.
"""

import functools
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.numerics.deploy import served
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.packed_ternary import PackedTernary, unpack
from easylm_plus.numerics.rules import assign
from easylm_plus.numerics.ternary import ternary_codes
from easylm_plus.numerics.trits import Trits
from easylm_plus.tree import path_name

Names = tuple[str, ...]
Index = tuple[int, ...]
WORKERS = 2  # threads that move pieces: one reads while the other writes
LAYER = "layers/{i}/"


Ternary = tuple[np.ndarray, float]  # codes int8[in, out], gamma


class Weights(ABC):
    """Our weights, to be read piece by piece from several threads."""

    config: ModelConfig
    place: str  # for messages
    groups: Sequence[Names]  # every weight once; those that are cheapest read together are together
    packed_names: Set[str] = frozenset()  # those that are kept as codes and gamma
    whole: bool = False  # whether one piece is read at the price of all pieces of its weight

    @abstractmethod
    def dtype(self, name: str) -> np.dtype: ...

    @abstractmethod
    def read(self, names: Names, index: Index) -> Sequence[np.ndarray]:
        """The pieces of these weights at this index, perhaps views that must not be written to."""

    def is_ternary(self, name: str, index: Index) -> bool:
        """Whether `ternary` is something, without reading it."""
        return name in self.packed_names

    def ternary(self, name: str, index: Index) -> Ternary | None:
        """A piece as ternary codes and their scale; None for one that is not ternary."""
        return None


def holds_ternary(weights: Weights) -> bool:
    """Whether any piece is ternary."""
    return any(weights.is_ternary(name, index) for name, index in _pieces(weights))


def ternary_names(weights: Weights) -> Set[str]:
    """The weights that are ternary at every index."""
    names = {name for group in weights.groups for name in group}
    return names - {name for name, index in _pieces(weights) if not weights.is_ternary(name, index)}


def _pieces(weights: Weights) -> Iterator[tuple[str, Index]]:
    return ((name, i) for group in weights.groups for name in group for i in indices(name, weights.config))


@functools.cache
def piece_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """name -> shape of one piece, of every weight that a model of this config has."""
    model = Transformer(ModelConfig(**{**vars(config), "scan_layers": True}))
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_parameters(model)[0]):
        name = path_name(path)
        name = LAYER + name.removeprefix("layers/") if name.startswith("layers/") else name
        shapes[name] = tuple(leaf.shape[len(stack_sizes(name, config)) :])
    return MappingProxyType(shapes)


def stack_sizes(name: str, config: ModelConfig) -> tuple[int, ...]:
    """How many pieces a weight has: (), (layers,) or (layers, experts)."""
    if not name.startswith(LAYER):
        return ()
    return (config.num_layers, config.num_experts) if "/experts/" in name else (config.num_layers,)


def indices(name: str, config: ModelConfig) -> Iterator[Index]:
    """The indices of a weight's pieces."""
    return itertools.product(*map(range, stack_sizes(name, config)))


def batches(groups: Iterable[Names], config: ModelConfig) -> list[list[tuple[Names, Index]]]:
    """All pieces, in the order in which they are best moved: what is there once together, since some of it is large,
    then one group after the other."""
    pieces = [[(names, index) for index in indices(names[0], config)] for names in groups]
    single = [batch[0] for batch in pieces if len(batch) == 1]
    return [single, *(batch for batch in pieces if len(batch) > 1)]


def stored(name: str, index: Index, scan: bool) -> tuple[str, Index]:
    """Where a piece lies in a parameter tree with stacked layers or not: the array's name, and the index into it."""
    if not name.startswith(LAYER):
        return name, index
    if scan:
        return "layers/" + name.removeprefix(LAYER), index
    return name.format(i=index[0]), index[1:]


def stored_shapes(config: ModelConfig, scan: bool) -> dict[str, tuple[int, ...]]:
    """name -> shape of every array of the parameter tree."""
    shapes = {}
    for name, shape in piece_shapes(config).items():
        sizes = stack_sizes(name, config)
        for index in indices(name, config):
            key, inner = stored(name, index, scan)
            shapes[key] = (*sizes[len(sizes) - len(inner) :], *shape)
    return shapes


class Stacked(Weights):
    """The weights of a parameter tree, stacked or not.

    Args:
      arrays: name in the tree -> anything with the shape and dtype that the weight has when it is read.
      fetch: name in the tree -> that array on the host, or a leaf of such arrays, of which each piece is decoded when
        it is read. What was last fetched is kept, so each is fetched once where all pieces of a weight are read before
        those of the next.
      packed: names in the tree of those that are ternary codes, PackedTernary or Trits.

    Raises UserError where the arrays are not those of the config.
    """

    whole = True

    def __init__(
        self,
        config: ModelConfig,
        arrays: Mapping[str, Any],
        fetch: Callable[[str], Any],
        place: str,
        packed: Set[str] = frozenset(),
    ):
        self.config, self.place, self._arrays, self._fetch = config, place, arrays, fetch
        self._scan = not any(name.startswith("layers/0/") for name in arrays)
        self._kept: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.groups: list[Names] = [(name,) for name in piece_shapes(config)]
        is_packed = lambda name: stored(name, (0, 0), self._scan)[0] in packed
        self.packed_names = {names[0] for names in self.groups if is_packed(names[0])}
        expected = stored_shapes(config, self._scan)
        for key in sorted({*expected, *arrays}):
            found = tuple(arrays[key].shape) if key in arrays else None
            if found != expected.get(key):
                raise UserError(f"{place}: {key}: found {_show(found)}, its config expects {_show(expected.get(key))}")

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._arrays[stored(name, (0, 0), self._scan)[0]].dtype)

    def read(self, names: Names, index: Index) -> list[np.ndarray]:
        return [decode(leaf) for leaf in self._leaves(names, index)]

    def ternary(self, name: str, index: Index) -> Ternary | None:
        if name not in self.packed_names:
            return None
        leaf = served(self._leaves((name,), index)[0])
        return unpack(leaf.codes, leaf.inputs).T, float(leaf.scale)

    def _leaves(self, names: Names, index: Index) -> list[Any]:
        places = [stored(name, index, self._scan) for name in names]
        with self._lock:
            wanted = {key for key, _ in places}
            if missing := wanted - self._kept.keys():
                self._kept = {key: array for key, array in self._kept.items() if key in wanted}
                self._kept |= {key: self._fetch(key) for key in sorted(missing)}
            return [self._kept[key][inner] for key, inner in places]


def _show(shape: tuple[int, ...] | None) -> object:
    return "nothing" if shape is None else list(shape)


def of_params(config: ModelConfig, params: Any, place: str) -> Stacked:
    """The weights of a tree of plain floating-point arrays, packed ternary ones among them, on any device."""
    is_packed = lambda leaf: isinstance(leaf, PackedTernary | Trits)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed)}
    packed = {name for name, leaf in leaves.items() if is_packed(leaf)}
    for name, leaf in leaves.items():
        if name not in packed and not jax.numpy.issubdtype(getattr(leaf, "dtype", np.dtype(object)), np.floating):
            raise UserError(f"{place}: {name} is {getattr(leaf, 'dtype', type(leaf))}, expected plain floating point")
    arrays = {name: jax.eval_shape(decode, leaf) if name in packed else leaf for name, leaf in leaves.items()}
    return Stacked(config, arrays, lambda name: jax.tree.map(np.asarray, leaves[name]), place, packed)


class Derived(Weights):
    """Weights made of others, which they are like in all that a class does not say."""

    def __init__(self, weights: Weights):
        self.config, self.place, self.groups = weights.config, weights.place, weights.groups
        self.packed_names, self.whole, self._weights = weights.packed_names, weights.whole, weights

    def dtype(self, name: str) -> np.dtype:
        return self._weights.dtype(name)

    def read(self, names: Names, index: Index) -> Sequence[np.ndarray]:
        return self._weights.read(names, index)

    def is_ternary(self, name: str, index: Index) -> bool:
        return self._weights.is_ternary(name, index)

    def ternary(self, name: str, index: Index) -> Ternary | None:
        return self._weights.ternary(name, index)


class Cast(Derived):
    """The same weights in another floating-point dtype; an error names one that is too large for it."""

    def __init__(self, weights: Weights, dtype: np.dtype):
        super().__init__(weights)
        self._dtype = np.dtype(dtype)

    def dtype(self, name: str) -> np.dtype:
        return self._dtype

    def read(self, names: Names, index: Index) -> list[np.ndarray]:
        arrays = zip(names, self._weights.read(names, index), strict=True)
        return [self._cast(array, stored(name, index, scan=False)[0]) for name, array in arrays]

    def _cast(self, array: np.ndarray, key: str) -> np.ndarray:
        limit = float(ml_dtypes.finfo(self._dtype).max)
        if limit >= float(ml_dtypes.finfo(array.dtype).max):
            return array.astype(self._dtype, copy=False)
        with np.errstate(over="ignore"):  # counted instead
            out = array.astype(self._dtype)
        if too_large := int((np.isinf(out) & ~np.isinf(array)).sum()):
            found = f"found {too_large} numbers beyond {limit:g}, the largest of {self._dtype}"
            raise UserError(f"{self.place}: {key}: {found}; expected another dtype, as bfloat16")
        return out


class Latents(Derived):
    """Weights of which some multiply as their ternary rounding (numerics/ternary.py), by the rules of a run."""

    def __init__(self, weights: Weights, rules: Sequence[str]):
        super().__init__(weights)
        self._scan = weights.config.scan_layers
        shapes = stored_shapes(weights.config, self._scan)
        self._assigned = assign({key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}, rules)

    def is_ternary(self, name: str, index: Index) -> bool:
        return name in self.packed_names or self._assigned[stored(name, index, self._scan)[0]] == "ternary"

    def ternary(self, name: str, index: Index) -> Ternary | None:
        if name in self.packed_names or not self.is_ternary(name, index):
            return super().ternary(name, index)
        codes, inverse = ternary_codes(jax.numpy.asarray(self.read((name,), index)[0]))
        return np.asarray(codes, np.int8), float(1 / inverse)


@contextmanager
def workers() -> Iterator[Callable[[Callable[[Any], None], Iterable[Any]], None]]:
    """A function each(work, items) that calls `work` for all items from WORKERS threads and returns when all are done.

    The first error stops the rest and is raised. The threads, and with them their scratch memory, live as long as the
    context, which is meant to be a whole conversion.
    """
    with ThreadPoolExecutor(WORKERS) as pool:

        def each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
            waiting = [pool.submit(work, item) for item in items]
            try:
                for future in as_completed(waiting):
                    future.result()
            finally:
                for future in waiting:
                    future.cancel()

        yield each
