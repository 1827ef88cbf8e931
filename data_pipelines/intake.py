"""One source of a configuration: which files it has, and the conversations that come out of them, with accounts."""

import difflib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from ml_collections import ConfigDict

from data_pipelines import sources
from data_pipelines.conversation import Conversation, DataError, Where
from data_pipelines.errors import InputError
from data_pipelines.records import read_rows

KEYS = ("sources", "heldout", "policy", "missing", "max_turn_chars", "tokenizer")
MAX_TURN_CHARS = 200_000  # by default

COMMON = ("kind", "weight", "limit", "drop_phrases", "max_turn_chars")
FOR_FILES = ("patterns", "repair", "separator")

OpenRaw = Callable[[Path], BinaryIO]
Placed = tuple[str, Conversation]  # split, conversation


class PrepareError(InputError):
    """A configuration or an input folder that cannot be prepared, in one line."""


@dataclass
class Accounts:
    """rows = kept_rows + the sum of rejected. Repaired rows are among the kept ones."""

    rows: int = 0
    kept_rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    first: DataError | None = None


@dataclass
class Source:
    """A source as the configuration has it. `files` are paths under `folder`; none if the source makes its text up."""

    name: str
    module: ModuleType
    options: Mapping[str, Any]
    folder: Path
    files: list[Path]

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
    return settings


def plan(name: str, options: Mapping[str, Any], folder: Path) -> Source:
    """Finds the module and the files of a source. Raises PrepareError for options that it does not have."""
    try:
        module = sources.load(options.get("kind") or name)
    except ValueError as error:
        raise PrepareError(f"sources.{name}.{error}") from error
    source = Source(name, module, options, folder, [])
    known = [*COMMON, *(inspect.signature(module.generate).parameters if source.generated else FOR_FILES)]
    known_key(options, known, f"sources.{name}")
    weight = options.get("weight") or 0
    if not isinstance(weight, int) or weight < 0:
        raise PrepareError(f"sources.{name}.weight: found {weight!r}; expected a whole number, 0 or more")
    if not source.generated:
        source.files = find_files(folder, source.patterns, name)
    return source


def known_key(options: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise PrepareError(f"{where}: found the key {key!r}; expected one of {', '.join(known)}{hint}")


def find_files(folder: Path, patterns: tuple[str, ...], name: str) -> list[Path]:
    """The files under `folder` that match a pattern and none of the "!patterns", in the order of their names."""
    try:
        found = {path for pattern in patterns if pattern[:1] != "!" for path in folder.glob(pattern)}
        found -= {path for pattern in patterns if pattern[:1] == "!" for path in folder.glob(pattern[1:])}
    except (ValueError, NotImplementedError) as error:
        raise PrepareError(f"sources.{name}.patterns: found {patterns}; expected relative globs ({error})") from error
    files = sorted(path.relative_to(folder) for path in found if path.is_file())
    stems: dict[str, Path] = {}
    for file in files:
        try:
            file.as_posix().encode()
        except UnicodeEncodeError as error:
            raise PrepareError(f"sources.{name}: found the file name {str(file)!r}; expected one in UTF-8") from error
        other = stems.setdefault(sources.stem(file), file)
        if other != file:
            raise PrepareError(f"sources.{name}: found {other} and {file}, whose rows would get the same ids; take one")
    return files


class Intake:
    """Iterates over (split, conversation) of a source, and keeps the accounts.

    `on_reject` gets every error; it may raise it. `heldout` is the share of rows that a hash of their id puts aside:
    all conversations of a row lie in the same split, so that an answer is not trained on whose rival is held out.
    """

    def __init__(self, source: Source, heldout: float, max_turn_chars: int, on_reject: Callable[[DataError], None]):
        self.source, self.heldout, self.on_reject = source, heldout, on_reject
        self.max_turn_chars = source.options.get("max_turn_chars") or max_turn_chars
        self.phrases = tuple(phrase.lower() for phrase in source.options.get("drop_phrases") or ())
        self.accounts = Accounts()

    def __call__(self, open_raw: OpenRaw) -> Iterator[Placed]:
        limit = self.source.options.get("limit") or float("inf")
        rows = self.generated_rows() if self.source.generated else self.file_rows(open_raw)
        for placed in rows:
            self.accounts.kept_rows += 1
            yield from placed
            if self.accounts.kept_rows >= limit:
                return

    def file_rows(self, open_raw: OpenRaw) -> Iterator[list[Placed]]:
        separator: Any = self.source.options.get("separator") or getattr(self.source.module, "SEPARATOR", 1)
        for file in self.source.files:
            raw = open_raw(self.source.folder / file)
            rows = read_rows(file, name=file.as_posix(), raw=raw, on_error=self.unreadable, separator=separator)
            for where, row in rows:
                self.accounts.rows += 1
                try:
                    conversations, repairs = self.convert(row, where)
                    self.check(conversations, where)
                except DataError as error:
                    self.reject(error)
                    continue
                self.accounts.repaired.update(repairs)
                split = self.split(sources.row_id(where))
                yield [(split, replace(conversation, source=self.source.name)) for conversation in conversations]

    def generated_rows(self) -> Iterator[list[Placed]]:
        options = {key: value for key, value in self.source.options.items() if key not in COMMON}
        for number, made in enumerate(self.source.module.generate(**options), start=1):
            self.accounts.rows += 1
            split, conversation = made if isinstance(made, tuple) else (self.split(made.id), made)
            try:
                self.check([conversation], Where(f"<{self.source.name}>", number))
            except DataError as error:
                self.reject(error)
                continue
            yield [(split, replace(conversation, source=self.source.name))]

    def convert(self, row: sources.Row, where: Where) -> tuple[list[Conversation], list[str]]:
        """Conversations, and the repairs that made them fit; DataError if nothing does."""
        repairs: Mapping[str, Callable[[sources.Row], sources.Row]] = {}
        if self.source.options.get("repair", True):
            repairs = getattr(self.source.module, "REPAIRS", {})
        done: list[str] = []
        while True:
            try:
                return self.source.module.convert(row, where), done
            except DataError as error:
                if error.reason not in repairs or error.reason in done:
                    raise
                row = repairs[error.reason](row)
                done.append(error.reason)
            except Exception as error:
                error.add_note(f"while {self.source.module.__name__} converted {where}")
                raise

    def check(self, conversations: list[Conversation], where: Where) -> None:
        for conversation in conversations:
            sources.check(conversation, where, self.max_turn_chars)
            for number, turn in enumerate(conversation.turns, start=1):
                lower = turn.text.lower() if self.phrases else ""
                for phrase in self.phrases:
                    if phrase in lower:
                        found, here = f"the phrase {phrase!r}", sources.at(where, number)
                        raise sources.Filtered(here, found, "none of the drop_phrases", "drop_phrase")

    def split(self, row_id: str) -> str:
        share = sources.stable_hash(f"{self.source.name}:{row_id}") / 2**64
        return "heldout" if share < self.heldout else "train"

    def unreadable(self, error: DataError) -> None:
        self.accounts.rows += 1
        self.reject(error)

    def reject(self, error: DataError) -> None:
        self.accounts.rejected[error.reason] += 1
        self.accounts.first = self.accounts.first or error
        self.on_reject(error)
