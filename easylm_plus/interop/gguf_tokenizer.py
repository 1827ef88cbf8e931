"""Our tokenizers as the keys of a GGUF file, so that llama.cpp makes the same tokens of a text.

    sentencepiece BPE (.model, llama2.c's .bin)   tokenizer.ggml.model "llama": pieces, scores, types
    tokenizer.json, byte-level BPE                "gpt2": pieces, types, merges, and by `pre` how words are cut

llama.cpp knows the ways of cutting words by name and has their regular expressions in its source, so a tokenizer whose
way it does not know cannot be written: leaving the name out, as is often done, gives other tokens and gibberish.

Tokenizers that are trained here (data_pipelines.tokenizers.training) have words of their own. llama.cpp's "smollm" cuts
the same text into the same pieces, or into pieces that no token of such a vocabulary reaches across, but for one thing:
of line breaks (or tabs) in front of a word it cuts off the last. Tokens of several line breaks therefore become
user-defined, which llama.cpp finds in a text before it cuts, the longest first. Whether this gives the same tokens is
tried for all short runs, and an error where it does not: with a token of three line breaks, since merges make two pairs
of four.

What is fixed by the file: text never becomes a special token unless the caller asks for it, as here.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.tokenizers.files import PieceType, sentencepiece_proto
from data_pipelines.tokenizers.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from data_pipelines.tokenizers.training import WORDS
from easylm_plus.errors import UserError
from easylm_plus.interop.tensor_files import read_json

KeyValue = tuple[str, str, Any]  # key, how GGUFWriter calls its type, value
Parts = tuple[list[KeyValue], list[str], list[PieceType], list[float]]  # keys, pieces, their types and scores

# The regular expressions of pre-tokenizers as published, by llama.cpp's name for them (llama_vocab::impl::load).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = ("ByteLevel", True)  # with GPT-2's own words
PRE: dict[tuple[Any, ...], str] = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", _LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", _QWEN2), ("ByteLevel", False)): "qwen2",
    (("Split", WORDS), ("ByteLevel", False)): "smollm",
}
TAKES_WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is that token, whatever the merges (ignore_merges)
LINE_BREAKS = re.compile(r"[\r\n]{2,}")
BLANKS = re.compile(r"[^\S\r\n]+[^\S\r\n ]")  # several, the last of which is no space
RUN = {1: 40, 2: 8}  # longest runs of line breaks that are tried, of one kind and of both
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # marks answers for training; engines do not know it


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at a place; of LLaMA's two files the sentencepiece model, which has the scores of its pieces.

    Raises UserError where the two have other vocabularies.
    """
    found = load_tokenizer(path)
    model = found.path.with_name("tokenizer.model")
    if not isinstance(found, HuggingFaceTokenizer) or not read_json(found.path)["model"].get("byte_fallback"):
        return found
    if not model.is_file():
        raise UserError(f"{found.path}: found pieces of a sentencepiece model without it; expected {model.name} beside")
    other = load_tokenizer(model)
    if other.vocab_size != found.vocab_size:
        raise UserError(
            f"{model}: found {other.vocab_size} tokens, {found.path.name} has {found.vocab_size}; expected the same"
        )
    return other


def tokenizer_keys(
    tokenizer: Tokenizer, vocab_size: int, chat_template: str | None = None, ours: bool = False
) -> list[KeyValue]:
    """The keys of a tokenizer for a model with so many rows of embeddings.

    Args:
      chat_template: jinja.
      ours: whether the model learned from our templates, which begin with bos where a tokenizer does not say.

    Raises UserError for a tokenizer with which llama.cpp would make other tokens.
    """
    if tokenizer.vocab_size > vocab_size:
        found = f"found {tokenizer.vocab_size} tokens"
        raise UserError(f"{tokenizer.path}: {found}, more than model.vocab_size = {vocab_size}")
    keys, pieces, types, scores = _parts(tokenizer)
    for piece, token_id in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]):
        if token_id >= len(pieces):
            _pad(pieces, types, scores, token_id)
            pieces.append(piece)
            types.append(PieceType.CONTROL)
            scores.append(0.0)
    _pad(pieces, types, scores, vocab_size)
    if len(set(pieces)) < len(pieces):
        raise UserError(f"{tokenizer.path}: found a token twice; expected each once")
    keys += [
        ("tokenizer.ggml.tokens", "array", pieces),
        ("tokenizer.ggml.scores", "array", scores),
        ("tokenizer.ggml.token_type", "array", list(map(int, types))),
        ("tokenizer.ggml.add_bos_token", "bool", _adds_bos(tokenizer, ours)),
        ("tokenizer.ggml.add_eos_token", "bool", False),
    ]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    keys += [(f"tokenizer.ggml.{kind}_token_id", "uint32", i) for kind, i in ids.items() if i is not None]
    if chat_template:
        keys.append(("tokenizer.chat_template", "string", GENERATION.sub("", chat_template)))
    return keys


def _parts(tokenizer: Tokenizer) -> Parts:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _byte_level(tokenizer)
    raise UserError(f"{tokenizer.path}: found a file of tiktoken; expected the tokenizer.json of the same model")


def _pad(pieces: list[str], types: list[PieceType], scores: list[float], size: int) -> None:
    """Names for rows of the embedding that are no token."""
    for i in range(len(pieces), size):
        pieces.append(f"[PAD{i}]")
        types.append(PieceType.UNUSED)
        scores.append(-1e4)


def _adds_bos(tokenizer: Tokenizer, ours: bool) -> bool:
    """Whether a text begins with bos: as tokenizer_config.json says; else our templates have it, sentencepiece models
    of others too, and tokenizer.json where its post-processor puts it there."""
    settings = tokenizer.path.parent / "tokenizer_config.json"
    told = read_json(settings).get("add_bos_token") if settings.is_file() else None
    if tokenizer.bos_id is None or told is not None:
        return bool(told) and tokenizer.bos_id is not None
    if ours or isinstance(tokenizer, SentencePieceTokenizer):
        return True
    last = read_json(tokenizer.path).get("post_processor") or {}
    steps = [step for step in last.get("processors", [last]) if step.get("type") == "TemplateProcessing"]
    tokens = {part["SpecialToken"]["id"] for step in steps for part in step["single"] if "SpecialToken" in part}
    return any(tokenizer.special_tokens.get(token) == tokenizer.bos_id for token in tokens)


# --- sentencepiece ---


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Parts:
    """Pieces as the tokenizer uses them, in which what looks like markup is a control piece already."""
    proto = sentencepiece_proto(tokenizer.model())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for what, found, expected in (
        ("model_type", trainer.ModelType.Name(trainer.model_type), "BPE"),
        ("byte_fallback", trainer.byte_fallback, True),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("precompiled_charsmap", len(normalizer.precompiled_charsmap), 0),
    ):
        if found != expected:
            raise UserError(f"{tokenizer.path}: found {what} {found}; llama.cpp's tokenizers have {expected}")
    keys: list[KeyValue] = [
        ("tokenizer.ggml.model", "string", "llama"),
        ("tokenizer.ggml.pre", "string", "default"),
        ("tokenizer.ggml.add_space_prefix", "bool", bool(normalizer.add_dummy_prefix)),
    ]
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == PieceType.UNKNOWN), None)
    if unknown is not None:
        keys.append(("tokenizer.ggml.unknown_token_id", "uint32", unknown))
    pieces = [piece.piece for piece in proto.pieces]
    return keys, pieces, [PieceType(piece.type) for piece in proto.pieces], [piece.score for piece in proto.pieces]


# --- byte-level BPE ---


def _byte_level(tokenizer: HuggingFaceTokenizer) -> Parts:
    source = read_json(tokenizer.path)
    model, place = source["model"], tokenizer.path
    pre = _pre(source, str(place))
    expected = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                "byte_fallback": False, "ignore_merges": pre in TAKES_WHOLE_WORDS}  # fmt: skip
    for key, value in expected.items():
        if (found := model.get(key) or value if value in (None, "") else model.get(key, False)) != value:
            raise UserError(f"{place}: model.{key}: found {found!r}; llama.cpp's {pre} has {value!r}")
    of_id = {token_id: piece for piece, token_id in model["vocab"].items()}
    added = {token["id"]: token for token in source.get("added_tokens", ())}
    pieces, types = [], []
    for token_id in range(max([*of_id, *added]) + 1):
        token = added.get(token_id)
        default = f"[PAD{token_id}]"
        pieces.append(token["content"] if token else of_id.get(token_id, default))
        kind = PieceType.UNUSED if pieces[-1] == default else PieceType.NORMAL
        types.append((PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED) if token else kind)
    if _splits(source)[0] == ("Split", WORDS):
        _own_words(tokenizer, pieces, types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys: list[KeyValue] = [
        ("tokenizer.ggml.model", "string", "gpt2"),
        ("tokenizer.ggml.pre", "string", pre),
        ("tokenizer.ggml.merges", "array", merges),
    ]
    return keys, pieces, types, [0.0] * len(pieces)


def _splits(source: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What cuts a text into words, as the keys of PRE have it."""
    top = source.get("pre_tokenizer") or {}
    nodes = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    return tuple((str(node.get("type")), _cutting(node)) for node in nodes)


def _cutting(node: Mapping[str, Any]) -> Any:
    """What decides how a pre-tokenizer cuts; None: as none of PRE does."""
    match node.get("type"):
        case "ByteLevel":
            return None if node.get("add_prefix_space") else bool(node.get("use_regex", True))
        case "Digits":
            return node.get("individual_digits")
        case "Split" if node.get("behavior") == "Isolated" and not node.get("invert"):
            return node["pattern"].get("Regex")
    return None


def _pre(source: Mapping[str, Any], place: str) -> str:
    splits = _splits(source)
    if splits not in PRE:
        found = json.dumps(source.get("pre_tokenizer"))[:300]
        known = ", ".join(sorted({*PRE.values()}))
        raise UserError(
            f"{place}: found pre_tokenizer {found}; expected one that llama.cpp has ({known}), or that of "
            "data_pipelines.train_tokenizer"
        )
    normalizer = source.get("normalizer")
    # Qwen2's texts are put into NFC first, which engines leave out: for text that is in NFC it changes nothing
    if normalizer and not (PRE[splits] == "qwen2" and normalizer.get("type") == "NFC"):
        raise UserError(f"{place}: found a normalizer {normalizer.get('type')}; llama.cpp's {PRE[splits]} has none")
    return PRE[splits]


def _own_words(tokenizer: HuggingFaceTokenizer, pieces: list[str], types: list[PieceType]) -> None:
    """Makes tokens of several line breaks user-defined, spelled as they are in a text."""
    texts = [tokenizer.decode([i]) if kind == PieceType.NORMAL else "" for i, kind in enumerate(types)]
    if blanks := [text for text in texts if BLANKS.fullmatch(text)]:
        raise UserError(
            f"{tokenizer.path}: found a token {blanks[0]!r}: llama.cpp cuts the last character of such blanks off; "
            "expected a tokenizer that is trained on texts without runs of them"
        )
    runs = {text: i for i, text in enumerate(texts) if LINE_BREAKS.fullmatch(text)}
    _check_runs(tokenizer, runs)
    for text, i in runs.items():
        pieces[i], types[i] = text, PieceType.USER_DEFINED


def _check_runs(tokenizer: HuggingFaceTokenizer, runs: Mapping[str, int]) -> None:
    """An error unless the longest token first gives what the merges give, for all short runs of line breaks."""
    characters = sorted({*"".join(runs)})
    ids = {text: tokenizer.encode(text)[0] for text in characters} | dict(runs)
    tried = [
        "".join(text) for n in range(1, RUN[max(1, len(characters))] + 1)
        for text in itertools.product(characters, repeat=n)
    ]  # fmt: skip
    for text, expected in zip(tried, tokenizer.encode_batch(tried), strict=True):
        if longest_first(text, ids) != expected.tolist():
            raise UserError(
                f"{tokenizer.path}: {text!r} is {expected.tolist()}, which llama.cpp would make "
                f"{longest_first(text, ids)}: the merges of its line breaks cannot be told"
            )


def longest_first(text: str, ids: Mapping[str, int]) -> list[int]:
    """Ids of a text that is cut at the longest token wherever it stands, then at the next, and so on."""
    parts: list[str | int] = [text]
    for piece in sorted(ids, key=lambda piece: (-len(piece), ids[piece])):
        parts = [new for part in parts for new in (_cut(part, piece, ids[piece]) if isinstance(part, str) else [part])]
    return [part for part in parts if isinstance(part, int)]


def _cut(text: str, piece: str, token_id: int) -> Sequence[str | int]:
    between = text.split(piece)
    return [part for rest in between for part in (rest, token_id) if part != ""][:-1]
