"""Examples as the model gets them, token by token: what is learned, what is only read, which tokens are special.

Long stretches of one kind are shortened in the middle, so that the whole structure of an example can be seen.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.conversation import Conversation
from data_pipelines.mixing.mixture import Draw
from data_pipelines.reporting.accounts import Account
from data_pipelines.reporting.encoding import chosen, encode
from data_pipelines.reporting.recipe import Recipe, learned_by, tokenizer_of
from data_pipelines.reporting.scan import opened
from data_pipelines.templates.template import Example
from data_pipelines.tokenizers.tokenizer import StreamDecoder, Tokenizer

FIRST, LAST = 60, 20  # tokens of a stretch that are shown
STRETCHES = 24  # of an example


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some tokens that make up text together. kind: learned, read, or gap for what is left out; `hint` says which
    ids they are, or how many are left out."""

    text: str
    kind: str
    special: bool
    hint: str


@dataclasses.dataclass(frozen=True)
class Shown:
    """An example. `problem` says why there are no pieces: nothing to learn, or what the template refused."""

    id: str
    index: int
    pieces: Sequence[Piece] = ()
    tokens: int = 0
    loss_tokens: int = 0
    cut: int = 0
    problem: str = ""


def show(directory: Path, account: Account, recipe: Recipe, number: int) -> list[Shown]:
    """`number` examples of a source's train split, the same every time."""
    indices = chosen(account.name, account.train, number, "examples")[:number]
    dataset, learned = opened(str(directory), account.name), learned_by(recipe)
    tokenizer, shown = tokenizer_of(learned), []
    for index in indices:
        ((conversation, item),) = encode(learned, {account.name: dataset}, [Draw(0, 0, index)])
        if item is None:
            shown.append(Shown(conversation.id, index, problem="There is nothing to learn in it: it is left out."))
        elif isinstance(item, Exception):
            shown.append(Shown(conversation.id, index, problem=f"The template refuses it: {item}"))
        else:
            example = item.example
            stretches = tuple(shortened(pieces(example, tokenizer)))
            counts = (example.positions, item.loss_tokens, example.cut)
            shown.append(Shown(conversation.id, index, stretches, *counts))
    return shown


def show_turns(directory: Path, account: Account, number: int) -> list[Conversation]:
    """The same examples as conversations, for when there is no tokenizer."""
    dataset = opened(str(directory), account.name)
    return [dataset[index] for index in chosen(account.name, account.train, number, "examples")[:number]]


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The ids as text, in pieces that no character goes across; where a token is learned at its own place (masked
    tokens), with what is learned, after an arrow."""
    names = {i: piece for piece, i in tokenizer.special_tokens.items()}
    decoder, waiting, before = StreamDecoder(tokenizer, skip_special=False), list[int](), ""
    targets = example.ids if example.targets is None else example.targets
    for i, target, weight in zip(example.ids.tolist(), targets.tolist(), example.weights.tolist()):
        kind = "learned" if weight > 0 else "read"
        if waiting and (kind != before or i in names):
            yield piece(waiting, decoder.flush(), before)
            waiting, decoder = [], StreamDecoder(tokenizer, skip_special=False)
        before = kind
        if i in names or i >= tokenizer.vocab_size or target != i:
            text = names.get(i) or (tokenizer.decode([i], False) if i < tokenizer.vocab_size else f"<{i}>")
            learned = f"→{tokenizer.decode([target], False)}" if target != i and weight > 0 else ""
            yield Piece(text + learned, kind, i in names, f"id {i}")
            continue
        waiting.append(i)
        if text := decoder.push(i):
            yield piece(waiting, text, kind)
            waiting = []
    if waiting:
        yield piece(waiting, decoder.flush(), before)


def piece(ids: Sequence[int], text: str, kind: str) -> Piece:
    return Piece(text, kind, False, f"id {', '.join(map(str, ids))}")


def shortened(all_pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces without the middles of long stretches, and without the stretches after the first STRETCHES."""
    hidden = 0
    for number, (_, group) in enumerate(itertools.groupby(all_pieces, lambda p: (p.kind, p.special))):
        stretch = list(group)
        if number >= STRETCHES:
            hidden += len(stretch)
        elif len(stretch) <= FIRST + LAST + LAST:
            yield from stretch
        else:
            yield from stretch[:FIRST]
            yield Piece("", "gap", False, f"{len(stretch) - FIRST - LAST:,} tokens")
            yield from stretch[-LAST:]
    if hidden:
        yield Piece("", "gap", False, f"{hidden:,} tokens")
