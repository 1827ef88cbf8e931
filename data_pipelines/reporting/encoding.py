"""A sample of the examples as tokens: how long they are, what is learned of them, what does not fit.

Totals over a whole source are estimated from the sample by the ratio of tokens to characters, since the characters of
all examples are known (W. G. Cochran, "Sampling Techniques", 3rd ed. 1977, section 6.4: the ratio estimator and its
variance). The sample of a source is a function of its name and size alone.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.batches.batch_stats import Item
from data_pipelines.batches.examples import encode_draws
from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.mixing.mixture import Draw
from data_pipelines.mixing.permutation import permutation_key, permute
from data_pipelines.reporting.accounts import Account
from data_pipelines.reporting.recipe import Learned, Recipe, learned_by
from data_pipelines.reporting.scan import opened, parts
from data_pipelines.workers import Workers, advance

PART = 1024  # examples of a part, at least
BATCH = 64  # encoded together
SURE = 1.96  # standard errors to either side hold the true value in 95 of 100 samples


@dataclasses.dataclass
class Encoded:
    """Of `sampled` examples: `lengths` in tokens before anything is cut off; tokens are positions with a target, as
    the trainer counts them; `squares` and `products` are sums over the examples that the margin is made of. An
    example without anything to learn is not trained on; one that the template refuses stops a run."""

    sampled: int = 0
    characters: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    cut: int = 0
    cut_tokens: int = 0
    nothing: int = 0
    encoded_characters: int = 0  # without those of examples that are none
    lengths: Counter[int] = dataclasses.field(default_factory=Counter)
    refused: int = 0
    refusal: str = ""  # what the first one was refused for
    squares: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, characters: int, encoded: Item | InputError | None) -> None:
        self.sampled += 1
        self.characters += characters
        tokens = loss_tokens = 0
        if isinstance(encoded, InputError):
            self.refused += 1
            self.refusal = self.refusal or str(encoded)
        elif encoded is None:
            self.nothing += 1
        else:
            tokens, loss_tokens = encoded.example.positions, encoded.loss_tokens
            self.encoded_characters += characters
            self.lengths[tokens + encoded.example.cut] += 1
            self.cut += encoded.example.cut > 0
            self.cut_tokens += encoded.example.cut
        self.tokens += tokens
        self.loss_tokens += loss_tokens
        for name, value in (("tokens", tokens), ("loss_tokens", loss_tokens)):
            self.squares[name] += value * value
            self.squares[f"{name} characters"] += value * characters
        self.squares["characters"] += characters * characters

    def merge(self, other: "Encoded") -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, int):
                setattr(self, field.name, mine + theirs)
        self.refusal = self.refusal or other.refusal

    @property
    def characters_per_token(self) -> float:
        """Before anything is cut off; 0 without tokens."""
        uncut = self.tokens + self.cut_tokens
        return self.encoded_characters / uncut if uncut else 0.0

    @property
    def cut_share(self) -> float:
        """Of the tokens."""
        uncut = self.tokens + self.cut_tokens
        return self.cut_tokens / uncut if uncut else 0.0

    def total(self, name: str, examples: int, characters: int) -> tuple[int, int]:
        """(estimate, margin) of `tokens` or `loss_tokens` over all `examples`, which have `characters`; the margin is
        0 where the sample is everything."""
        n, value = self.sampled, getattr(self, name)
        if n == examples or not self.characters:
            return value, 0
        ratio = value / self.characters
        residual = self.squares[name] - ratio * (2 * self.squares[f"{name} characters"])
        residual = max(0.0, residual + ratio * ratio * self.squares["characters"]) / max(1, n - 1)
        error = math.sqrt(examples * examples * (1 - n / examples) * residual / n)
        return round(ratio * characters), round(SURE * error)


def encode_sample(
    directory: Path, accounts: Sequence[Account], recipe: Recipe, sample: int, pool: Workers
) -> dict[str, Encoded]:
    """source -> counts over `sample` examples of its train split, or over all of them where it is 0."""
    found = {}
    for account in accounts:
        indices = chosen(account.name, account.train, sample)
        pieces = [indices[part.start : part.stop] for part in parts(len(indices), PART)]
        tasks = [(str(directory), account.name, piece, recipe) for piece in pieces]
        found[account.name] = Encoded()
        for encoded in pool.run(f"encode {account.name}", encode_some, tasks, total=len(indices)):
            found[account.name].merge(encoded)
    return found


def chosen(source: str, examples: int, sample: int, purpose: str = "report") -> Sequence[int]:
    """Which examples the sample is made of, ascending."""
    if not sample or sample >= examples:
        return range(examples)
    key = permutation_key(0, f"{purpose} of {source}", 0)
    return sorted(permute(place, examples, key) for place in range(sample))


def encode_some(directory: str, source: str, indices: Sequence[int], recipe: Recipe) -> Encoded:
    """The counts over these examples of a source."""
    dataset, learned, counts = opened(directory, source), learned_by(recipe), Encoded()
    for start in range(0, len(indices), BATCH):
        draws = [Draw(0, 0, index) for index in indices[start : start + BATCH]]
        for conversation, encoded in encode(learned, {source: dataset}, draws):
            counts.add(sum(len(turn.text) for turn in conversation.turns), encoded)
        advance(len(draws))
    return counts


def encode(
    learned: Learned, sources: Mapping[str, Sequence[Conversation]], draws: Sequence[Draw], seed: int = 0
) -> list[tuple[Conversation, Item | InputError | None]]:
    """Each draw's conversation with its example: None where nothing is learned, an error where it cannot be encoded."""
    read: list[dict[int, Conversation]] = [{} for _ in sources]
    for (source, _, index), dataset in ((draw, list(sources.values())[draw.source]) for draw in draws):
        read[source][index] = dataset[index]
    held: Any = dict(zip(sources, read))  # what `encode_draws` asks for, read once
    items: list[Item | InputError | None]
    try:
        items = [*encode_draws(learned, held, draws, seed)]
    except InputError:
        items = [_encode_one(learned, held, draw, seed) for draw in draws]
    return [(read[draw.source][draw.example], item) for draw, item in zip(draws, items)]


def _encode_one(learned: Learned, held: Any, draw: Draw, seed: int) -> Item | InputError | None:
    try:
        return encode_draws(learned, held, [draw], seed)[0]
    except InputError as error:
        return error
