"""Llama 3's `tokenizer.model`: a file of tiktoken, lines of "<token in base64> <rank>", and nothing else.

What the file lacks, Meta's released code has (meta-llama/llama3, llama/tokenizer.py), and it is the same for every
Llama 3: the expression that cuts a text into words, and the names of 256 special tokens, whose ids follow the last
rank. Later releases renamed some of these (<|finetune_right_pad_id|>, <|eom_id|>, <|python_tag|>); the
`added_tokens_decoder` of a tokenizer_config.json beside the file says so. A file with another number of tokens is
another model's, cut by an expression that is not known here, and refused: it would give wrong ids silently.

Texts are encoded as there, which also cuts runs of more than 25,000 characters with white space or without any, and
texts after 400,000 characters. That is no detail: on a run of 10^6 spaces the library's expression overflows its stack
and raises what is not even an Exception (openai/tiktoken#15).

The library is tiktoken itself rather than the same merges as a tokenizer.json: it encodes about five times as much text
a second and loads in a quarter of the time (docs/LOG.md).
"""

import base64
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.tokenizers import byte_level
from data_pipelines.tokenizers.files import Declared
from data_pipelines.tokenizers.tokenizer import Ids, Tokenizer

TOKENS = 128_000
WORDS = byte_level.LLAMA_3
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>", _RESERVED[4],
    "<|eot_id|>", *_RESERVED[5:],
)  # fmt: skip
NAMES = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|finetune_right_pad_id|>"}
LONGEST_RUN, LONGEST_TEXT = byte_level.LONGEST_RUN, 400_000  # characters
_RUNS = re.compile(r"\s+|\S+")
_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")


def is_tiktoken(path: Path) -> bool:
    """Whether a .model is a file of tiktoken, by its first line; a sentencepiece model is a protobuf."""
    with open(path, "rb") as file:
        return _LINE.fullmatch(file.readline(4096)) is not None


class TiktokenTokenizer(Tokenizer):
    """A tokenizer.model of Llama 3. Raises InputError for a file of tiktoken that is not Llama 3's."""

    def __init__(self, path: Path):
        ranks = _ranks(path)
        declared = Declared.read(path.parent)
        names = dict(enumerate(SPECIAL, start=TOKENS))
        names |= {i: name for name, i in declared.special.items() if i is not None and i >= TOKENS}
        special = {name: i for i, name in names.items()}
        super().__init__(path, special, NAMES | dict(declared.names), declared.chat_template)
        self.vocab_size = max(names) + 1
        self._pieces = ranks
        self._pairs = byte_level.BytePairs(ranks, WORDS)
        self._encoding = self._pairs.encoding

    def encode_batch(self, texts: Sequence[str], *, continued: bool = False) -> list[Ids]:
        return [self._encode(text) for text in texts]

    encode_inside = encode_batch  # no space is put in front of a text

    def encode_offsets(self, texts: Sequence[str], *, continued: bool = False) -> list[tuple[Ids, Ids, Ids]]:
        return [self._with_offsets(text) for text in texts]

    def token_id(self, piece: str) -> int:
        token_id = self.special_tokens.get(piece, self._pieces.get(piece.encode()))
        if token_id is None:
            raise InputError(f"{self.path}: no piece {piece!r} in the vocabulary")
        return token_id

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode_bytes([i for i in ids if i < TOKENS]).decode(errors="replace")

    def _encode(self, text: str) -> Ids:
        parts = [self._encoding.encode_ordinary(part) for part in _parts(text)]
        return np.array(parts[0] if len(parts) == 1 else list(itertools.chain.from_iterable(parts)), np.int32)

    def _with_offsets(self, text: str) -> tuple[Ids, Ids, Ids]:
        ids = self._encode(text)
        return ids, *self._pairs.offsets(text, ids)


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, in the order of ranks."""
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if len(ranks) != TOKENS:
        raise InputError(
            f"{path}: found a file of tiktoken with {len(ranks):,} tokens; expected the {TOKENS:,} of Llama 3, "
            "or a tokenizer.json of this model"
        )
    if list(ranks.values()) != list(range(TOKENS)) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise InputError(f"{path}: found a damaged tokenizer (ranks or bytes missing); expected another copy of it")
    return ranks


def _parts(text: str) -> Iterator[str]:
    if len(text) <= LONGEST_RUN:
        yield text
        return
    for start in range(0, len(text), LONGEST_TEXT):
        part = text[start : start + LONGEST_TEXT]
        runs = (match.span() for match in _RUNS.finditer(part) if match.end() - match.start() > LONGEST_RUN)
        cuts = [at for first, last in runs for at in range(first + LONGEST_RUN, last, LONGEST_RUN)]
        for first, last in itertools.pairwise([0, *cuts, len(part)]):
            yield part[first:last]
