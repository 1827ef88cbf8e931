"""The objectives of T5 and BERT on documents, for this project's decoder; not the architectures.

`Spans` (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4): spans of a text are each replaced by a sentinel, and
learned after it.

    text                 Thank you for inviting me to your party last week
    what is read         bos Thank you <0> me to your party <1> week eos
    what is learned      <0> for inviting <1> last eos

Both are one sequence here, and the attention stays causal, while T5's encoder sees its text from both sides. Numbers
and lengths of the spans are those of the released code (`random_spans_noise_mask`): a text of n tokens loses
round(n · rate) of them in round(that / span_length) spans, a text begins with tokens that stay and ends with a span
(one that has a single span loses its end), and every division into such lengths is equally likely. The eos between the
parts is where T5's encoder input ends. A text that the sentinels would make too long is cut.

`Masked` (Devlin et al. 2019, arXiv:1810.04805, section 3.1): of the tokens of a text that are not special,
round(n · rate) are learned where they stand. Of these 80 % are replaced by the mask token, 10 % by a token drawn from
the whole vocabulary, and 10 % are left. This needs attention in both directions: `model.causal = False`.
"""

import abc
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.templates.template import Example, Template
from data_pipelines.tokenizers.tokenizer import Tokenizer

SENTINELS = "<extra_id_{}>"
MASK_TOKENS = ("<mask>", "[MASK]", "<|mask|>")
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1


class Corruption(abc.ABC):
    """Makes another example of a document's, with random numbers. `identity`: what it depends on; `vocab_size`: the
    largest id it can write, plus 1."""

    identity: tuple[Any, ...]
    vocab_size: int

    @abc.abstractmethod
    def __call__(self, example: Example, rng: np.random.Generator) -> Example | None:
        """None for a document that is too short for it."""


class Spans(Corruption):
    """`sentinels`: a pattern of special tokens' names, such as "<extra_id_{}>", from 0; or ids that the tokenizer
    does not use, as "32000:32100". Raises InputError where there are fewer than the longest example may need."""

    def __init__(self, template: Template, rate: float, span_length: float, sentinels: str = SENTINELS):
        tokenizer = template.tokenizer
        self._rate, self._span_length, self._max_length = rate, span_length, template.max_length
        self._bos, self._eos = tokenizer.bos_id, tokenizer.eos_id
        ids = sentinel_ids(tokenizer, sentinels)
        longest = 2 if self._max_length is None else max(2, self._fitting(self._max_length, 0))
        if (needed := self._counts(longest)[1]) > len(ids):
            raise InputError(
                f"data.sentinels = {sentinels!r}: found {len(ids)}; expected {needed}, for examples of "
                f"{self._max_length} ids with data.corruption_rate = {rate} and data.span_length = {span_length}"
            )
        self._sentinels = np.array(ids, np.int32)
        self.vocab_size = max(tokenizer.vocab_size, max(ids) + 1)
        self.identity = ("spans", rate, span_length, ids)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example | None:
        start = int(example.ids[0] == self._bos)
        end = len(example.ids) - int(example.ids[-1] == self._eos)
        text = example.ids[start:end]
        n = len(text) if self._max_length is None else self._fitting(len(text), start)
        if n < 2:
            return None
        noise, spans = self._counts(n)
        if spans > len(self._sentinels):
            raise InputError(f"found a text that needs {spans} sentinels; expected {len(self._sentinels)} at most")
        lengths = np.stack([_lengths(n - noise, spans, rng), _lengths(noise, spans, rng)], axis=1).ravel()
        pieces = np.split(text[:n], np.cumsum(lengths)[:-1])  # what stays, a span, what stays, a span, ...
        sentinel = self._sentinels[:, None]
        read = [part for k in range(spans) for part in (pieces[2 * k], sentinel[k])]
        learned = [part for k in range(spans) for part in (sentinel[k], pieces[2 * k + 1])]
        eos = np.array([self._eos], np.int32)
        ids = np.concatenate([example.ids[:start], *read, eos, *learned, eos])
        weights = np.zeros(len(ids), np.float32)
        weights[-noise - spans - 1 :] = np.max(example.weights)
        return Example(ids, weights, example.cut + len(text) - n)

    def _counts(self, n: int) -> tuple[int, int]:
        """Tokens that a text of n >= 2 loses, and in how many spans."""
        noise = min(max(round(n * self._rate), 1), n - 1)
        return noise, min(max(round(noise / self._span_length), 1), noise, n - noise)

    def _fitting(self, n: int, before: int) -> int:
        """How much of a text of n tokens fits, with `before` tokens in front of it."""
        assert self._max_length is not None
        while n > 1 and before + n + 2 * self._counts(n)[1] + 2 > self._max_length:
            n -= 1
        return n


class Masked(Corruption):
    """`mask_token`: a special token's name, or an id that the tokenizer does not use; "": the usual name that the
    tokenizer has. Raises InputError where it has none."""

    def __init__(self, template: Template, rate: float, mask_token: str = ""):
        tokenizer = template.tokenizer
        self._rate, self._mask = rate, mask_id(tokenizer, mask_token)
        self._positions = None if template.max_length is None else template.max_length - 1
        self._special = np.array(sorted(tokenizer.special_tokens.values()), np.int32)
        self._vocabulary = tokenizer.vocab_size
        self.vocab_size = max(tokenizer.vocab_size, self._mask + 1)
        self.identity = ("masked", rate, self._mask, MASK_SHARE, RANDOM_SHARE)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example | None:
        targets = example.ids[: self._positions]
        candidates = np.flatnonzero((example.weights[: len(targets)] > 0) & ~np.isin(targets, self._special))
        if not len(candidates):
            return None
        chosen = rng.choice(candidates, max(1, round(self._rate * len(candidates))), replace=False)
        shares = rng.random(len(chosen))
        drawn = rng.integers(0, self._vocabulary, len(chosen), np.int32)
        masked, kept = shares < MASK_SHARE, shares >= MASK_SHARE + RANDOM_SHARE
        inputs, weights = targets.copy(), np.zeros(len(targets), np.float32)
        inputs[chosen] = np.where(masked, self._mask, np.where(kept, targets[chosen], drawn))
        weights[chosen] = example.weights[chosen]
        return Example(inputs, weights, example.cut + len(example.ids) - len(targets), targets.copy())


def _lengths(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """int[parts] of at least 1 that add up to total; all such divisions are equally likely."""
    breaks = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(breaks, prepend=0, append=total)


def sentinel_ids(tokenizer: Tokenizer, sentinels: str) -> Sequence[int]:
    """Ids by a pattern of names or as "first:end". Raises InputError for none, and for ids that are in use."""
    if match := re.fullmatch(r"(\d+):(\d+)", sentinels):
        first, end = map(int, match.groups())
        if not tokenizer.vocab_size <= first < end:
            raise InputError(
                f"data.sentinels = {sentinels!r}: expected ids from {tokenizer.vocab_size} on, which {tokenizer.path} "
                "does not use"
            )
        return range(first, end)
    if "{}" not in sentinels:
        raise InputError(
            f"data.sentinels = {sentinels!r}: expected names with {{}} for the number, or ids as 32000:32100"
        )
    ids: list[int] = []
    while (piece := sentinels.replace("{}", str(len(ids)))) in tokenizer.special_tokens:
        ids.append(tokenizer.special_tokens[piece])
    if not ids:
        raise InputError(
            f"data.sentinels = {sentinels!r}: {tokenizer.path} has no special token {piece}; name those it has, or "
            f"ids that it does not use, as {tokenizer.vocab_size}:{tokenizer.vocab_size + 100}"
        )
    return ids


def mask_id(tokenizer: Tokenizer, mask_token: str) -> int:
    """The id of the mask token. Raises InputError where there is none."""
    special = tokenizer.special_tokens
    if mask_token.isdecimal() and int(mask_token) >= tokenizer.vocab_size:
        return int(mask_token)
    names = (mask_token,) if mask_token else MASK_TOKENS
    if found := [special[name] for name in names if name in special]:
        return found[0]
    raise InputError(
        f"data.mask_token = {mask_token!r}: {tokenizer.path} has no special token {' or '.join(names)}; name the one "
        f"that it has, or an id that it does not use, as {tokenizer.vocab_size}"
    )
