"""Tokenizers behind one interface: sentencepiece (.model), Hugging Face tokenizers (.json), llama2.c (.bin), and Llama
3's file of tiktoken, which is called .model, too, and told by its content.

Text never becomes a special token, whatever it contains: special tokens are placed by id (templates/template.py)
or found in a chat template's own text by `split_special`. Each call encodes one segment on its own, so sentencepiece
puts its leading space in front of every segment; Koala's format relies on that.

Where bos, eos, pad and further special tokens come from, in this order: `special_tokens_map.json` and
`tokenizer_config.json` beside the model file, what the model itself says, and for tokenizer.json (which says
nothing) the usual names. Yuan 2.0's model is the exception: see `Declared.or_of_yuan`.
"""

import abc
import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from data_pipelines.errors import InputError
from data_pipelines.tokenizers import byte_level
from data_pipelines.tokenizers.files import (
    BESIDE,
    INFILLING,
    USUAL_NAMES,
    Declared,
    PieceType,
    llama2c_model,
    sentencepiece_proto,
)

Ids = npt.NDArray[np.int32]
Span = byte_level.Span

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Loads a model file, or the first of tokenizer.json, tokenizer.model, tokenizer.bin in a directory.

    Raises FileNotFoundError that names what was looked for, ValueError for a file of another kind.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: found none of {', '.join(FILES)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a tokenizer file or a directory with one")
    kinds: dict[str, Callable[[Path], Tokenizer]] = {
        ".json": HuggingFaceTokenizer,
        ".model": _model_file,
        ".bin": lambda path: SentencePieceTokenizer(path, llama2c_model(path)),
    }
    if path.suffix in kinds:
        try:
            return kinds[path.suffix](path)
        except (InputError, OSError):
            raise
        except Exception as error:  # the libraries raise many kinds for files that they cannot make sense of
            raise InputError(f"{path}: found a damaged tokenizer ({error}); expected another copy of it") from error
    raise InputError(f"{path}: expected a .json (tokenizers), .model (sentencepiece, tiktoken) or .bin (llama2.c) file")


def _model_file(path: Path) -> "Tokenizer":
    from data_pipelines.tokenizers.tiktoken_files import TiktokenTokenizer, is_tiktoken  # which imports this module

    return TiktokenTokenizer(path) if is_tiktoken(path) else SentencePieceTokenizer(path, path.read_bytes())


class Tokenizer(abc.ABC):
    """Text <-> ids. Attributes: `vocab_size` (largest id + 1), `special_tokens` (piece -> id, without unk),
    `bos_id`, `eos_id`, `pad_id` (None where there is none), `fingerprint` (sha256 of the model file),
    `chat_template` (the jinja source that came with it, or None).
    """

    def __init__(self, path: Path, special: Mapping[str, int], names: Mapping[str, str], chat_template: str | None):
        self.path = path
        self.special_tokens: Mapping[str, int] = dict(special)
        self.chat_template = chat_template
        self.bos_id, self.eos_id, self.pad_id = (special.get(names.get(kind, "")) for kind in ("bos", "eos", "pad"))
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        self._special_text = {token_id: piece for piece, token_id in special.items()}

    vocab_size: int

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], *, continued: bool = False) -> list[Ids]:
        """Ids of each text, without bos or eos. `continued`: the texts stand after something else in one string;
        it matters only to tokenizers that put a space at the very beginning of a string and nowhere else."""

    @abc.abstractmethod
    def encode_inside(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts that go on where another one ended, perhaps inside a word: without the space that
        sentencepiece, and whatever works like it, puts in front of a text."""

    @abc.abstractmethod
    def encode_offsets(self, texts: Sequence[str], *, continued: bool = False) -> list[tuple[Ids, Ids, Ids]]:
        """(ids, starts, ends) of each text, the last two in characters of it; a character that takes several
        tokens may give some of them an empty range."""

    def encode_within(
        self, texts: Sequence[tuple[str, Sequence[Span]]], *, continued: bool = False
    ) -> list[tuple[Ids, list[Span]]]:
        """For texts with spans of characters, each with a value: (ids, the same as spans of tokens) of each. A token
        belongs to a span that it overlaps; one with an empty range counts as one character long."""
        found = []
        offsets = self.encode_offsets([text for text, _ in texts], continued=continued)
        for (_, spans), (ids, starts, ends) in zip(texts, offsets):
            ends = np.maximum(ends, starts + 1)
            inside = [(np.flatnonzero((starts < end) & (ends > start)), value) for start, end, value in spans]
            found.append((ids, [(run[0], run[-1] + 1, value) for tokens, value in inside for run in _runs(tokens)]))
        return found

    @abc.abstractmethod
    def token_id(self, piece: str) -> int:
        """The id of a piece as the vocabulary spells it. Raises InputError for a piece it does not have."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        ids: list[int] = self.encode_batch([text], continued=continued)[0].tolist()
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; special tokens are left out, or written as the vocabulary spells them. Ids that the vocabulary
        does not have (a model's is often larger) are left out."""
        ids = [int(i) for i in ids]
        if skip_special:
            return self._decode([i for i in ids if i not in self._special_text])
        out = []
        for special, group in itertools.groupby(ids, self._special_text.__contains__):
            run = list(group)
            out += [self._special_text[i] for i in run] if special else [self._decode(run)]
        return "".join(out)

    def split_special(self, text: str) -> list[tuple[int, int, int | None]]:
        """Cuts trusted text at special tokens: (start, end, id of the special token, or None for plain text)."""
        pieces: list[tuple[int, int, int | None]] = []
        at = 0
        for match in self._special_pattern.finditer(text) if self.special_tokens else ():
            if match.start() > at:
                pieces.append((at, match.start(), None))
            at = match.end()
            pieces.append((match.start(), at, self.special_tokens[match[match.lastindex or 0]]))
        return [*pieces, (at, len(text), None)] if at < len(text) else pieces

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """One group where all names are literal: a text is then searched for their first characters."""
        longest_first = sorted(self.special_tokens, key=lambda piece: (-len(piece), piece))
        around = [self._white_space_around(piece) for piece in longest_first]
        names = [re.escape(piece) for piece in longest_first]
        if not any(map(any, around)):
            return re.compile(f"({'|'.join(names)})")
        return re.compile("|".join(f"{left}({name}){right}" for name, (left, right) in zip(names, around)))

    def _white_space_around(self, piece: str) -> tuple[str, str]:
        """What belongs to a special token before and behind it, as regular expressions."""
        return "", ""

    def _require_inert(self) -> None:
        """Raises if plain text can become a special token (a Unigram or WordLevel vocabulary may hold its name)."""
        for piece, token_id in self.special_tokens.items():
            for ids in self.encode_batch([piece, f"a{piece}b", f" {piece} "]):
                if token_id in ids:
                    raise InputError(f"{self.path}: the plain text {piece!r} encodes to the special token {token_id}")

    def save(self, folder: str | Path) -> None:
        """Copies the model file, under the name `load_tokenizer` looks for, and the files beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / f"tokenizer{self.path.suffix}")
        for name in BESIDE:
            if (self.path.parent / name).is_file():
                shutil.copyfile(self.path.parent / name, folder / name)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Added tokens marked `special` are special; others (`<think>`) are ordinary text, as in HF."""

    def __init__(self, path: Path):
        source = json.loads(path.read_text("utf-8"))
        self._tokenizer = self._continuing = self._build(source)
        if '"first"' in json.dumps(source.get("pre_tokenizer")):
            self._continuing = self._build(source, _continued)
        self._inside = functools.cache(lambda: self._build(source, _inside))
        model = source["model"]
        unknown = model.get("unk_token") or (model["vocab"][model["unk_id"]][0] if model.get("unk_id") else None)
        self._added = {t["content"]: t for t in source.get("added_tokens", ()) if t["special"]}
        special = {piece: token["id"] for piece, token in self._added.items() if piece != unknown}
        usual = {kind: next((n for n in names if n in special), "") for kind, names in USUAL_NAMES.items()}
        declared = Declared.read(path.parent)
        super().__init__(path, special, usual | dict(declared.names), declared.chat_template)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self._quick = byte_level.quick(source, self._tokenizer.model)
        self._require_inert()

    @staticmethod
    def _build(source: Any, change: Callable[[Any], Any] = dict) -> tokenizers.Tokenizer:
        """`change` is applied to each normalizer and pre-tokenizer, which are dicts."""

        def walk(node: Any) -> Any:
            if isinstance(node, list):
                return [walk(item) for item in node]
            return change({key: walk(value) for key, value in node.items()}) if isinstance(node, dict) else node

        parts = {name: walk(source.get(name)) for name in ("normalizer", "pre_tokenizer")}
        changed = {**source, **parts, "truncation": None, "padding": None}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed))
        tokenizer.encode_special_tokens = True
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        return tokenizer

    def _which(self, continued: bool) -> tokenizers.Tokenizer:
        return self._continuing if continued else self._tokenizer

    def encode_batch(self, texts: Sequence[str], *, continued: bool = False) -> list[Ids]:
        return self._encode(texts, self._which(continued))

    def encode_inside(self, texts: Sequence[str]) -> list[Ids]:
        return self._encode(texts, self._tokenizer if self._quick else self._inside())

    def encode_offsets(self, texts: Sequence[str], *, continued: bool = False) -> list[tuple[Ids, Ids, Ids]]:
        quick, taken = self._quick, self._taken(texts, offsets=True)
        slowly = [text for text, yes in zip(texts, taken) if not yes]
        encodings = iter(self._which(continued).encode_batch(slowly, add_special_tokens=False))
        found = []
        for text, yes in zip(texts, taken):
            if quick and yes:
                ids = quick.pairs.encode(text)
                found.append((ids, *quick.pairs.offsets(text, ids)))
            else:
                encoding = next(encodings)
                found.append(_with_offsets(encoding.ids, encoding.offsets))
        return found

    def encode_within(
        self, texts: Sequence[tuple[str, Sequence[Span]]], *, continued: bool = False
    ) -> list[tuple[Ids, list[Span]]]:
        quick, taken = self._quick, self._taken([text for text, _ in texts], offsets=True)
        slowly = iter(super().encode_within([t for t, yes in zip(texts, taken) if not yes], continued=continued))
        return [quick.pairs.within(*text) if quick and yes else next(slowly) for text, yes in zip(texts, taken)]

    def _taken(self, texts: Sequence[str], offsets: bool = False) -> list[bool]:
        """Which texts tiktoken encodes."""
        quick = self._quick
        able = quick is not None and (quick.offsets or not offsets)
        return [quick.takes(text) if quick and able else False for text in texts]

    def _encode(self, texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> list[Ids]:
        quick, taken = self._quick, self._taken(texts)
        slowly = [text for text, yes in zip(texts, taken) if not yes]
        encodings = iter(tokenizer.encode_batch_fast(slowly, add_special_tokens=False))
        return [
            quick.pairs.encode(text) if quick and yes else np.array(next(encodings).ids, np.int32)
            for text, yes in zip(texts, taken)
        ]

    def token_id(self, piece: str) -> int:
        token_id = self._tokenizer.token_to_id(piece)
        if token_id is None:
            raise InputError(f"{self.path}: no piece {piece!r} in the vocabulary")
        return int(token_id)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _white_space_around(self, piece: str) -> tuple[str, str]:
        left, right = ("\\s*" if self._added[piece].get(side) else "" for side in ("lstrip", "rstrip"))
        return left, right


def _continued(node: dict[str, Any]) -> dict[str, Any]:
    """A Metaspace that puts a space at the beginning of a string only, for a text that is not there."""
    return node | ({"prepend_scheme": "never"} if node.get("prepend_scheme") == "first" else {})


def _inside(node: dict[str, Any]) -> dict[str, Any]:
    """Any normalizer or pre-tokenizer, without the space it puts in front of a text."""
    if node.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off.get(key, value) for key, value in node.items()}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Control pieces are special, and so are user-defined symbols that look like markup
    (<|user|>, [INST]), the pieces that the files beside the model declare, and those of Code Llama and Yuan 2.0 that
    their released code makes special: all of them are made control pieces as the model is loaded, since sentencepiece
    would otherwise find user-defined symbols in any text."""

    def __init__(self, path: Path, model: bytes):
        proto = sentencepiece_proto(model)
        declared = Declared.read(path.parent).or_of_yuan([piece.piece for piece in proto.pieces])
        special = {piece: i for piece, i in declared.special.items() if i is not None and i >= len(proto.pieces)}
        declared_or_known = declared.special.keys() | INFILLING
        for token_id, piece in enumerate(proto.pieces):
            markup = piece.type == PieceType.USER_DEFINED and _MARKUP.fullmatch(piece.piece)
            named = piece.piece in declared_or_known and piece.type != PieceType.UNKNOWN
            if piece.type == PieceType.CONTROL or markup or named:
                piece.type = PieceType.CONTROL
                special[piece.piece] = token_id
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        proto.normalizer_spec.add_dummy_prefix = False
        inside = proto.SerializeToString()
        self._inside = functools.cache(lambda: sentencepiece.SentencePieceProcessor(model_proto=inside))
        own = {kind: getattr(self._processor, f"{kind}_id")() for kind in USUAL_NAMES}
        names = {kind: self._processor.id_to_piece(i) for kind, i in own.items() if i >= 0}
        super().__init__(path, special, names | dict(declared.names), declared.chat_template)
        self.vocab_size = max([self._processor.vocab_size() - 1, *special.values()]) + 1
        self._require_inert()

    def model(self) -> bytes:
        """The sentencepiece model as it is used, with types of pieces as they are here."""
        model: bytes = self._processor.serialized_model_proto()
        return model

    def encode_batch(self, texts: Sequence[str], *, continued: bool = False) -> list[Ids]:
        ids: list[Ids] = self._processor.encode(list(texts), out_type="numpy")
        return ids

    def encode_inside(self, texts: Sequence[str]) -> list[Ids]:
        ids: list[Ids] = self._inside().encode(list(texts), out_type="numpy")
        return ids

    def encode_offsets(self, texts: Sequence[str], *, continued: bool = False) -> list[tuple[Ids, Ids, Ids]]:
        mappings = self._processor.encode(list(texts), out_type="offset_mapping")
        return [_with_offsets(mapping["ids"], mapping["offsets"]) for mapping in mappings]

    def token_id(self, piece: str) -> int:
        token_id = self.special_tokens.get(piece, self._processor.piece_to_id(piece))
        if token_id == self._processor.unk_id() and piece != self._processor.id_to_piece(token_id):
            raise InputError(f"{self.path}: no piece {piece!r} in the vocabulary")
        return int(token_id)

    def _decode(self, ids: list[int]) -> str:
        size = self._processor.vocab_size()
        return str(self._processor.decode([i for i in ids if i < size]))


def _runs(numbers: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """Ascending numbers cut where one is left out."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        if len(run):
            yield run.tolist()


def _with_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[Ids, Ids, Ids]:
    array = np.fromiter(itertools.chain.from_iterable(offsets), np.int32, 2 * len(offsets))
    return np.array(ids, np.int32), array[::2], array[1::2]


class StreamDecoder:
    """Turns ids into text as they come. The pieces returned by `push` and the last one by `flush` join to
    `tokenizer.decode(ids)`: a piece never ends inside a UTF-8 character, and the leading space that
    sentencepiece drops is dropped at the very beginning only.

    Each step decodes the ids of the last piece together with the new ones, so that the decoder sees what stands
    before them."""

    _LONGEST_WAIT = 8  # a character is at most 4 bytes, so text that is broken for longer stays broken

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer._special_text:
            return ""
        self._waiting.append(int(token_id))
        text = self._new_text()
        if not text or (text.endswith("\ufffd") and len(self._waiting) < self._LONGEST_WAIT):
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        text, self._waiting = self._new_text(), []
        return text

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._before, self._skip)
        return self._tokenizer.decode(self._before + self._waiting, self._skip)[len(known) :]
