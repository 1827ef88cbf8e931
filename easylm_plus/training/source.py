"""Weights of any format, opened to be converted: a run of ours, a Hugging Face folder, files of EasyLM and llama2.c."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easylm_plus.errors import UserError
from easylm_plus.interop import difference
from easylm_plus.interop.configs import read_raw, stated_rules
from easylm_plus.interop.easylm import EASYLM, EasyLMStream
from easylm_plus.interop.huggingface import open_weights
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.interop.translate import Translated
from easylm_plus.interop.weights import Latents, Weights, indices, of_params, stored
from easylm_plus.models.families import preset
from easylm_plus.numerics.lora import LowRank
from easylm_plus.training.checkpoint import locate, read_adapters, steps
from easylm_plus.training.stream import open_checkpoint

KINDS = ("hf", "easylm_plus", "easylm", "llama2c")
OTHERS = ("*.safetensors", "*.bin", "*.pth", "*.pt")  # weights that a folder may hold


class Source(NamedTuple):
    """What is converted."""

    weights: Weights
    original: Mapping[str, Any] | None  # its config.json, if it has or once had one
    companions: Path | None  # the folder of its tokenizer
    run: Mapping[str, Any] | None = None  # the config of the run that made it, or of it what is known
    adapters: Mapping[str, LowRank] | None = None  # of the run, by the names of its weights, if they were asked for


def open_source(
    path: Path,
    kind: str | None = None,
    step: int | None = None,
    *,
    model: str = "",
    pickled: bool = False,
    apart: bool = False,
) -> Source:
    """Opens weights of any format.

    Args:
      kind: a format in KINDS; None: what it looks like.
      step: of a run of ours; None: the last.
      model: the preset that a file of EasyLM's holds.
      pickled: also PyTorch's own format, where there is no other.
      apart: hand out a run's adapters beside its weights, not as part of them, which they cannot be of ternary ones.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; expected weights")
    if path.is_file() and _is_part_of_a_folder(path):
        pickle = "" if path.suffix == ".safetensors" else " --allow_pickle"
        expected = f"--input=FOLDER{pickle}, the folder with it and the model's config.json"
        raise UserError(f"{path}: found tensors without a config; expected {expected}")
    kind = kind or kind_of(path)
    if kind == "difference":
        raise UserError(f"{path}: found a difference; expected --recover --diff_base=BASE with it")
    if kind == "hf":
        raw = read_raw(path)
        weights: Weights = open_weights(path, pickled=pickled)
        return Source(with_ternary(weights, stated_rules(raw, f"{path}/config.json")), raw, path)
    if kind == "easylm_plus":
        weights, meta, directory = open_checkpoint(path, step)
        original, run = meta.get("config.json"), meta["config"]
        rules = stated_rules(original, f"{path}: config.json") if original else ()
        rules = rules or run.get("numerics", {}).get("rules", ())
        ternary = with_ternary(weights, rules)
        if not apart and (found := _adapted(ternary, meta.get("leaves", {}))):
            raise UserError(f"{path}: found an adapter of {found}, which is ternary; the two cannot be merged")
        adapters = read_adapters(*locate(path, step)) if apart else None
        return Source(ternary, original, directory / "tokenizer", run, adapters)
    if kind == "llama2c":
        small, params = load_llama2c(path)
        return Source(of_params(small.config, params, str(path)), None, None)
    if not model:
        raise UserError(f"--model is not set; expected the preset that {path} holds, which the file does not say")
    stream = EasyLMStream(path)
    return Source(Translated(stream, EASYLM, preset(model), lambda _: False), None, None)


def _adapted(weights: Weights, leaves: Mapping[str, Any]) -> str:
    """A ternary weight of a run's checkpoint that has an adapter, by how its leaves are described, or ""."""
    for name in (name for names in weights.groups for name in names):
        for index in indices(name, weights.config):
            key = stored(name, index, weights.config.scan_layers)[0]
            if leaves.get(f"params/{key}", {}).get("type") == "LowRank" and weights.is_ternary(name, index):
                return name
    return ""


def with_ternary(weights: Weights, rules: Sequence[str]) -> Weights:
    """Weights that tell which of them are ternary, by rules (numerics/rules.py)."""
    return Latents(weights, rules) if any(rule.endswith("=ternary") for rule in rules) else weights


def kind_of(path: Path) -> str:
    """What weights look like: a kind that --from knows, or "difference"."""
    if not path.exists():
        raise UserError(f"{path}: not found; expected weights")
    if path.is_dir():
        if (path / difference.FILE).is_file():
            return "difference"
        if (path / "config.json").is_file():
            return "hf"
        weights = sorted(file for pattern in OTHERS for file in path.glob(pattern))
        if weights and not any(steps(place) for place in (path, path / "checkpoints")):
            raise UserError(
                f"{path}: found {weights[0].name}, but no config.json; expected that of the model beside it"
            )
        return "easylm_plus"
    return "llama2c" if path.suffix == ".bin" else "easylm"


def _is_part_of_a_folder(path: Path) -> bool:
    """Is it a file of tensors by their names: safetensors, or PyTorch's of today (zip) or of before 2020 (a pickle)?"""
    with path.open("rb") as file:
        start = file.read(4)
    return start in (b"PK\x03\x04", b"\x80\x02\x8a\x0a") or path.suffix in (".pt", ".pth", ".safetensors")
