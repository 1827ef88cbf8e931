"""GGUF files, which llama.cpp and what is built on it run.

They are written tensor by tensor, so that host memory stays far below the size of the model. PyPI's `gguf` lays the
file out and rounds to blocks; gguf_names.py says what is called how. Norms and biases are float32, embedding and head
of a type of their own, the other matrices of the type that is asked for:

    f32 f16 bf16   the numbers
    q8_0 q4_0      blocks of 32 inputs, 8.5 and 4.5 bits a weight
    tq2_0 tq1_0    blocks of 256 inputs of {-1, 0, 1}, 2.0625 and 1.6875 bits a weight: ternary matrices only

A ternary matrix is its codes, in the file as here, and its scale gamma beside them as a float32 (`....scale`), for
every type that holds codes exactly; the scale that each TQ block has too is 1 then, and would round gamma to 11 bits
if it had to hold it. The engine multiplies by gamma after the product: llama.cpp's `bitnet` always, `llama` since it
has NVFP4, before which it refuses the file. It rounds activations by itself: to 8 bits by 256 inputs for TQ types, not
by token as training does.
"""

import importlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.gguf_names import ROPE_FACTORS, TABLES, architecture_for, hyperparameters, rope_factors
from easylm_plus.interop.gguf_tokenizer import KeyValue
from easylm_plus.interop.tables import Rule
from easylm_plus.interop.translate import Progress, rules_for, their_names, their_shapes
from easylm_plus.interop.weights import (
    WORKERS,
    Index,
    Weights,
    batches,
    holds_ternary,
    piece_shapes,
    stored,
)
from easylm_plus.models.config import ModelConfig

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "tq2_0", "tq1_0")
TERNARY_TYPES = ("tq2_0", "tq1_0")
FLOATS = ("f32", "f16", "bf16")
# of embedding and head, where nothing else is asked for
ENDS = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8_0", "q4_0": "q8_0", "tq2_0": "q8_0", "tq1_0": "q8_0"}
END_TYPES = (*FLOATS, "q8_0")
ROWS = 1024  # of a matrix that are rounded at once: what is in between takes several times their room
QUANTIZATION_VERSION = 2  # of the block formats, as the reader checks it


class Tensor(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str  # a name in TYPES

    @property
    def bytes(self) -> int:
        return stored_size(self.shape, self.kind)


class Planned(NamedTuple):
    """What a piece becomes: one tensor, or codes and their scale."""

    tensors: tuple[Tensor, ...]
    make: Callable[[], Sequence[np.ndarray]]  # their bytes
    source: int = 0  # bytes that are read for it


class Written(NamedTuple):
    """What a file holds."""

    architecture: str
    bytes: int
    weights: int
    block_bits: float  # a weight of the blocks' matrices, scales included
    bits: float  # a weight, over the whole file


def package() -> Any:
    """The module gguf, which is an extra; UserError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(f"GGUF files need the package gguf ({error}): pip install 'easylm_plus[gguf]'") from error


def write_gguf(
    weights: Weights, path: Path, kind: str, tokenizer: Sequence[KeyValue], *,
    ends: str = "", name: str = "", progress: Progress = lambda _: None,
) -> Written:  # fmt: skip
    """Writes a GGUF file.

    Args:
      kind: type of the blocks' matrices, one of TYPES.
      tokenizer: the keys of the tokenizer (gguf_tokenizer.py).
      ends: type of embedding and head, one of END_TYPES; "" for that of ENDS.
      name: of the model, for people.

    Raises UserError naming the model's key that llama.cpp, or the type, cannot hold.
    """
    gguf = package()
    architecture = architecture_for(weights.config, weights.place, holds_ternary(weights))
    planned = plan(weights, kind, ends)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"])
    writer.add_name(name)
    for key, form, value in hyperparameters(weights.config):
        getattr(writer, f"add_{form}")(f"{architecture}.{key}", value)
    for key, form, value in tokenizer:
        getattr(writer, f"add_{form}")(key, value)
    tensors = [tensor for piece in planned for tensor in piece.tensors]
    for tensor in tensors:
        as_bytes = (*tensor.shape[:-1], stored_size(tensor.shape[-1:], tensor.kind))
        writer.add_tensor_info(tensor.name, as_bytes, np.dtype(np.uint8), tensor.bytes, _type(tensor.kind))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, arrays in _ahead(planned):
            for array in arrays:
                writer.write_tensor_data(array)
            progress(piece.source)
    finally:
        writer.close()
    return _written(architecture, tensors, path.stat().st_size)


def needed_bytes(planned: Sequence[Planned]) -> int:
    """What the tensors of a file take."""
    return sum(tensor.bytes for piece in planned for tensor in piece.tensors)


def plan(weights: Weights, kind: str, ends: str) -> list[Planned]:
    """All tensors in the order in which they are best read; see `write_gguf`."""
    config, shapes = weights.config, piece_shapes(weights.config)
    table = TABLES[architecture_for(config, weights.place, holds_ternary(weights))]
    rule_of = {rule.ours: rule for rule in rules_for(table, shapes, weights.place)}
    planned: list[Planned] = []
    ternary = ""  # one of them, for messages
    for (ours,), index in itertools.chain(*batches(rule_of, config)):
        rule = rule_of[(ours,)]
        name, shape = their_names(rule, index)[0], their_shapes(rule, shapes, config)[0]
        place = f"{weights.place}: {stored(ours, index, scan=False)[0]}"
        coded = weights.is_ternary(ours, index)
        ternary = place if coded else ternary
        form = kind if coded else _form(ours, len(shape), kind, ends or ENDS[kind])
        _check_inputs(ours, shape[-1], form, config)
        source = math.prod(shape) * weights.dtype(ours).itemsize
        if coded:
            scale = Tensor(name.removesuffix("weight") + "scale", (1,), "f32")
            make = partial(_ternary, weights, rule, index, form)
            planned.append(Planned((Tensor(name, shape, form), scale), make, source))
        else:
            make = partial(_plain, weights, rule, index, form, place)
            planned.append(Planned((Tensor(name, shape, form),), make, source))
    if ternary and kind not in (*FLOATS, *TERNARY_TYPES):
        expected = ", ".join((*TERNARY_TYPES, *FLOATS))
        raise UserError(f"--gguf_type={kind}: found {ternary}, which is ternary; expected one of {expected}")
    if kind in TERNARY_TYPES and not ternary:
        raise UserError(
            f"--gguf_type={kind}: {weights.place} has no ternary matrix; expected one that was trained with "
            f"numerics.rules that name ternary weights, or another type"
        )
    if (factors := rope_factors(config)) is not None:
        planned.append(Planned((Tensor(ROPE_FACTORS, factors.shape, "f32"),), lambda: [factors.view(np.uint8)]))
    return planned


def _form(ours: str, axes: int, kind: str, ends: str) -> str:
    """The type of a weight that is not ternary."""
    if axes == 1:
        return "f32"
    if ours.startswith(("embed_tokens/", "lm_head/")):
        return ends
    return "f16" if kind in TERNARY_TYPES else kind


def _ternary(weights: Weights, rule: Rule, index: Index, kind: str) -> list[np.ndarray]:
    """The bytes of a matrix's codes, and of its gamma."""
    piece = weights.ternary(rule.ours[0], index)
    assert piece is not None, f"{rule.ours[0]} was planned as ternary"
    codes, gamma = piece
    return [encoded(rule.write((codes,), weights.config)[0], kind), np.asarray([gamma], np.float32).view(np.uint8)]


def _plain(weights: Weights, rule: Rule, index: Index, kind: str, place: str) -> list[np.ndarray]:
    array = rule.write(tuple(weights.read(rule.ours, index)), weights.config)[0]
    return [encoded(array, kind, place)]


def encoded(array: np.ndarray, kind: str, place: str = "") -> np.ndarray:
    """The bytes of an array [rows, inputs] or [inputs] as a type of TYPES has them: uint8[rows, bytes] or [bytes]."""
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty((len(rows), stored_size(rows.shape[1:], kind)), np.uint8)
    for start in range(0, len(rows), ROWS):
        part = np.ascontiguousarray(rows[start : start + ROWS], np.float32)
        out[start : start + ROWS] = _rounded(part, kind, place).view(np.uint8)
    return out.reshape(*array.shape[:-1], -1)


def _rounded(part: np.ndarray, kind: str, place: str) -> np.ndarray:
    if kind == "bf16":
        return part.astype(ml_dtypes.bfloat16)
    if kind == "f16" and (too_large := int((np.abs(part) > np.finfo(np.float16).max).sum())):
        raise UserError(f"{place}: found {too_large} numbers beyond 65504, the largest of f16; expected bf16 or f32")
    rounded: np.ndarray = package().quants.quantize(part, _type(kind))
    return rounded


def stored_size(shape: Sequence[int], kind: str) -> int:
    """Bytes of an array."""
    block, size = package().GGML_QUANT_SIZES[_type(kind)]
    return math.prod(shape) // block * size


def _type(kind: str) -> Any:
    return package().GGMLQuantizationType[kind.upper()]


def _check_inputs(ours: str, inputs: int, kind: str, config: ModelConfig) -> None:
    """An error where a matrix's inputs are no whole number of blocks."""
    block, _ = package().GGML_QUANT_SIZES[_type(kind)]
    if inputs % block == 0:
        return
    keys = {config.intermediate_size: "intermediate_size", config.num_heads * config.head_dim: "num_heads * head_dim"}
    key = (keys | {config.hidden_size: "hidden_size"})[inputs]
    found = f"model.{key} = {inputs}, the inputs of {ours}"
    raise UserError(f"{found}: {kind} has blocks of {block}; expected a multiple of {block}, or another type")


def _ahead(planned: Sequence[Planned]) -> Iterator[tuple[Planned, Sequence[np.ndarray]]]:
    """The pieces with their bytes, one after the other; threads make the next ones while one is written."""
    waiting: deque[tuple[Planned, Future[Sequence[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for piece in (*planned, *[None] * WORKERS):
                if piece is not None:
                    waiting.append((piece, pool.submit(piece.make)))
                if waiting and (len(waiting) > WORKERS or piece is None):
                    first, future = waiting.popleft()
                    yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _written(architecture: str, tensors: Sequence[Tensor], size: int) -> Written:
    scales = [tensor for tensor in tensors if tensor.name.endswith(".scale")]
    matrices = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    kept = [tensor for tensor in tensors if tensor not in scales and tensor.name != ROPE_FACTORS]
    inner, weights = (sum(math.prod(tensor.shape) for tensor in group) for group in (matrices, kept))
    block_bits = 8 * sum(tensor.bytes for tensor in (*matrices, *scales)) / inner
    return Written(architecture, size, weights, block_bits, 8 * size / weights)
