"""Checkpoints written and read one weight at a time, for conversions on hosts that cannot hold the model.

Orbax saves whole trees. Here it is given a tree of declarations, for which it writes its metadata while a handler of
ours creates each array empty, through tensorstore; the arrays are then filled piece by piece. The result is an orbax
checkpoint like any other. Arrays are uncompressed (zstd takes ten times as long as the disk) and cut into one chunk a
layer and expert, so a piece is one file that is written once.
"""

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from orbax.checkpoint import type_handlers

from easylm_plus.errors import UserError
from easylm_plus.interop.copying import contiguous
from easylm_plus.interop.tensor_files import mapped
from easylm_plus.interop.translate import Progress
from easylm_plus.interop.weights import (
    Index,
    Names,
    Stacked,
    Weights,
    batches,
    indices,
    piece_shapes,
    stored,
    stored_shapes,
    workers,
)
from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.packed_ternary import PackedTernary, pack, packed
from easylm_plus.numerics.trits import Trits
from easylm_plus.training.checkpoint import SCHEMA, locate, parameters_part, read_meta, read_parameters
from easylm_plus.training.contents import declared, put_together
from easylm_plus.tree import at, path_name, put


class Declared:
    """An array that will be there: its shape, dtype and chunks."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]):
        self.shape, self.dtype, self.chunks = shape, dtype, chunks


class Declare(type_handlers.NumpyHandler):
    """Creates declared arrays empty, under the name of an ordinary array."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            metadata = {"shape": value.shape, "chunks": value.chunks, "compressor": None}
            spec = _spec(Path(info.parent_dir) / info.name) | {"dtype": value.dtype.name, "metadata": metadata}
            await tensorstore.open(spec, create=True)
        return []


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}


def write_checkpoint(weights: Weights, directory: Path, meta: Mapping[str, Any], progress: Progress) -> None:
    """Writes `directory`/0 with the weights as the parameters of a checkpoint, stacked or not as their config says.

    `meta` is what stands beside the arrays' description; it is written last, so an interrupted write does not open.
    """
    config = weights.config
    scan, shapes = config.scan_layers, stored_shapes(config, config.scan_layers)
    arrays: dict[str, dict[str, Any]] = {}
    tree: dict[str, Any] = {}
    leaves: dict[str, dict[str, Any]] = {}
    ternary = weights.packed_names
    for name in (name for names in weights.groups for name in names):
        for key, inner in (stored(name, index, scan) for index in indices(name, config)):
            if name in ternary:
                leaf = _packed_shapes(shapes[key])
                leaves[f"params/{key}"] = {"type": "PackedTernary", "inputs": leaf.inputs}
                for part in ("codes", "scale"):
                    array = getattr(leaf, part)
                    arrays[f"params/{key}/{part}"] = {"shape": list(array.shape), "dtype": array.dtype.name}
                    chunks = (*(1 for _ in inner), *array.shape[len(inner) :])
                    put(tree, f"params/{key}/{part}", Declared(array.shape, array.dtype, chunks))
                continue
            shape = shapes[key]
            chunks = (*(1 for _ in inner), *shape[len(inner) :])
            arrays[f"params/{key}"] = {"shape": list(shape), "dtype": weights.dtype(name).name}
            put(tree, f"params/{key}", Declared(shape, weights.dtype(name), chunks))
    _declare(tree, directory / "0" / "state")
    state = directory / "0" / "state"
    with workers() as each:
        for batch in batches(weights.groups, config):
            each(partial(_write_piece, state, weights, progress), batch)
    meta = {"schema": SCHEMA, "arrays": arrays, "leaves": leaves, "data_hash": "", "pieces": not leaves, **meta}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(directory / "0" / "meta", args=ocp.args.JsonSave(meta))


def _declare(tree: dict[str, Any], state: Path) -> None:
    """Writes the metadata of a tree of Declared, and every array without its contents."""
    registry = type_handlers.create_type_handler_registry((Declared, Declare()))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns of what this way leaves out
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)) as writer:
            writer.save(state, args=ocp.args.PyTreeSave(tree))
    finally:
        logging.set_verbosity(verbosity)


def _write_piece(state: Path, weights: Weights, progress: Progress, piece: tuple[Names, Index]) -> None:
    """Writes the pieces of some weights at an index.

    An uncompressed chunk of a zarr array is the file of its bytes, named by where it lies. Written through tensorstore
    it would be copied twice more, each time into memory that is new to the process: twice the time.
    """
    names, index = piece
    if names[0] in weights.packed_names:
        found = weights.ternary(names[0], index)
        assert found is not None, names[0]
        key, inner = stored(names[0], index, weights.config.scan_layers)
        codes = pack(found[0])
        _write_chunk(_chunk(state, f"{key}/codes", inner, (0, 0)), codes)
        _write_chunk(_chunk(state, f"{key}/scale", inner, ()), np.full(1, found[1], np.float32))
        progress(codes.nbytes)
        return
    for name, array in zip(names, weights.read(names, index), strict=True):
        key, inner = stored(name, index, weights.config.scan_layers)
        _write_chunk(_chunk(state, key, inner, array.shape), array)
        progress(array.nbytes)


def _write_chunk(path: Path, array: np.ndarray) -> None:
    with path.open("wb", buffering=0) as file:
        rest = memoryview(contiguous(array).reshape(-1).view(np.uint8))
        while rest:
            rest = rest[file.write(rest) :]


def _packed_shapes(shape: tuple[int, ...]) -> PackedTernary:
    """What a matrix [..., in, out] is packed as: ShapeDtypeStruct."""
    stack, matrix = shape[:-2], jax.eval_shape(packed, jax.ShapeDtypeStruct(shape[-2:], np.float32))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), matrix)


def _chunk(state: Path, key: str, inner: Index, shape: tuple[int, ...]) -> Path:
    """The file of a piece."""
    numbers = (*inner, *(0 for _ in shape)) or (0,)
    return state / ("params/" + key).replace("/", ".") / ".".join(map(str, numbers))


class Chunked(Stacked):
    """The weights of a checkpoint that `write_checkpoint` has written: each piece is a file, which is mapped."""

    whole = False

    def __init__(self, *stacked: Any, state: Path):
        super().__init__(*stacked)
        self._state = state

    def read(self, names: Names, index: Index) -> list[np.ndarray]:
        return [self._map(name, index) for name in names]

    def _map(self, name: str, index: Index) -> np.ndarray:
        shape = piece_shapes(self.config)[name]
        path = _chunk(self._state, *stored(name, index, self._scan), shape)
        expected = math.prod(shape) * self.dtype(name).itemsize
        if not path.is_file() or path.stat().st_size != expected:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
            raise UserError(f"{path}: found {found}, expected {expected} bytes of {name}")
        return mapped(path, self.dtype(name), shape)


def open_checkpoint(path: str | Path, step: int | None = None) -> tuple[Stacked, dict[str, Any], Path]:
    """(the parameters of a checkpoint, the EMA's if it has one; its meta; its folder)."""
    directory, step = locate(path, step)
    meta = read_meta(directory, step)
    part = parameters_part(meta["arrays"])
    tree = put_together(declared(meta["arrays"], part), meta.get("leaves", {}))[part]
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_kept)
    arrays = {path_name(path): jax.eval_shape(decode, leaf) for path, leaf in leaves}

    fetch = lambda name: at(read_parameters(directory, step, only=name), name)
    config, place = ModelConfig(**meta["config"]["model"]), f"{directory}/{step}"
    if meta.get("pieces"):
        return Chunked(config, arrays, fetch, place, state=directory / str(step) / "state"), meta, directory
    ternary = {path_name(path) for path, leaf in leaves if isinstance(leaf, PackedTernary | Trits)}
    return Stacked(config, arrays, fetch, place, ternary), meta, directory


def total_bytes(weights: Weights, coded: Set[str] = frozenset()) -> int:
    """What all weights take, those of these names in codes of two bits."""
    shapes = stored_shapes(weights.config, True)

    def size(name: str) -> int:
        shape = shapes[stored(name, (0, 0), True)[0]]
        if name in coded:
            return math.prod(_packed_shapes(shape).codes.shape)
        return math.prod(shape) * weights.dtype(name).itemsize

    return sum(size(name) for group in weights.groups for name in group)
