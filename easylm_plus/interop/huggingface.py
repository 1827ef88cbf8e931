"""Hugging Face folders, both ways: config.json and safetensors <-> ModelConfig and parameters.

    model, params = load_hf("Llama-2-7b-hf", jnp.bfloat16)
    save_hf(model, params, "out", tokenizer_from="Llama-2-7b-hf")

Weights move one matrix at a time (weights.py), so host memory holds one stacked weight beside what the caller holds.
Weights in PyTorch's own format are refused unless asked for, and then read without running code (torch_files.py).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.tokenizers.tokenizer import FILES, load_tokenizer
from easylm_plus.errors import UserError
from easylm_plus.interop.beside import beside
from easylm_plus.interop.bitnet import PACKED, PackedTensors, is_ternary_name
from easylm_plus.interop.companions import copy_companions
from easylm_plus.interop.configs import (
    architecture,
    parse_config,
    read_config,
    read_raw,
    stated_form,
    stated_rules,
)
from easylm_plus.interop.copying import copy_into
from easylm_plus.interop.tables import ARCHITECTURES, DERIVED, Table
from easylm_plus.interop.tensor_files import (
    SHARD_BYTES,
    Renamed,
    ShardWriter,
    Tensors,
    indexed,
    read_json,
    safetensors_of,
)
from easylm_plus.interop.torch_files import TorchFiles
from easylm_plus.interop.translate import Progress, Translated, rules_for, their_names, their_shapes, write_tensors
from easylm_plus.interop.weights import (
    Cast,
    Index,
    Latents,
    Names,
    Weights,
    holds_ternary,
    indices,
    of_params,
    piece_shapes,
    stored,
    stored_shapes,
    ternary_names,
    workers,
)
from easylm_plus.interop.write_configs import TOKEN_IDS, export_config
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.packed_ternary import PackedTernary, pack
from easylm_plus.numerics.precision import POLICIES
from easylm_plus.numerics.rules import BITNET, attach
from easylm_plus.numerics.ternary import Ternary
from easylm_plus.tree import put

Place = Callable[[str, Any], Any]  # puts a host array, or a PackedTernary of some, where the parameter lives


def load_hf(
    folder: str | Path, dtype: Any = jnp.float32, numerics: Sequence[str] | None = None, **overrides: Any
) -> tuple[Transformer, Any]:
    """A Hugging Face folder -> (model, params). `overrides` replace keys of the ModelConfig.

    Args:
      dtype: float32 or bfloat16, of the parameters and of what is computed.
      numerics: rules of numerics/rules.py for what weights become; None is what config.json says: BITNET where it says
        that the weights are ternary, nothing elsewhere. Ternary weights that are stored packed (bitnet.py) are
        PackedTernary with exactly these codes and scales, whatever `numerics` says.

    `model.apply({"params": params}, tokens)` gives float32 logits [B, T, V].
    """
    policies = {"float32": "float32", "bfloat16": "bf16_pure"}
    if (name := jnp.dtype(dtype).name) not in policies:
        raise UserError(f"{folder}: found dtype {name}, expected float32 or bfloat16")
    model = Transformer(read_config(folder, **overrides), POLICIES[policies[name]])
    if numerics is None:
        numerics = stated_rules(read_raw(folder), f"{folder}/config.json")
    place = lambda _, x: jax.tree.map(jnp.asarray, x) if is_kept(x) else jnp.asarray(x, dtype)
    params = load_parameters(folder, model, place)
    return model, attach(params, numerics)


def save_hf(
    model: Transformer,
    params: Any,
    folder: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
    ternary: str = "",
) -> None:
    """A model -> a new Hugging Face folder that transformers' AutoModelForCausalLM opens (docs/models.md: which).

    Args:
      params: a tree of plain floating-point arrays, or as BITNET makes it, or with PackedTernary in its places; each is
        fetched to the host once.
      dtype: of the files; None keeps each weight's own.
      max_shard_bytes: no file is larger, unless a single tensor is.
      tokenizer_from: a folder whose tokenizer, chat template and generation defaults come along.
      ternary: the form that ternary weights are written in (bitnet.py); by default they lose nothing: "online" as
        latents, "autobitlinear" if packed.

    Raises UserError if the folder exists, if no Hugging Face architecture represents the model, or if `tokenizer_from`
    has no tokenizer. The folder stands under its name only when it is whole.
    """
    plain = _masters(model.config, params)
    weights: Weights = of_params(model.config, plain, "params")
    if plain is not params:
        weights = Latents(weights, BITNET)
    form = ternary_form(weights, ternary or ("online" if plain is not params else "autobitlinear"))
    if ternary and not form:
        raise UserError(f"ternary = {ternary!r}: found no ternary weights")
    if dtype is not None:
        weights = Cast(weights, np.dtype(dtype))
    folder, source = Path(folder), None if tokenizer_from is None else Path(tokenizer_from)
    if folder.exists():
        raise UserError(f"{folder}: found something there already; expected a new folder")
    with beside(folder) as (new, _):
        if source is not None and not copy_companions(source, new):
            raise UserError(f"tokenizer_from={source}: found no tokenizer there; expected a folder with one")
        write_folder(weights, export_keys(weights, None, source, form), new, max_shard_bytes)
        new.rename(folder)


def _masters(config: ModelConfig, params: Any) -> Any:
    """The plain arrays behind a tree that BITNET was attached to, or the tree as it is."""
    ternary = lambda leaf: isinstance(leaf, Ternary)
    if not any(map(ternary, jax.tree.leaves(params, is_leaf=ternary))):
        return params
    plain = jax.tree.map(lambda leaf: leaf.latent if ternary(leaf) else leaf, params, is_leaf=ternary)
    if not config.sub_norms or _structure(attach(plain, BITNET)) != _structure(params):
        expected = "plain arrays, or those of a model with sub_norms, ternary in all layers of the blocks"
        raise UserError(f"params: found ternary weights, expected {expected}")
    return plain


def ternary_form(weights: Weights, wanted: str) -> str:
    """The form that weights go to Hugging Face in: the wanted one, or "" where none are ternary.

    Raises UserError where only some of the blocks' matrices are, or where there are no latents for "online".
    """
    if not holds_ternary(weights):
        return ""
    found = ternary_names(weights)
    expected = {name for name in piece_shapes(weights.config) if is_ternary_name(name)}
    if differ := sorted(expected ^ found):
        told = f"found {differ[0]} {'ternary' if differ[0] in found else 'not ternary in every layer'}"
        raise UserError(
            f"{weights.place}: {told}; Hugging Face's formats have all layers of the blocks ternary, or none"
        )
    if wanted == "online" and weights.packed_names:
        raise UserError(f"{weights.place}: found packed ternary weights, expected latents for the form 'online'")
    return wanted


def _structure(tree: Any) -> str:
    return str(jax.tree.structure(tree))


def export_keys(
    weights: Weights,
    original: Mapping[str, Any] | None,
    companions: Path | None = None,
    form: str = "",
) -> dict[str, Any]:
    """The config.json of these weights.

    Args:
      original: that of the model they came from, which says what its special tokens are.
      companions: the folder that says so where there is no original.
      form: of ternary weights, by `ternary_form`.
    """
    raw = export_config(weights.config, original, weights.place, form)
    if original is None and companions is not None:
        raw |= token_ids(companions)
    return {**raw, "torch_dtype": weights.dtype("embed_tokens/embedding").name}


def token_ids(folder: Path) -> dict[str, int | list[int] | None]:
    """bos_token_id, eos_token_id and pad_token_id as generation_config.json has them, else as the tokenizer has them;
    None where neither does."""
    path = folder / "generation_config.json"
    told = read_json(path) if path.is_file() else {}
    if not isinstance(told, dict):
        raise UserError(f"{path}: found {type(told).__name__}, expected an object of keys")
    ids: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    if any((folder / name).is_file() for name in FILES):
        words = load_tokenizer(folder)
        ids = dict(zip(TOKEN_IDS, (words.bos_id, words.eos_id, words.pad_id), strict=True))
    return ids | {key: told[key] for key in TOKEN_IDS if told.get(key) is not None}


def write_folder(
    weights: Weights,
    raw: Mapping[str, Any],
    folder: Path,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda _: None,
) -> None:
    """Writes the safetensors of `raw`'s architecture into a folder that is there, and last, config.json."""
    table, form = ARCHITECTURES[architecture(raw, weights.place)], stated_form(raw, weights.place)
    packed = form if form in PACKED else ""
    write_tensors(weights, table, lambda groups: ShardWriter(folder, groups, max_shard_bytes), progress, packed)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def open_weights(folder: str | Path, config: ModelConfig | None = None, *, pickled: bool = False) -> Translated:
    """The weights of a folder. `pickled`: also those in PyTorch's own format, where there is no other."""
    folder, raw = Path(folder), read_raw(folder)
    name = architecture(raw, f"{folder}/config.json")
    config = config or parse_config(raw, f"{folder}/config.json")
    tensors = _open(folder, pickled)
    if name == "GPT2LMHeadModel" and "wte.weight" in tensors.names():
        tensors = Renamed(tensors, "transformer.")  # as OpenAI's own files were published
    if (form := stated_form(raw, f"{folder}/config.json")) in PACKED:
        tensors = PackedTensors(tensors, form, _ternary_tensors(ARCHITECTURES[name], config, tensors.place))
    copies = {"lm_head.weight"} if config.tie_embeddings else set()
    ignored = lambda tensor: tensor in copies or re.search(DERIVED, tensor) is not None
    weights = Translated(tensors, ARCHITECTURES[name], config, ignored)
    for copy in copies & tensors.names():
        _same_rows(weights.read(("embed_tokens/embedding",), ())[0], tensors.read(copy), f"{folder}: {copy}")
    return weights


def _ternary_tensors(table: Table, config: ModelConfig, place: str) -> dict[str, tuple[int, ...]]:
    """The shapes of their tensors that transformers' formats make ternary, by name."""
    shapes = piece_shapes(config)
    rules = [rule for rule in rules_for(table, shapes, place) if is_ternary_name(rule.ours[0])]
    return {
        name: shape
        for rule in rules
        for index in indices(rule.ours[0], config)
        for name, shape in zip(their_names(rule, index), their_shapes(rule, shapes, config), strict=True)
    }


def _same_rows(embedding: np.ndarray, copy: np.ndarray, place: str, rows: int = 4096) -> None:
    """An error unless a head that is stored beside a tied embedding is the embedding; some rows at a time."""
    parts = (slice(i, i + rows) for i in range(0, len(embedding), rows))
    same = lambda part: np.array_equal(embedding[part].astype(np.float32), copy[part].astype(np.float32))
    if copy.shape != embedding.shape or not all(map(same, parts)):
        raise UserError(f"{place} is not the embedding; expected the same weights under tie_word_embeddings true")


def _pickles(folder: Path) -> list[Path]:
    """Weights in PyTorch's own format: those that the index names, or pytorch_model.bin, or whatever there is."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        return indexed(index)
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
    advice = "; --allow_pickle of easylm_plus.convert reads it without running it" if pickles else ""
    raise UserError(f"{folder}: found {found}; expected *.safetensors{advice}")


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
            if names[0] in weights.packed_names:
                for key, leaf in _packed(weights, names[0]).items():
                    put(tree, key, place(key, leaf))
                continue
            arrays = {key: np.empty(shapes[key], weights.dtype(name)) for key, name in keys.items()}
            each(partial(_fill, arrays, weights, names), indices(names[0], config))
            for key in sorted(arrays):
                put(tree, key, place(key, arrays[key]))
    return tree


def _packed(weights: Weights, name: str) -> dict[str, PackedTernary]:
    """Name in the tree -> a weight of `packed_names`, stacked or not, on the host."""
    found: dict[str, list[PackedTernary]] = {}
    for index in indices(name, weights.config):
        piece = weights.ternary(name, index)
        assert piece is not None, name
        leaf = PackedTernary(pack(piece[0]), np.asarray(piece[1], np.float32), len(piece[0]))  # type: ignore[arg-type]
        found.setdefault(stored(name, index, weights.config.scan_layers)[0], []).append(leaf)
    stack = lambda *parts: np.stack(parts) if weights.config.scan_layers else parts[0]
    return {key: jax.tree.map(stack, *leaves) for key, leaves in found.items()}


def _fill(arrays: Mapping[str, np.ndarray], weights: Weights, names: Names, index: Index) -> None:
    for name, piece in zip(names, weights.read(names, index), strict=True):
        key, inner = stored(name, index, weights.config.scan_layers)
        copy_into(arrays[key][inner] if inner else arrays[key], piece)
