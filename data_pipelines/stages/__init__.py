"""The stages between the files and the dataset, one module each: read, tools, normalise, filter, dedupe, decontaminate,
redact, split. `base` says what a stage is, `chunk` what flows through them, `source` where that comes from; the others
are what the stages are made of.

Every sample goes through them in the order of CONFIGURED, as far as the configuration names them, between `read` and
`split`, which are always there. Two need more than the sample at hand: `dedupe` compares all samples of all sources,
and `decontaminate` looks things up in an index of the evaluation files; what they need is made before them, and given
to them as an option.
"""

import functools
import importlib
import json
from collections.abc import Mapping
from typing import Any

from data_pipelines.stages.base import Stage

CONFIGURED = ("tools", "normalise", "filter", "dedupe", "decontaminate", "redact")


def module_of(stage: str) -> str:
    return f"{__name__}.{stage}"


def make(stage: str, options: Mapping[str, Any]) -> Stage:
    """The stage with these options; the same object for the same ones. Raises InputError for what does not fit."""
    return _made(stage, json.dumps(options, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _made(stage: str, options: str) -> Stage:
    cls: type[Stage] = getattr(importlib.import_module(module_of(stage)), stage.capitalize())
    return cls(json.loads(options))
