"""Tokenizers made here: byte-level BPE, written as the one file `tokenizer.json` of the `tokenizers` library.

Why byte-level, and not the sentencepiece way (spaces written as U+2581, characters outside the vocabulary as byte
tokens <0xNN>):

* It is lossless. With the sentencepiece way a U+2581 of the text comes back as a space, and a text that spells
  <0x41> may come back as "A". Here text becomes UTF-8 bytes, every byte is a token, and nothing else happens: no
  normalisation, no prefix space, no unknown token. `decode(encode(text)) == text` for every Unicode string.
* It spends no slots on rare characters: 256 tokens cover every script, the rest of a small vocabulary is merges.

Digits are tokens of their own and never merged, not even with the space before them, so that a number always looks
the same and arithmetic is done by position. A space is merged with the word after it, so a letter that stands alone
(" k") is one token.

`write_bytes` trains nothing: a token is a byte, with the ids of ByT5 (Xue et al. 2021: byte b is b + 3). That needs no
text, fits every language and file, and makes sequences three to five times longer.

Text that spells a special token is encoded as that token. Whoever encodes text of others sets the property
`encode_special_tokens` of the loaded tokenizer, which encodes it as plain text instead; it is not stored in the file.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.tokenizers import byte_level

PAD, BOS, EOS = FIRST_TOKENS = ("<pad>", "<bos>", "<eos>")
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FILE = "tokenizer.json"
WORDS = byte_level.TRAINED


def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], path: str | Path) -> None:
    """Writes `path`/tokenizer.json, with ids: <pad> 0, <bos> 1, <eos> 2, `special_tokens`, 256 bytes, merges.

    The same texts give the same file. The vocabulary ends up smaller than `vocab_size` where the texts have no
    further pair that occurs twice. Raises ValueError for repeated special tokens, for a vocabulary that the
    special tokens and bytes do not fit into, and for texts without a character.
    """
    special = distinct([*FIRST_TOKENS, *special_tokens])
    least = len(special) + byte_level.BYTES
    if vocab_size < least:
        raise ValueError(
            f"vocab_size: found {vocab_size}; expected {least} or more: {len(special)} special tokens, 256 bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(not_empty(texts), trainer)
    save(tokenizer, path)


def write_bytes(special_tokens: Sequence[str], path: str | Path) -> None:
    """Writes `path`/tokenizer.json of bytes, with ids: <pad> 0, <bos> 1, <eos> 2, byte b 3 + b, `special_tokens`.

    Raises ValueError for repeated special tokens.
    """
    special = distinct([*FIRST_TOKENS, *special_tokens])
    pieces = [*FIRST_TOKENS, *byte_level.byte_pieces(), *special[len(FIRST_TOKENS) :]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    save(tokenizer, path)


def distinct(special: list[str]) -> list[str]:
    if len(set(special)) < len(special) or not all(special):
        raise ValueError(f"special_tokens: found {special}; expected each once, and none empty")
    return special


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / FILE))


def not_empty(texts: Iterable[str]) -> Iterator[str]:
    """The texts as they are; ValueError at their end if there was nothing in them."""
    characters = 0
    for text in texts:
        characters += len(text)
        yield text
    if not characters:
        raise ValueError("texts: found none, or only empty ones; expected text to train a tokenizer on")
