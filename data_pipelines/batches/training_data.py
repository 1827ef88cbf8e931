"""From the `data` section of a run's configuration to its batches: everything but the devices.

A section is any mapping with the keys that easylm_plus/config.py documents, so that what a run read can be looked at
where there is no JAX (`data_pipelines.inspect --run`). Where a store of tokens with the right key lies beside the data
(tokens.py) examples are read from it and nothing is tokenised; the batches are the same.
"""

import datetime
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from data_pipelines import datasets
from data_pipelines.batches import run_mixture
from data_pipelines.batches.batch_stats import Batch
from data_pipelines.batches.examples import Source
from data_pipelines.batches.loader import Loader, evaluation_batches
from data_pipelines.batches.packing import Packing
from data_pipelines.batches.tokens import TokenStore, find, stored
from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.mixing.mixture import Mixture
from data_pipelines.templates.template import Template, load_template
from data_pipelines.templates.text_objective import TextObjective, text_objective
from data_pipelines.tokenizers.tokenizer import Tokenizer, load_tokenizer

Section = Mapping[str, Any]

# Keys of the data section that say what is learned of a text, the same as arguments of `text_objective`.
TEXT_OBJECTIVE = (
    "fim_rate", "fim_spm_rate", "corruption", "corruption_rate", "span_length", "sentinels", "mask_token",
)  # fmt: skip
SURE = 0.98  # of the steps that examples last for, by the lengths of a sample


class Data(NamedTuple):
    """Opened sources, and what turns their conversations into tokens."""

    train: dict[str, Sequence[Conversation]]
    heldout: dict[str, Sequence[Conversation]]
    weights: dict[str, int] | None  # None: in proportion to the examples
    weigh: str  # what the weights are shares of: "examples" or "tokens"
    tokenizer: Tokenizer
    template: Template
    learned: Template | TextObjective  # what makes training examples of conversations
    judged: Template | TextObjective  # what makes held-out examples
    hash: str  # of the data, the tokenizer and the template: what the order of batches depends on
    tokens: dict[str, TokenStore]  # training examples that are tokenised already
    heldout_tokens: dict[str, TokenStore]
    unused_tokens: tuple[str, ...]  # sources whose stored tokens are of other data, another template, length or code

    @property
    def sources(self) -> list[str]:
        """Names in the order of source_ids."""
        return list(self.train)

    @property
    def examples(self) -> dict[str, Source]:
        """What the loader reads of each source: its tokens where there are any, else its conversations."""
        return {name: self.tokens.get(name, conversations) for name, conversations in self.train.items()}


class Unopened(Sequence[Conversation]):
    """A split that is opened when its first conversation is asked for: with tokens at hand that may be never."""

    def __init__(self, directory: Path | str, source: str, split: str, size: int):
        self._place, self._size = (directory, source, split), size
        self._opened: Sequence[Conversation] | None = None

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if self._opened is None:
            self._opened = datasets.open_source(*self._place)
        return self._opened[index]


def open_data(section: Section) -> Data:
    """Opens the prepared folder that a data section names."""
    if section["packing"] == "concat_split" and section.get("corruption") == "spans":
        told = "expected another one with data.corruption = 'spans', whose spans are learned behind their text"
        raise InputError(f"data.packing = 'concat_split': {told}")
    manifest = datasets.read_manifest(section["path"])
    names, weights = chosen_sources(section["sources"], manifest)
    weigh = manifest["config"].get("weigh") or "examples"
    tokenizer = load_tokenizer(tokenizer_path(section))
    date = template_date(section.get("date", ""))
    of_length = lambda longest: load_template(section["template"], tokenizer, max_length=longest, now=date)
    template = of_length(section["length"] + 1)
    learned = learned_of(section, of_length(longest(section["packing"], section["length"])))
    judged = judged_by(learned_of(section, template))
    train, tokens = _open_split(section["path"], manifest, names, "train", learned)
    heldout, heldout_tokens = _open_split(section["path"], manifest, names, "heldout", judged)
    identity = "\n".join((manifest["hash"], tokenizer.fingerprint, learned.fingerprint))
    digest = hashlib.sha256(identity.encode()).hexdigest()
    unused = tuple(name for name in names if name not in tokens and stored(section["path"], name, "train"))
    opened = (train, heldout, weights, weigh, tokenizer, template, learned, judged, digest)
    return Data(*opened, tokens, heldout_tokens, unused)


def _open_split(
    directory: str, manifest: datasets.Manifest, names: Sequence[str], split: str, encode: Template | TextObjective
) -> tuple[dict[str, Sequence[Conversation]], dict[str, TokenStore]]:
    """The conversations of a split, and the tokens of its sources that have a store with this template's key."""
    conversations: dict[str, Sequence[Conversation]] = {}
    tokens: dict[str, TokenStore] = {}
    for name in names:
        splits = manifest["sources"][name]["splits"]
        if split != "train" and split not in splits:
            continue
        store = None
        if isinstance(encode, Template) and split in splits:
            store = find(directory, name, split, splits[split]["sha256"], encode)
        if store is None:
            conversations[name] = datasets.open_source(directory, name, split)
        else:
            tokens[name], conversations[name] = store, Unopened(directory, name, split, len(store))
    return conversations, tokens


def tokenizer_path(section: Section) -> Path:
    """Where the tokenizer is looked for."""
    return Path(section.get("tokenizer") or Path(section["path"]) / "tokenizer")


def longest(packing: Packing, length: int) -> int | None:
    """The ids of an example at most, in rows of `length` positions; None where packing splits what is longer."""
    return None if packing == "concat_split" else length + 1


def learned_of(section: Section, template: Template) -> Template | TextObjective:
    """What makes training examples by a `data` section; of one that an earlier version wrote, too."""
    return text_objective(template, **{key: section[key] for key in TEXT_OBJECTIVE if key in section})


def judged_by(learned: Template | TextObjective) -> Template | TextObjective:
    """What makes the held-out examples."""
    return learned.heldout if isinstance(learned, TextObjective) else learned


def template_date(date: str) -> datetime.datetime | None:
    """`data.date` as midnight of that day; None if it is empty."""
    try:
        return datetime.datetime.fromisoformat(date) if date else None
    except ValueError:
        raise InputError(f"data.date = {date!r}: expected YYYY-MM-DD") from None


def chosen_sources(wanted: Sequence[str], manifest: datasets.Manifest) -> tuple[list[str], dict[str, int] | None]:
    """ "name" and "name=weight" entries -> (names, weights); the manifest's own where there are none."""
    known = manifest["sources"]
    pairs = [item.partition("=") for item in wanted] or [(name, "", "") for name in known]
    for name, equals, weight in pairs:
        if name not in known:
            raise InputError(f"data.sources: found {name!r}, expected one of {', '.join(known)}")
        if equals and not weight.isdecimal():
            raise InputError(f"data.sources: found weight {weight!r} of {name}, expected a whole number")
    own = {name: int(known[name].get("weight") or 0) for name, _, _ in pairs}
    weights = {name: int(weight or own[name]) for name, equals, weight in pairs if equals or own[name]}
    return list(own), weights if any(weights.values()) else None


def make_mixture(section: Section, data: Data, seed: int) -> Mixture:
    """What the run draws from."""
    return run_mixture.make_mixture(section, data.examples, data.learned, data.weights, seed, data.weigh)


def make_loader(section: Section, data: Data, seed: int, rows: range | None = None) -> Loader:
    """The training data from its beginning; `rows` are those of this process."""
    return Loader(
        data.examples,
        make_mixture(section, data, seed),
        data.learned,
        batch_size=section["batch_size"],
        length=section["length"],
        packing=section["packing"],
        shards=section["shards"] or None,
        pool=section["pool"],
        seed=seed,
        rows=rows,
        manifest_hash=data.hash,
    )


def heldout_batches(section: Section, data: Data, examples: int, rows: range | None = None) -> Iterator[Batch]:
    """The held-out examples, `examples` a source, each once; the same at every evaluation. They are cut at the row's
    length and never split, so that losses of runs that pack in other ways can be compared."""
    heldout: dict[str, Source] = {name: data.heldout.get(name, ()) for name in data.sources}
    return evaluation_batches(
        heldout | data.heldout_tokens,
        data.judged,
        batch_size=section["batch_size"],
        length=section["length"],
        packing="none" if section["packing"] == "none" else "best_fit",
        limit_per_source=examples,
        rows=rows,
    )


def total_steps(section: Section, data: Data, seed: int, *, steps: int, epochs: float, tokens: int) -> int:
    """The run's length in steps, of which one is given. Tokens count positions, padding included; epochs are measured
    on a sample. Raises InputError for more steps than `max_epochs` leave examples for."""
    wanted = steps or math.ceil(tokens / (section["batch_size"] * section["length"]))
    if wanted and not section.get("max_epochs"):
        return wanted
    mixture = make_mixture(section, data, seed)
    rows_per_draw = run_mixture.rows_per_draw(section, data.examples, data.learned, mixture, seed)
    per_step = section["batch_size"] / rows_per_draw
    wanted = wanted or max(1, math.ceil(mixture.draws_for_epochs(epochs) / per_step))
    if mixture.end is None:
        return wanted
    last = math.floor(SURE * mixture.end / per_step)
    if (steps or tokens) and wanted > last:
        raise InputError(
            f"data.max_epochs: found {mixture.end:,} examples to draw, which last for about {last:,} steps; "
            f"expected enough for {wanted:,}: raise them, or train for fewer steps"
        )
    return min(wanted, last)
