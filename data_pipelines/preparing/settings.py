"""What a configuration of `prepare` says, checked: its sources with their files, and the stages of each.

The configuration is an ml_collections.ConfigDict (configs/data/koala.py is one):

    sources.<name>   kind (the module in data_pipelines/sources, by default the name), weight (a whole number for the
                     mixture; 0: in proportion to the examples), limit (rows kept in reading), max_turn_chars, stages
                     (stage -> options over those of all sources, or False to leave the stage out); for files
                     patterns, repair, separator; the options of the module's `convert` or `generate`
    weigh            what weights are shares of: "examples" or "tokens"
    stages           stage -> options; a stage that is not named is left out. Besides its own options `decontaminate`
                     has benchmarks (name -> files, see `eval_items`), their folder, and items (see
                     `contamination.index`)
    keep             names of sources: of duplicates that of the first of these is kept; the others follow by name
    heldout          share of the prompts that is held out
    policy           "skip" or "error": what a row that does not fit does
    missing          "error", or "skip" to go on without the sources that have no file
    max_turn_chars   characters of a turn, at most
    tokenizer        train, vocab_size, special_tokens: trained on the train splits of all sources
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from data_pipelines import sources, stages
from data_pipelines.errors import known_key
from data_pipelines.files.folder import Folder
from data_pipelines.stages.source import COMMON, FOR_FILES, PrepareError, Source, own_options

KEYS = ("sources", "weigh", "stages", "keep", "heldout", "policy", "missing", "max_turn_chars", "tokenizer")
MAX_TURN_CHARS = 200_000  # by default


def read_settings(config: ConfigDict) -> dict[str, Any]:
    """The configuration as plain JSON values, with defaults; PrepareError for what does not fit."""
    settings: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    known_key(settings, KEYS, "config: ")
    if not settings.get("sources"):
        raise PrepareError("config.sources: found none; expected a source or more")
    choices = {"policy": ("skip", "error"), "missing": ("error", "skip"), "weigh": ("examples", "tokens")}
    for key, known in choices.items():
        if settings.setdefault(key, known[0]) not in known:
            raise PrepareError(f"config.{key}: found {settings[key]!r}; expected {known[0]!r} or {known[1]!r}")
    heldout = settings.setdefault("heldout", 0.0)
    if not isinstance(heldout, int | float) or not 0 <= heldout < 1:
        raise PrepareError(f"config.heldout: found {heldout!r}; expected a share from 0 to below 1")
    settings.setdefault("max_turn_chars", MAX_TURN_CHARS)
    check_names(settings["sources"])
    check_weights({name: options.get("weight") or 0 for name, options in settings["sources"].items()})
    check_numbers(settings, "config")
    check_tokenizer(settings.get("tokenizer") or {})
    settings.setdefault("stages", {})
    check_stages(settings["stages"], "config.stages")
    known_key(settings.setdefault("keep", []), list(settings["sources"]), "config.keep: ")
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
    known = [*COMMON, *(() if generated else FOR_FILES), *own_options(module)]
    known_key(options, known, f"sources.{name}: ")
    check_numbers(options, f"sources.{name}")
    source = Source(name, kind, options, stages_of(name, settings), folder, ())
    return source if generated else dataclasses.replace(source, files=find_files(source))


def check_stages(chosen: Mapping[str, Any], where: str) -> None:
    known_key(chosen, stages.CONFIGURED, f"{where}: ")
    for stage, options in chosen.items():
        if not (options is False or isinstance(options, Mapping)):
            raise PrepareError(f"{where}.{stage}: found {options!r}; expected options as a mapping, or False")


def check_names(names: Iterable[str]) -> None:
    """Raises PrepareError for a source whose folder would be another's, or none."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in ("tokenizer", "tokens"):
            expected = "letters, digits, '_', '-' and '.', and neither 'tokenizer' nor 'tokens'"
            raise PrepareError(f"config.sources: found the name {name!r}; expected {expected}")


def check_weights(weights: Mapping[str, Any]) -> None:
    """Weights for some sources only have no common scale with the sizes of the others."""
    if any(weights.values()) and (missing := [name for name, weight in weights.items() if not weight]):
        raise PrepareError(f"config.sources: found no weight for {', '.join(missing)}; expected one for all, or none")


def check_tokenizer(options: Mapping[str, Any]) -> None:
    known_key(options, ("train", "vocab_size", "special_tokens"), "config.tokenizer: ")
    if options.get("train") and not isinstance(options.get("vocab_size"), int):
        raise PrepareError(f"config.tokenizer.vocab_size: found {options.get('vocab_size')!r}; expected a whole number")
    if isinstance(options.get("special_tokens"), str):
        raise PrepareError(f"config.tokenizer.special_tokens: found {options['special_tokens']!r}; expected a list")


def check_numbers(options: Mapping[str, Any], where: str) -> None:
    for key in ("weight", "limit", "max_turn_chars"):
        number = options.get(key) or 0
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise PrepareError(f"{where}.{key}: found {number!r}; expected a whole number, 0 or more")
    separator = options.get("separator") or 1
    if separator != "\n" and ("\n" in separator if isinstance(separator, str) else separator < 1):
        expected = "a number of empty lines, 1 or more, or a mark without line breaks"
        raise PrepareError(f"{where}.separator: found {separator!r}; expected {expected}")
    if isinstance(options.get("patterns"), str):
        raise PrepareError(f"{where}.patterns: found {options['patterns']!r}; expected a list of them")


def stages_of(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """stage -> options of a source, in the order in which it goes through them."""
    own = settings["sources"][name].get("stages") or {}
    check_stages(own, f"sources.{name}.stages")
    chosen: dict[str, dict[str, Any]] = {}
    for stage in stages.CONFIGURED:
        here = own.get(stage, settings["stages"].get(stage, False))
        if here is not False:
            chosen[stage] = {**(settings["stages"].get(stage) or {}), **(here or {})}
            if stage != "decontaminate":  # it needs an index that is yet to be made
                made_of(name, stage, chosen[stage])
    return {**chosen, "split": {"heldout": settings["heldout"]}}


def made_of(name: str, stage: str, options: Mapping[str, Any]) -> None:
    """Raises PrepareError for options of which no stage can be made."""
    try:
        stages.make(stage, options)
    except ValueError as error:
        raise PrepareError(f"sources.{name}, stage {stage}: {error}") from error


def by_rank(planned: Sequence[Source], settings: Mapping[str, Any]) -> list[Source]:
    """Those that `keep` names, in its order, then the others in theirs: of duplicates the first is kept."""
    first = list(settings["keep"])
    return sorted(planned, key=lambda source: first.index(source.name) if source.name in first else len(first))


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
        try:
            file.encode()
        except UnicodeEncodeError as error:
            raise PrepareError(f"sources.{name}: found the file name {file!r}; expected one in UTF-8") from error
        other = stems.setdefault(sources.stem(file), file)
        if other != file:
            raise PrepareError(f"sources.{name}: found {other} and {file}, whose rows would get the same ids; take one")
