"""Hugging Face folders, both ways: config.json and safetensors <-> ModelConfig and parameters.

    model, params = load_hf("Llama-2-7b-hf", jnp.bfloat16)
    save_hf(model, params, "out", tokenizer_from="Llama-2-7b-hf")

Weights move one matrix at a time (weights.py), so host memory holds one stacked weight beside what the caller holds.
Weights in PyTorch's own format are refused unless asked for, and then read without running code (torch_files.py).
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.configs import architecture, parse_config, read_config, read_raw
from easylm_plus.interop.copying import copy_into
from easylm_plus.interop.tables import ARCHITECTURES, DERIVED
from easylm_plus.interop.tensor_files import SHARD_BYTES, Renamed, ShardWriter, Tensors, read_json, safetensors_of
from easylm_plus.interop.torch_files import TorchFiles
from easylm_plus.interop.translate import Progress, Translated, write_tensors
from easylm_plus.interop.weights import (
    Cast,
    Index,
    Names,
    Weights,
    indices,
    of_params,
    put,
    stored,
    stored_shapes,
    workers,
)
from easylm_plus.interop.write_configs import export_config
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer
from easylm_plus.numerics.precision import POLICIES
from easylm_plus.numerics.rules import attach

Place = Callable[[str, np.ndarray], Any]  # puts a host array where the parameter of that name lives

# What belongs to a model beside its weights: the tokenizer in all its forms, chat template, generation defaults.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
              "chat_template.*", "generation_config.json")  # fmt: skip


def load_hf(
    folder: str | Path, dtype: Any = jnp.float32, numerics: Sequence[str] = (), **overrides: Any
) -> tuple[Transformer, Any]:
    """A Hugging Face folder -> (model, params). `overrides` replace keys of the ModelConfig.

    `numerics` are rules of numerics/rules.py for what weights become, as its BITNET: a config.json does not say.
    `model.apply({"params": params}, tokens)` gives float32 logits [B, T, V].
    """
    config = read_config(folder, **overrides)
    policy = POLICIES["float32" if jnp.dtype(dtype) == jnp.float32 else "bf16_pure"]
    model = Transformer(config, policy)
    params = load_parameters(folder, model, lambda _, array: jnp.asarray(array, dtype))
    return model, attach(params, numerics)


def save_hf(
    model: Transformer,
    params: Any,
    folder: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
) -> None:
    """A model -> a new Hugging Face folder that transformers' AutoModelForCausalLM opens.

    Args:
      params: a tree of plain floating-point arrays; each is fetched to the host once, as a whole.
      dtype: of the files; None keeps each weight's own.
      max_shard_bytes: no file is larger, unless a single tensor is.
      tokenizer_from: a folder whose tokenizer, chat template and generation defaults come along.

    Raises UserError if the folder exists or if no Hugging Face architecture represents the model.
    """
    weights: Weights = of_params(model.config, params, "params")
    if dtype is not None:
        weights = Cast(weights, np.dtype(dtype))
    raw = export_keys(weights, None)
    if Path(folder).exists():
        raise UserError(f"{folder}: found something there already; expected a new folder")
    Path(folder).mkdir(parents=True)
    if tokenizer_from is not None:
        copy_companions(Path(tokenizer_from), Path(folder))
    write_folder(weights, raw, Path(folder), max_shard_bytes)  # config.json last: without it the folder does not open


def export_keys(weights: Weights, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json of these weights; `original`: that of the model they came from."""
    raw = export_config(weights.config, original, weights.place)
    return {**raw, "torch_dtype": weights.dtype("embed_tokens/embedding").name}


def write_folder(
    weights: Weights,
    raw: Mapping[str, Any],
    folder: Path,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda _: None,
) -> None:
    """Writes the safetensors of `raw`'s architecture into a folder that is there, and last, config.json."""
    table = ARCHITECTURES[architecture(raw, weights.place)]
    write_tensors(weights, table, lambda groups: ShardWriter(folder, groups, max_shard_bytes), progress)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies the files that travel with weights; returns their names."""
    found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]


def open_weights(folder: str | Path, config: ModelConfig | None = None, *, pickled: bool = False) -> Translated:
    """The weights of a folder. `pickled`: also those in PyTorch's own format, where there is no other."""
    folder, raw = Path(folder), read_raw(folder)
    name = architecture(raw, f"{folder}/config.json")
    config = config or parse_config(raw, f"{folder}/config.json")
    tensors = _open(folder, pickled)
    if name == "GPT2LMHeadModel" and "wte.weight" in tensors.names():
        tensors = Renamed(tensors, "transformer.")  # as OpenAI's own files were published
    copies = {"lm_head.weight"} if config.tie_embeddings else set()
    ignored = lambda tensor: tensor in copies or re.search(DERIVED, tensor) is not None
    return Translated(tensors, ARCHITECTURES[name], config, ignored)


def _pickles(folder: Path) -> list[Path]:
    """Weights in PyTorch's own format: those that the index names, or pytorch_model.bin, or whatever there is."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    every = sorted(path for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    named = [path for path in every if path.name.startswith("pytorch_model")]  # a Trainer leaves training_args.bin too
    return named or every


def _open(folder: Path, pickled: bool) -> Tensors:
    if (tensors := safetensors_of(folder)) is not None:
        return tensors
    pickles = _pickles(folder)
    if pickles and pickled:
        return TorchFiles(pickles, str(folder))
    found = f"only {pickles[0].name}, which can run code when read" if pickles else "no weights"
    raise UserError(f"{folder}: found {found}; expected *.safetensors")


def load_parameters(folder: str | Path, model: Transformer, place: Place) -> Any:
    """The weights of a folder in the shape of `model`'s tree, each handed to `place` as soon as it is read."""
    return assemble(open_weights(folder, model.config), place)


def assemble(weights: Weights, place: Place) -> dict[str, Any]:
    """A parameter tree as the weights' config has it, of what `place` makes of each array."""
    config = weights.config
    tree: dict[str, Any] = {}
    shapes = stored_shapes(config, config.scan_layers)
    with workers() as each:
        for names in weights.groups:
            keys = {stored(n, index, config.scan_layers)[0]: n for n in names for index in indices(n, config)}
            arrays = {key: np.empty(shapes[key], weights.dtype(name)) for key, name in keys.items()}
            each(partial(_fill, arrays, weights, names), indices(names[0], config))
            for key in sorted(arrays):
                put(tree, key, place(key, arrays[key]))
    return tree


def _fill(arrays: Mapping[str, np.ndarray], weights: Weights, names: Names, index: Index) -> None:
    for name, piece in zip(names, weights.read(names, index), strict=True):
        key, inner = stored(name, index, weights.config.scan_layers)
        copy_into(arrays[key][inner] if inner else arrays[key], piece)
