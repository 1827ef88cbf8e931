"""What a configuration of `prepare` says, checked: its sources with their files, and the stages of each.

The configuration is an ml_collections.ConfigDict (configs/data/koala.py is one):

    sources.<name>   kind (the module in data_pipelines/sources, by default the name), weight (a whole number for the
                     mixture; 0: in proportion to the examples), limit (rows kept in reading), max_turn_chars, stages
                     (stage -> options over those of all sources, or False to leave the stage out); for files
                     patterns, repair, separator; for sources that make their text up the arguments of their `generate`
    stages           stage -> options; a stage that is not named is left out
    heldout          share of the prompts that is held out
    policy           "skip" or "error": what a row that does not fit does
    missing          "error", or "skip" to go on without the sources that have no file
    max_turn_chars   characters of a turn, at most
    tokenizer        train, vocab_size, special_tokens: trained on the train splits of all sources
"""

import difflib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from data_pipelines import sources, stages
from data_pipelines.errors import InputError
from data_pipelines.files import Folder

KEYS = ("sources", "stages", "heldout", "policy", "missing", "max_turn_chars", "tokenizer")
MAX_TURN_CHARS = 200_000  # by default

COMMON = ("kind", "weight", "limit", "max_turn_chars", "stages")
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

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(self.options.get("patterns") or self.module.PATTERNS)


def read_settings(config: ConfigDict) -> dict[str, Any]:
    """The configuration as plain JSON values, with defaults; PrepareError for what does not fit."""
    settings: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    known_key(settings, KEYS, "config")
    if not settings.get("sources"):
        raise PrepareError("config.sources: found none; expected a source or more")
    for key, default in (("policy", "skip"), ("missing", "error")):
        if settings.setdefault(key, default) not in ("skip", "error"):
            raise PrepareError(f"config.{key}: found {settings[key]!r}; expected 'skip' or 'error'")
    heldout = settings.setdefault("heldout", 0.0)
    if not isinstance(heldout, int | float) or not 0 <= heldout < 1:
        raise PrepareError(f"config.heldout: found {heldout!r}; expected a share from 0 to below 1")
    settings.setdefault("max_turn_chars", MAX_TURN_CHARS)
    settings.setdefault("stages", {})
    known_key(settings["stages"], stages.CONFIGURED, "config.stages")
    return settings


def plan_all(settings: Mapping[str, Any], input_dir: str | None) -> tuple[list[Source], dict[str, Any]]:
    """The sources that there are, and of the others (name -> patterns, origin)."""
    folder = Folder(input_dir or ".")
    planned = [plan(name, settings, folder) for name in settings["sources"]]
    absent = [source for source in planned if not source.generated and (input_dir is None or not source.files)]
    missing = {source.name: {"patterns": list(source.patterns), "origin": source.module.ORIGIN} for source in absent}
    present = [source for source in planned if source.name not in missing]
    if missing and (settings["missing"] == "error" or not present):
        lines = [f"{name}: {', '.join(m['patterns'])}; from {m['origin']}" for name, m in missing.items()]
        found = f"found no files for {len(missing)} of {len(planned)} sources; expected"
        place = "no input folder" if input_dir is None else folder.url
        raise PrepareError(f"{place}: {found}\n  " + "\n  ".join(lines))
    return present, missing


def plan(name: str, settings: Mapping[str, Any], folder: Folder) -> Source:
    """Finds the module and the files of a source. Raises PrepareError for options that it does not have."""
    options = settings["sources"][name]
    kind = options.get("kind") or name
    try:
        module = sources.load(kind)
    except ValueError as error:
        raise PrepareError(f"sources.{name}.{error}") from error
    generated = hasattr(module, "generate")
    known = [*COMMON, *(inspect.signature(module.generate).parameters if generated else FOR_FILES)]
    known_key(options, known, f"sources.{name}")
    weight = options.get("weight") or 0
    if not isinstance(weight, int) or weight < 0:
        raise PrepareError(f"sources.{name}.weight: found {weight!r}; expected a whole number, 0 or more")
    source = Source(name, kind, options, stages_of(name, settings), folder, ())
    return source if generated else Source(**{**vars(source), "files": find_files(source)})


def stages_of(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """stage -> options of a source, in the order in which it goes through them."""
    own = settings["sources"][name].get("stages") or {}
    known_key(own, stages.CONFIGURED, f"sources.{name}.stages")
    chosen: dict[str, dict[str, Any]] = {}
    for stage in stages.CONFIGURED:
        if (stage in settings["stages"] or stage in own) and own.get(stage) is not False:
            chosen[stage] = {**(settings["stages"].get(stage) or {}), **(own.get(stage) or {})}
            try:
                stages.make(stage, chosen[stage])
            except ValueError as error:
                raise PrepareError(f"sources.{name}, stage {stage}: {error}") from error
    return {**chosen, "split": {"heldout": settings["heldout"]}}


def known_key(options: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise PrepareError(f"{where}: found the key {key!r}; expected one of {', '.join(known)}{hint}")


def find_files(source: Source) -> tuple[str, ...]:
    """The source's files, in the order of their names."""
    try:
        files = source.folder.glob(source.patterns)
    except ValueError as error:
        raise PrepareError(f"sources.{source.name}.patterns: {error}") from error
    one_stem_each(source.name, files)
    return tuple(files)


def one_stem_each(name: str, files: Iterable[str]) -> None:
    stems: dict[str, str] = {}
    for file in files:
        other = stems.setdefault(sources.stem(file), file)
        if other != file:
            raise PrepareError(f"sources.{name}: found {other} and {file}, whose rows would get the same ids; take one")
