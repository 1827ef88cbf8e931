"""Fill in the middle: documents cut in three and put in another order, so that a left-to-right model learns to write
what is missing between two given texts (Bavarian et al. 2022, arXiv:2207.14255).

A document is cut at two characters, each drawn uniformly and independently (a part may be empty), into prefix, middle
and suffix, and becomes

    PSM   PRE prefix SUF suffix MID middle
    SPM   PRE SUF suffix MID prefix middle        (the paper's second variant)

between bos and eos as the template puts them. Everything but bos is learned, the special tokens included. Where PRE,
SUF and MID come from is the tokenizer's family (FAMILIES), and so are two details, in which ours does what the
released models have seen: Code Llama ends the middle with a token of its own, in place of eos, and gives middle and
suffix no space in front; Yuan 2.0 tokenises every part like a text of its own, sentencepiece's space included.

Yuan's code (megatron/data/gpt_dataset.py) does this with the ids of what stands between two <eod> of a row that was
cut out of the stream of documents: it decodes them, cuts the text, encodes the parts, and takes ids off the suffix, or
adds <pad> to it, until the row is as long as before; where the suffix is too short for that it keeps the document as it
was; the <pad> are learned. Ours differs as follows.

* It cuts the document itself, before it is tokenised. Ids of half a document may decode to broken characters.
* It needs no padding, since rows are packed after this. Where a document is longer than an example may be, its
  beginning that fits is cut in three, not all of it: the middle would be what is cut off. The few ids that the cuts add
  at most are taken off the suffix; where the suffix is too short for that, the document stays as it is.
* In SPM, prefix and middle are tokenised in one piece, as Code Llama does it (Rozière et al. 2023, section 2.3). Yuan's
  code tokenises them apart, so that a space appears between them wherever the text has none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.templates.template import Example, Template
from data_pipelines.tokenizers.tokenizer import Ids


class Family(NamedTuple):
    """Special tokens by name; `end` None: eos. apart: every part is tokenised like a text of its own."""

    name: str
    prefix: str
    suffix: str
    middle: str
    end: str | None = None
    apart: bool = False


FAMILIES = (
    Family("Yuan 2.0", "<FIM_PREFIX>", "<FIM_SUFFIX>", "<FIM_MIDDLE>", apart=True),
    Family("Code Llama", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    Family("StarCoder", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    Family("Qwen 2.5 Coder", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)


class Document(NamedTuple):
    """A document's text, its loss weight, and the random numbers of this draw of it."""

    text: str
    weight: float
    rng: np.random.Generator


class _Cut(NamedTuple):
    """A document in parts. `body` goes first in PSM and last in SPM, where it is prefix and middle in one."""

    spm: bool
    body: str
    suffix: str
    middle: str
    cut: int


class FillInTheMiddle:
    """Cuts and encodes documents for a template's tokenizer and length; `spm_rate`: the share in SPM order."""

    def __init__(self, template: Template, spm_rate: float):
        tokenizer = template.tokenizer
        self._tokenizer, self._max_length, self._spm_rate = tokenizer, template.max_length, spm_rate
        known = tokenizer.special_tokens
        found = [family for family in FAMILIES if {*family[1:4], family.end or family.middle} <= known.keys()]
        if not found:
            families = "; ".join(f"{family.name}: {', '.join(family[1:4])}" for family in FAMILIES)
            raise InputError(f"data.fim_rate: {tokenizer.path} has no special tokens for it; known are {families}")
        self.family = found[0]
        self._prefix, self._suffix, self._middle = (known[piece] for piece in self.family[1:4])
        self._end = known[self.family.end] if self.family.end else tokenizer.eos_id
        self._bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.identity = (self.family, spm_rate)

    def encode_many(self, documents: Sequence[Document]) -> list[Example | None]:
        """The documents in their new order; None for those that have to stay as they are."""
        if not documents:
            return []
        cuts = [self._cut(document, *self._fitting(document.text)) for document in documents]
        encode = self._tokenizer.encode_batch
        inside = encode if self.family.apart else self._tokenizer.encode_inside
        bodies = encode([cut.body for cut in cuts])
        rest = inside([part for cut in cuts for part in (cut.suffix, cut.middle)])
        parts = zip(documents, cuts, bodies, rest[::2], rest[1::2])
        return [self._assemble(d, cut, body, suffix, middle) for d, cut, body, suffix, middle in parts]

    def _fitting(self, text: str) -> tuple[str, int]:
        """The beginning of a text that leaves room for the special tokens, and how many ids were cut off."""
        if self._max_length is None:
            return text, 0
        room = max(0, self._max_length - len(self._bos) - 4)
        if len(text.encode()) < room:  # no tokenizer makes more ids than bytes, and a space in front
            return text, 0
        ((ids, starts, _),) = self._tokenizer.encode_offsets([text])
        return (text, 0) if len(ids) <= room else (text[: starts[room]], len(ids) - room)

    def _cut(self, document: Document, text: str, cut: int) -> _Cut:
        first, second = sorted(document.rng.integers(0, len(text) + 1, 2).tolist())
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        if document.rng.random() < self._spm_rate:
            return _Cut(True, prefix + middle, suffix, "", cut)
        return _Cut(False, prefix, suffix, middle, cut)

    def _assemble(self, document: Document, cut: _Cut, body: Ids, suffix: Ids, middle: Ids) -> Example | None:
        size = len(self._bos) + 4 + len(body) + len(suffix) + len(middle)
        excess = 0 if self._max_length is None else max(0, size - self._max_length)
        if excess > len(suffix):
            return None
        suffix = suffix[: len(suffix) - excess]
        first, last = (body[:0], body) if cut.spm else (body, middle)
        parts = [*self._bos, self._prefix, *first, self._suffix, *suffix, self._middle, *last, self._end]
        ids = np.array(parts, np.int32)
        weights = np.full(len(ids), document.weight, np.float32)
        weights[: len(self._bos)] = 0
        return Example(ids, weights, cut.cut + excess)
