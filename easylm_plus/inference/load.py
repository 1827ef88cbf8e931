"""Opens whatever a model was saved as: a run's checkpoint, a Hugging Face folder, a llama2.c file."""

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batches.training_data import template_date
from data_pipelines.templates.template import Template, load_template
from data_pipelines.tokenizers.tokenizer import Tokenizer, load_tokenizer
from easylm_plus.errors import UserError
from easylm_plus.inference.chat import Chatter
from easylm_plus.inference.generate import Generator
from easylm_plus.interop.configs import read_raw, stated_rules
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.interop.peft import beside, read_adapters
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, unstack_layers
from easylm_plus.numerics.deploy import all_served, frozen, is_packed
from easylm_plus.numerics.kernels import choice
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.rules import attach, for_use
from easylm_plus.training.checkpoint import locate, read_meta, read_parameters


class Opened(NamedTuple):
    """A model that can be talked to, and where it came from."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    template: Template
    config: dict[str, Any]  # the run's resolved config; empty for other people's files
    place: str

    def chatter(self, stop: tuple[str, ...] = ()) -> Chatter:
        """The model as something that answers."""
        generator = Generator(self.model, self.params, self.template.stop_ids)
        return Chatter(generator, self.tokenizer, self.template, stop)


def open_model(
    path: str | Path,
    *,
    step: int | None = None,
    tokenizer: str = "",
    template: str = "",
    adapter: str = "",
    kv_cache: str = "",
) -> Opened:
    """Opens a run's folder (its last step, or `step`), a Hugging Face folder, or a llama2.c .bin file.

    `tokenizer` and `template` replace those of the checkpoint; other people's files need a template where they
    bring none. `adapter`: a folder of PEFT's, whose adapters go beside the weights, whatever these are kept as.
    `kv_cache` replaces the key of that name in the model's config.
    """
    opened = _opened(Path(path), step, tokenizer, template)
    model, params = opened.model, frozen(opened.params)
    if is_packed(params):
        model, params = unrolled(model, params)
    if adapter:
        adapters = read_adapters(adapter, model.config, _original(Path(path), step))
        params = jax.device_put(beside(params, adapters, model.config))
    if kv_cache:
        model = model.clone(config=dataclasses.replace(model.config, kv_cache=kv_cache))
    return opened._replace(model=model, params=params)


def _original(path: Path, step: int | None) -> dict[str, Any] | None:
    """The config.json that the weights have, or once had."""
    if (path / "config.json").is_file():
        return read_raw(path)
    return None if path.is_file() else read_meta(*locate(path, step)).get("config.json")


def _opened(path: Path, step: int | None, tokenizer: str, template: str) -> Opened:
    if not path.exists():
        raise UserError(f"{path}: not found; expected a run's log.dir, a Hugging Face folder or a llama2.c file")
    if path.is_file():
        model, params = load_llama2c(path)
        words = load_tokenizer(tokenizer or path.parent / "tokenizer.model")
        layout = _template(template or "text", words, model.config.max_length, datetime.now())
        return Opened(model, params, words, layout, {}, str(path))
    if (path / "config.json").is_file():
        model, params = load_hf(path, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        words = load_tokenizer(tokenizer or path)
        layout = _template(template or "tokenizer", words, model.config.max_length, datetime.now())
        return Opened(model, params, words, layout, {}, str(path))
    directory, step = locate(path, step)
    meta = read_meta(directory, step)
    config, original = meta["config"], meta.get("config.json")  # of the folder that it was converted from, if it was
    model = Transformer(ModelConfig(**config["model"]), precision(config["numerics"]["precision"]))
    params = read_parameters(directory, step, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    stated = stated_rules(original, f"{directory}/{step}: config.json") if original else ()
    params = attach(all_served(params), stated or for_use(config["numerics"].get("rules", ())))
    words = load_tokenizer(tokenizer or directory / "tokenizer")
    now = template_date(config["data"].get("date", ""))
    layout = _template(template or config["data"]["template"], words, config["data"]["length"], now)
    return Opened(model, params, words, layout, config, f"{directory}/{step}")


def unrolled(model: Transformer, params: Any) -> tuple[Transformer, Any]:
    """The same model layer by layer: a scan would copy each layer's codes out of the stack for every token."""
    if not model.config.scan_layers:
        return model, params
    return model.clone(config=dataclasses.replace(model.config, scan_layers=False)), unstack_layers(params)


def told(params: Any) -> str:
    """What multiplies by the packed weights that a model has, in one line; "" if it has none."""
    return f"ternary products: {choice.told()}" if is_packed(params) else ""


def _template(name: str, tokenizer: Tokenizer, length: int, now: datetime | None) -> Template:
    """A template whose examples fit rows of `length` positions."""
    return load_template(name, tokenizer, max_length=length + 1, now=now)
