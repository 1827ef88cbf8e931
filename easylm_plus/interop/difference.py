"""Weight differences: a model published as what has to be added to another one, as Koala was.

A difference is taken of the bit patterns, as unsigned integers that wrap around. Floating-point numbers subtracted and
added again come back rounded; bit patterns come back as they were, in the same number of bytes. The folder holds

    difference.json     the model's config, the dtypes, a SHA-256 of every weight of the model
    *.safetensors       the differences, layer by layer, by our names

so recovering with the wrong base is noticed at the first weight. EasyLM's own differences are of floating-point numbers
and carry no checksum; `Sum` adds those.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.copying import compact, contiguous
from easylm_plus.interop.keys import optional, required
from easylm_plus.interop.tensor_files import CODES, SHARD_BYTES, Layout, ShardWriter, Tensors, read_json, safetensors_of
from easylm_plus.interop.translate import Progress
from easylm_plus.interop.weights import (
    Cast,
    Index,
    Names,
    Weights,
    batches,
    indices,
    piece_shapes,
    stored,
    stored_shapes,
    workers,
)
from easylm_plus.models.config import ModelConfig

FILE, SCHEMA = "difference.json", 1
NAMES = [dtype.name for dtype in CODES]


def write_difference(
    base: Weights,
    target: Weights,
    folder: Path,
    original: Mapping[str, Any] | None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda _: None,
    rules: Sequence[str] = (),
) -> None:
    """Writes target - base into a folder that is there.

    `original`: the target's config.json, if it has one. `rules`: what its weights mean (numerics/rules.py).
    """
    config = target.config
    _same_shapes(base, target)
    shapes, digests = piece_shapes(config), {}
    order = batches(target.groups, config)
    layouts = [
        [Layout(_key(name, index), _bits(target.dtype(name)), shapes[name]) for name in names]
        for names, index in itertools.chain(*order)
    ]

    def move(task: tuple[Names, Index]) -> None:
        names, index = task
        for name in names:
            (old,), (new,) = base.read((name,), index), target.read((name,), index)
            old, new = old.astype(new.dtype, copy=False), contiguous(new)
            digests[_key(name, index)] = hashlib.sha256(new.reshape(-1).view(np.uint8)).hexdigest()
            bits = _bits(new.dtype)
            shards.write(_key(name, index), new.view(bits) - compact(old).view(bits))
            progress(new.nbytes)

    with ShardWriter(folder, layouts, max_shard_bytes) as shards, workers() as each:
        for batch in order:
            each(move, batch)
    told = {
        "schema": SCHEMA,
        "model": dataclasses.asdict(config),
        "dtypes": {name: target.dtype(name).name for name in shapes},
        "sha256": dict(sorted(digests.items())),
        "config.json": original,
        "rules": list(rules),
    }
    (folder / FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


class Told(NamedTuple):
    """What a difference says of the model it was made of."""

    original: dict[str, Any] | None  # its config.json
    rules: list[str]


def open_difference(folder: Path, base: Weights) -> tuple["Recovered", Told]:
    """(the weights that a difference makes of its base, what else it says of them)."""
    told, place = read_json(folder / FILE), str(folder / FILE)
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        found = f"schema {told.get('schema')!r}" if isinstance(told, dict) else type(told).__name__
        raise UserError(f"{place}: found {found}, expected schema {SCHEMA}")
    model, dtypes, digests = (required(told, key, dict, place) for key in ("model", "dtypes", "sha256"))
    config = _config(model, f"{place}: model")
    for name in piece_shapes(config):
        if dtypes.get(name) not in NAMES:
            raise UserError(f"{place}: found dtype {dtypes.get(name)!r} of {name}, expected one of {', '.join(NAMES)}")
    tensors = safetensors_of(folder)
    if tensors is None:
        raise UserError(f"{folder}: found no *.safetensors beside {FILE}")
    rules = optional(told, "rules", list, place, [])
    if not all(isinstance(rule, str) for rule in rules):
        raise UserError(f"{place}: found rules {rules}, expected texts")
    original = optional(told, "config.json", dict, place, None)
    return Recovered(base, tensors, config, dtypes, digests), Told(original, rules)


def _config(model: Mapping[str, Any], place: str) -> ModelConfig:
    """A ModelConfig from JSON, whose keys another version may have written."""
    known = {field.name: field for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(model.keys() - known.keys()):
        raise UserError(f"{place}: found {unknown[0]}, which this version does not know; expected that which wrote it")
    for name, field in known.items():
        if name in model or field.default is dataclasses.MISSING:
            required(model, name, cast(type, field.type), place, least=0)
    return ModelConfig(**model)


class Recovered(Weights):
    """base + difference, bit for bit what the difference was made of; every weight is compared with its checksum."""

    def __init__(
        self,
        base: Weights,
        tensors: Tensors,
        config: ModelConfig,
        dtypes: Mapping[str, str],
        digests: Mapping[str, str],
    ):
        self.config, self.place = config, tensors.place
        self.groups: list[Names] = [(name,) for name in piece_shapes(config)]
        self._base, self._tensors, self._digests = base, tensors, digests
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        _same_shapes(base, self)
        for name, shape in piece_shapes(config).items():
            for index in indices(name, config):
                if (key := _key(name, index)) not in tensors.names() or key not in digests:
                    raise UserError(f"{self.place}: found no {key}, expected the whole model's difference")
                found, expected = (tensors.shape(key), tensors.dtype(key)), (shape, _bits(self.dtype(name)))
                if found != expected:
                    raise UserError(f"{self.place}: {key} is {found[1]}{found[0]}, expected {expected[1]}{expected[0]}")

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[name]

    def read(self, names: Names, index: Index) -> list[np.ndarray]:
        return [self._read(name, index) for name in names]

    def _read(self, name: str, index: Index) -> np.ndarray:
        key, dtype = _key(name, index), self._dtypes[name]
        (old,) = self._base.read((name,), index)
        bits = compact(old.astype(dtype, copy=False)).view(_bits(dtype)) + self._tensors.read(key)
        if hashlib.sha256(bits.reshape(-1).view(np.uint8)).hexdigest() != self._digests[key]:
            raise UserError(
                f"{self.place}: {key} of {self._base.place} plus its difference has another checksum than the model: "
                "expected the base that the difference was made with, unchanged"
            )
        return bits.view(dtype)


class Sum(Weights):
    """base + difference in floating point (float32, rounded to the base's dtype), for EasyLM's differences."""

    def __init__(self, base: Weights, difference: Weights):
        self.config, self.place, self.groups = base.config, difference.place, base.groups
        self._base, self._difference = base, difference
        _same_shapes(base, difference)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def read(self, names: Names, index: Index) -> list[np.ndarray]:
        float32 = np.dtype(np.float32)
        parts = (Cast(weights, float32).read(names, index) for weights in (self._base, self._difference))
        return [(old + new).astype(self.dtype(name)) for name, old, new in zip(names, *parts, strict=True)]


def _same_shapes(base: Weights, other: Weights) -> None:
    """The weights' names and shapes must be the same; how the models differ otherwise does not matter."""
    ours, theirs = (stored_shapes(weights.config, scan=True) for weights in (base, other))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            show = lambda shape: "nothing" if shape is None else list(shape)
            found = f"{show(ours.get(name))} in {base.place}, {show(theirs.get(name))} in {other.place}"
            raise UserError(f"{name}: found {found}; expected models of the same shapes")


def _key(name: str, index: Index) -> str:
    """The name of a piece in the difference's files."""
    key, inner = stored(name, index, scan=False)
    return "/".join((key, *map(str, inner)))


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}")
