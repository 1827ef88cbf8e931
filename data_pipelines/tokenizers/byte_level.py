"""Byte-level BPE by tiktoken: the ids of a tokenizer.json four times as fast, where they are certain to be the same.

Both libraries cut a text into words by a regular expression and merge pairs of tokens inside each word. In a
tokenizer.json the pair that stands first in the list of merges goes first; tiktoken merges any two neighbours that
make a token together, the token with the lowest id first. These come to the same if

1. the tokens that the merges make stand in the order of their ids, and
2. each token, encoded on its own, gives itself.

For let c and d be neighbours whose bytes are those of a token T. No merge crossed the ends of T so far, or c and d
would not end there; and those inside were made in the order in which T on its own is encoded, because the first of
all pairs, if it lies inside, is the first of those inside. So c and d are the two tokens of which T on its own is made
last, which by (2) are a merge: tiktoken has no other pairs to choose from, and by (1) it chooses the same. By (2),
too, it changes nothing that tiktoken takes a word that is a token as it is.

`quick` checks this for every token as the file is loaded (0.2 s for GPT-2's), and that nothing else in the file
matters: the expression is a known one, of which a test compares how the libraries understand it character by
character, nothing is put in front of a text, and the only normaliser is NFC, which leaves ASCII alone. Files with
`ignore_merges`, such as Llama 3's tokenizer.json, are left to `tokenizers`, since some of their tokens cannot be
reached by merges; Llama 3's tokenizer.model has no merges to differ from (`tiktoken_files`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import pre_tokenizers

Ids = npt.NDArray[np.int32]
Span = tuple[int, int, float]  # from, to, and what belongs to it

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
# Of tokenizers trained here: words and punctuation take the space before them, digits do not. A line break ends a
# token, so that a line reads the same whatever stands before it; other white space keeps to itself, but leaves its last
# space to the word after it.
TRAINED = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?= [^\s\p{N}])|[^\S\r\n]+"
KNOWN = (GPT_2, LLAMA_3, QWEN, TRAINED)
BYTES = 256
LONGEST_RUN = 25_000  # characters with white space or without any; the library's expressions overflow at some length
_RUNS = re.compile(r"\s+|\S+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def byte_pieces() -> list[str]:
    """How ByteLevel spells each byte: as the character of that number where it is printable, the others from U+0100 on
    in their order."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(character for character in alphabet if ord(character) >= BYTES))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(BYTES)]


class BytePairs:
    """Tokens by their bytes, and the expression that cuts words."""

    def __init__(self, ranks: dict[bytes, int], words: str):
        import tiktoken  # here, so that other tokenizers do not wait for it

        self.encoding = tiktoken.Encoding("byte_level", pat_str=words, mergeable_ranks=ranks, special_tokens={})
        self._bytes = np.zeros(max(ranks.values()) + 1, np.int32)
        self._bytes[list(ranks.values())] = [len(token) for token in ranks]

    def encode(self, text: str) -> Ids:
        return np.array(self.encoding.encode_ordinary(text), np.int32)

    def offsets(self, text: str, ids: Ids) -> tuple[Ids, Ids]:
        """Where the tokens of a text start and end, in characters; one that holds a part of a character holds it."""
        sizes = self._bytes[ids]
        ends = np.cumsum(sizes, dtype=np.int32)  # in bytes
        if text.isascii():
            return ends - sizes, ends
        data = np.frombuffer(text.encode(), np.uint8)
        character = np.cumsum((data & 0xC0) != 0x80, dtype=np.int32) - 1  # of each byte
        return character[ends - sizes], character[ends - 1] + 1

    def within(self, text: str, spans: Sequence[Span]) -> tuple[Ids, list[Span]]:
        """The ids of a text, and its spans of characters as spans of tokens; one that holds a part of a character holds
        it."""
        ids, found = self.encode(text), []
        ends = self._bytes[ids].cumsum()
        for start, end, value in spans:
            if not text.isascii():
                start, end = len(text[:start].encode()), len(text[:end].encode())
            first, last = int(ends.searchsorted(start, "right")), int(ends.searchsorted(end, "left")) + 1
            if end and first < last:
                found.append((first, min(last, len(ids)), value))
        return ids, found


class Quick:
    """What encodes most texts; `takes` tells which. `offsets`: whether it gives those of the file, too."""

    def __init__(self, pairs: BytePairs, *, normalised: bool, offsets: bool, added: list[str]):
        self.pairs, self.offsets, self._normalised = pairs, offsets, normalised
        self._added = re.compile("|".join(map(re.escape, added))) if added else None

    def takes(self, text: str) -> bool:
        if not text.isascii() and (self._normalised or _SURROGATE.search(text)):
            return False
        return not has_long_run(text) and (self._added is None or not self._added.search(text))


def has_long_run(text: str) -> bool:
    return len(text) > LONGEST_RUN and any(m.end() - m.start() > LONGEST_RUN for m in _RUNS.finditer(text))


def quick(source: Mapping[str, Any], model: Any) -> Quick | None:
    """For the content of a tokenizer.json and its model as `tokenizers` loaded it; None where it is not certain that
    the ids are the same."""
    words, normalizer, settings = _words(source.get("pre_tokenizer")), source.get("normalizer"), source["model"]
    odd = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if words is None or normalizer not in (None, {"type": "NFC"}) or "merges" not in settings:
        return None
    if any(settings.get(key) for key in odd):
        return None
    tokens = source.get("added_tokens") or ()
    ranks = _ranks(settings, model, {token["content"] for token in tokens if token["special"]})
    if ranks is None:
        return None
    added = [token["content"] for token in tokens if not token["special"]]  # which `tokenizers` finds in any text
    trims = '"trim_offsets": true' in json.dumps(source.get("post_processor"))
    return Quick(BytePairs(ranks, words), normalised=normalizer is not None, offsets=not trims, added=added)


def _words(pre_tokenizer: Any) -> str | None:
    """The expression, if it is a known one and nothing else is done to a text."""
    *before, last = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer]
    if last is None or last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if not before and last.get("use_regex", True):
        return GPT_2
    if len(before) != 1 or last.get("use_regex", True) or before[0].get("type") != "Split":
        return None
    expression, how = before[0]["pattern"].get("Regex"), (before[0].get("behavior"), before[0].get("invert"))
    return expression if expression in KNOWN and how == ("Isolated", False) else None


def _ranks(settings: Mapping[str, Any], model: Any, special: set[str]) -> dict[bytes, int] | None:
    """Token -> id, without special tokens that no text gives; None where (1) or (2) does not hold."""
    vocabulary: dict[str, int] = settings["vocab"]
    merged = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in settings["merges"]]
    ids, pieces = [vocabulary.get(token, -1) for token in merged], byte_pieces()
    itself = {
        token: token_id for token, token_id in vocabulary.items() if [t.id for t in model.tokenize(token)] == [token_id]
    }
    if ids != sorted(ids) or set("".join(itself)) != set(pieces) or not special >= vocabulary.keys() - itself.keys():
        return None
    byte = str.maketrans({piece: chr(value) for value, piece in enumerate(pieces)})
    return {token.translate(byte).encode("latin-1"): token_id for token, token_id in itself.items()}
