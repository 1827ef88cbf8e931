"""A source as the configuration has it, with its files."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from data_pipelines import sources
from data_pipelines.errors import InputError
from data_pipelines.files.folder import Folder

COMMON = ("kind", "weight", "limit", "max_turn_chars", "stages")  # options of every source
FOR_FILES = ("patterns", "repair", "separator")


class PrepareError(InputError):
    """A configuration or an input folder that cannot be prepared, in one line."""


@dataclass(frozen=True)
class Source:
    """A source as the configuration has it; `files` are paths under `folder`, none if it makes its text up. `stages`
    are the options of each stage that it goes through. Can be sent to another process."""

    name: str
    kind: str
    options: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    folder: Folder
    files: tuple[str, ...]

    @property
    def module(self) -> ModuleType:
        return sources.load(self.kind)

    @property
    def generated(self) -> bool:
        return hasattr(self.module, "generate")

    def parts(self) -> list[tuple[str, ...]]:
        """The files that are read one after the other, by one process: each alone, unless all of them share a limit."""
        whole = self.generated or self.options.get("limit")
        return [self.files] if whole else [(file,) for file in self.files]

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(self.options.get("patterns") or self.module.PATTERNS)


def own_options(module: ModuleType) -> list[str]:
    """The names of the options that a source's module has itself: what its `generate`, or its `convert`, is called by
    name with."""
    if hasattr(module, "generate"):
        return list(inspect.signature(module.generate).parameters)
    parameters = inspect.signature(module.convert).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
