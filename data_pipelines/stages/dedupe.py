"""Leaves out samples that are there already, in their own source or in one before it.

Sources have an order, and of duplicates the first one is kept, by source, file and row; a dropped one names it. The
unit is the sample: the answers of a row belong to its question, the halves of a comparison to each other.

Exact duplicates agree in a part, whatever the rest of them says: "query" is the first question, by which Koala went in
ShareGPT; "exchange" that and the first answer to it, by which Vicuna went; "whole" all that is said. Near duplicates
have a part in common that is similar (`minhash`). Both compare normalised text: Unicode's NFKC, cases folded, white
space collapsed. Samples are compared with those of other sources that go by the same part. Token ids are compared with
token ids, all those of an example whichever the part, and exactly only.

Similar means on the surface. A sum with other numbers in it, or a page that is boilerplate to three quarters, can
resemble another as much as a copy does of which 2 % of the characters were changed: at a similarity of 0.7 one in 17
problems of GSM8K does with every digit changed, and one in 11 of such pages (benchmarks/dedupe.py). No comparison of
shingles tells these apart; a source whose samples vary a few templates should say near = "", or ask for a similarity of
0.8, at which a quarter of such copies is missed. In a short text one word makes the difference ("Who made you?", "Who
trained you?"), so short ones are compared exactly only: below 200 bytes, most near duplicates in Koala's files were
such variations.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.stages.base import Stage, normal
from data_pipelines.stages.chunk import Ledger, Sample
from data_pipelines.stages.minhash import NO_KEY, SCHEME, Signatures, needed, sketch
from data_pipelines.token_ids import all_ids

PARTS = ("", "query", "exchange", "whole")
EXACT, NEAR = "exact_duplicate", "near_duplicate"


@dataclasses.dataclass(frozen=True, slots=True)
class Duplicate:
    """What a dropped sample is a duplicate of: `kind`, EXACT or NEAR; `keeper`, "source/id" of the sample that is kept;
    `similarity` to the one that it was compared with, which is `via` unless that is the keeper itself."""

    kind: str
    keeper: str
    similarity: float = 1.0
    via: str | None = None

    @classmethod
    def of(cls, exact: bool, similarity: float, via: str, keeper: str) -> "Duplicate":
        """From an edge to `via`, and the end of the chain of edges from there."""
        return cls(EXACT if exact else NEAR, keeper, round(similarity, 4), None if via == keeper else via)

    def __str__(self) -> str:
        similarity = f" (estimated Jaccard {self.similarity:.2f})" if self.kind == NEAR else ""
        return f"of {self.keeper}{similarity}" + (f", by way of {self.via}" if self.via else "")


class Dedupe(Stage):
    """exact, near: the part that is compared, "" for none. similarity: estimated Jaccard similarity from which on a
    sample is a near duplicate of an earlier one. shortest: bytes in UTF-8 of a part that is compared for similarity.

    Duplicates are found among the samples of all chunks: `signatures` of each chunk, `edges` among them, then `drop`.
    """

    OPTIONS: ClassVar = {"exact": "whole", "near": "whole", "similarity": 0.7, "shortest": 200}

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        self.exact, self.near = self.options["exact"], self.options["near"]
        similarity, self.shortest = self.options["similarity"], self.options["shortest"]
        for name in ("exact", "near"):
            if self.options[name] not in PARTS:
                raise InputError(f"{name}: found {self.options[name]!r}; expected one of {', '.join(map(repr, PARTS))}")
        if isinstance(similarity, bool) or not isinstance(similarity, int | float) or not 0 < similarity <= 1:
            raise InputError(f"similarity: found {similarity!r}; expected a number above 0, 1 at most")
        if isinstance(self.shortest, bool) or not isinstance(self.shortest, int) or self.shortest < 0:
            raise InputError(f"shortest: found {self.shortest!r}; expected a whole number, 0 or more")
        self.needed = needed(similarity, SCHEME.permutations)

    def signatures(self, samples: Sequence[Sample]) -> Signatures:
        """Of the samples of a chunk, in their order."""
        exact, texts = np.full(len(samples), NO_KEY, np.uint64), [""] * len(samples)
        for row, sample in enumerate(samples):
            ids = [all_ids(conversation.turns) for conversation in sample.conversations]
            if any(ids):
                exact[row] = exact_key("ids", ids if self.exact else ())
                continue
            parts = {part: said(sample, part) for part in {self.exact, self.near}}
            exact[row] = exact_key(self.exact, parts[self.exact])
            text = " ".join(parts[self.near])
            if len(text.encode(errors="surrogatepass")) >= self.shortest:
                texts[row] = text
        bands, sketches = sketch(texts, salt=_hash(self.near))
        return Signatures(exact, bands, sketches, np.full(len(samples), self.needed, np.uint8))

    def drop(self, samples: Iterable[Sample], found: Mapping[int, Duplicate], ledger: Ledger) -> Iterator[Sample]:
        """The samples of a chunk that go on; `found` has the others by their position in the chunk, from 0."""
        for position, sample in enumerate(samples):
            ledger.entered += len(sample.conversations)
            if position not in found:
                ledger.left += len(sample.conversations)
                yield sample
                continue
            for conversation in sample.conversations:
                ledger.drop(conversation, found[position].kind, str(found[position]))

    def conversation(self, conversation: Conversation, ledger: Ledger) -> Conversation:
        raise NotImplementedError("no sample alone tells what it is a duplicate of")


def said(sample: Sample, part: str) -> list[str]:
    """The normalised texts of a part, none where a sample has no such part. What several conversations of a sample
    start with is there once."""
    texts: Iterable[str] = ()
    if part == "whole":
        texts = _turns(sample.conversations)
    elif part:
        texts = _first_exchange(sample.conversations, answers=part == "exchange")
    return [normal(text) for text in texts]


def exact_key(part: str, texts: Sequence[str]) -> int:
    """64 bits, other ones for each part; NO_KEY where nothing is said."""
    return max(NO_KEY + 1, _hash("\0".join((part, *texts)))) if any(texts) else NO_KEY


def _turns(conversations: Sequence[Conversation]) -> Iterator[str]:
    first = [turn.text for conversation in conversations[:1] for turn in conversation.turns]
    yield from first
    for conversation in conversations[1:]:
        texts = [turn.text for turn in conversation.turns]
        shared = next((place for place, pair in enumerate(zip(first, texts)) if pair[0] != pair[1]), len(first))
        yield from texts[shared:]


def _first_exchange(conversations: Sequence[Conversation], answers: bool) -> Iterator[str]:
    """The first question (of a document, which asks nothing, all of it), and the first answer in each conversation."""
    asked = False
    for conversation in conversations:
        turns = iter(conversation.turns)
        query = next((turn.text for turn in turns if turn.role in ("user", "text")), None)
        if query is not None and not asked:
            asked = True
            yield query
        if query is not None and answers:
            yield from [turn.text for turn in turns if turn.role == "assistant"][:1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
