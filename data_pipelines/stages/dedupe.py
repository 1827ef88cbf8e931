"""Leaves out samples that are there already, in their own source or in an earlier one.

Sources have an order, and of duplicates the first one is kept, by source, file and row; each drop names it. The unit
is the sample, since the answers of a row belong to one question and the halves of a comparison to each other.

Exact duplicates have an equal part, whatever the rest of them is like: `exact` names the part. "query" is the first
question, which is what Koala went by in ShareGPT; "exchange" is that with the first answers, by which Vicuna went;
"whole" is everything, and "" looks for none. Near duplicates (`near`, the same names) have parts that resemble each
other (`minhash`). Both compare normalised texts: Unicode's NFKC, casefold, white space collapsed. Sources that go by
different parts are not compared with each other.

What counts as near is the surface: a task with other numbers in it, or a page of which three quarters are boilerplate,
resembles another as much as a copy with 2 % of its characters changed does, and no comparison of shingles can tell
them apart. For sources that are meant to be variations of each other (templates, generated sums) say near = "". Of
texts under `shortest` characters one word changed makes another text, so that these are compared exactly only.
"""

import dataclasses
import difflib
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.chunk import Ledger, Sample
from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.stages.minhash import NO_KEY, Signatures, sketch

PARTS = ("", "query", "exchange", "whole")
EXACT, NEAR = "exact_duplicate", "near_duplicate"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a source's samples are compared by. `shortest`: characters below which only exact duplicates count."""

    exact: str = "whole"
    near: str = "whole"
    shortest: int = 100

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Options":
        """Raises InputError for what is no option."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise InputError(f"found the key {key!r}; expected one of {', '.join(known)}{hint}")
        options = cls(**given)
        for name in ("exact", "near"):
            if (part := getattr(options, name)) not in PARTS:
                raise InputError(f"{name}: found {part!r}; expected one of {', '.join(map(repr, PARTS))}")
        if type(options.shortest) is not int or options.shortest < 0:
            raise InputError(f"shortest: found {options.shortest!r}; expected a whole number, 0 or more")
        return options


@dataclasses.dataclass(frozen=True, slots=True)
class Duplicate:
    """What a dropped sample is a duplicate of: `kind` EXACT or NEAR; `keeper`, "source/id" of the sample that is
    kept; `via`, that of the one it was compared with, if that was dropped itself."""

    kind: str
    keeper: str
    similarity: float = 1.0
    via: str | None = None

    def __str__(self) -> str:
        via = "" if self.via is None else f", by way of {self.via}"
        return f"of {self.keeper}{via}" + ("" if self.kind == EXACT else f" (estimated Jaccard {self.similarity:.2f})")


def signatures(samples: Sequence[Sample], options: Options) -> Signatures:
    """Of a chunk's samples, in their order."""
    exact = np.array([exact_key(parts(sample, options.exact), options.exact) for sample in samples], np.uint64)
    texts = [" ".join(parts(sample, options.near)) for sample in samples]
    texts = [text if len(text) >= options.shortest else "" for text in texts]
    return Signatures(exact, *sketch(texts, salt=_hash(options.near)))


def drop(samples: Iterable[Sample], duplicates: Mapping[int, Duplicate], ledger: Ledger) -> Iterator[Sample]:
    """The samples of a chunk that go on. `duplicates` has those that do not, by their position in the chunk."""
    for position, sample in enumerate(samples):
        ledger.entered += len(sample.conversations)
        if (duplicate := duplicates.get(position)) is None:
            ledger.left += len(sample.conversations)
            yield sample
            continue
        for conversation in sample.conversations:
            ledger.drop(conversation, duplicate.kind, str(duplicate))


def exact_key(texts: Sequence[str], part: str) -> int:
    """64 bits of a part of a sample; NO_KEY for an empty one."""
    return max(1, _hash("\0".join((part, *texts)))) if any(texts) else NO_KEY


def parts(sample: Sample, part: str) -> list[str]:
    """The normalised texts of a part; none if the sample has no such part. What conversations start with in common
    is there once."""
    if part in ("query", "exchange"):
        return [normal(text) for text in _first_exchange(sample.conversations, with_answers=part == "exchange")]
    if part == "whole":
        return [normal(text) for text in _every_turn(sample.conversations)]
    return []


def normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _every_turn(conversations: Sequence[Conversation]) -> Iterator[str]:
    first = conversations[0].turns if conversations else ()
    for number, conversation in enumerate(conversations):
        shared = number > 0
        for place, turn in enumerate(conversation.turns):
            shared = shared and place < len(first) and turn.text == first[place].text
            if not shared:
                yield turn.text


def _first_exchange(conversations: Sequence[Conversation], with_answers: bool) -> list[str]:
    """The first question, and of each conversation the first answer; empty without a question."""
    found: list[str] = []
    for conversation in conversations:
        turns = iter(conversation.turns)
        query = next((turn.text for turn in turns if turn.role == "user"), None)
        if query is None:
            continue
        found = found or [query]
        if with_answers:
            found += [turn.text for turn in turns if turn.role == "assistant"][:1]
    return found


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
