"""Tokenizers of every back end, trained in a moment on a few sentences, and the folder of real data."""

import base64
import functools
import io
import itertools
import json
import struct
import tempfile
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipelines.tokenizers import training
from data_pipelines.tokenizers.files import PieceType, sentencepiece_proto
from data_pipelines.tokenizers.tiktoken_files import TOKENS
from data_pipelines.tokenizers.tokenizer import load_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data"
real_data = [pytest.mark.real_data, pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data")]

CHAT = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
YUAN = ["<eod>", "<n>", "<sep>", "<pad>", "<commit_before>", "<commit_msg>", "<commit_after>"]
CODE_LLAMA = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
EXTRA = [f"<extra_id_{i}>" for i in range(20)]
ODD = ["text", "eop", "sop", "☃"]
BACK_ENDS = ("bytes", "first", "always", "sentencepiece", "control", "one_byte", "tiktoken", "odd", "llama2c")
BYTE_LEVEL = ("bytes", "one_byte", "tiktoken", "odd")
SENTENCES = [
    "Bees make honey, and bears like it; the moon is far away.",
    "USER: What is the name of that river? GPT: It is the Loire.",
    "BEGINNING OF CONVERSATION: An Unhelpful Answer: ask somebody else!",
    "user assistant system end 0123456789 é ü 琵琶湖 < | > / [ ] {}",
    "one two three four five six seven eight nine ten, again and again",
] * 4
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny_tokenizers_")


@functools.cache
def tiny(kind):
    """bytes | first | always: tokenizer.json, byte-level or Metaspace with that prepend_scheme. sentencepiece: the
    chat tokens as user-defined symbols; control: as control symbols; one_byte: a token a byte; tiktoken: a file as
    large as Llama 3's, some of whose special tokens are renamed; llama2c: a .bin without chat tokens; yuan, code_llama:
    sentencepiece with those pieces as their files have them; objectives: bytes with FIM, EXTRA, <mask>; odd: bytes with
    special tokens that look like words, begin or end like the keys of a message, or are one character long."""
    folder = Path(_FOLDER.name) / kind
    folder.mkdir()
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(user_defined_symbols=CHAT))
    elif kind in ("yuan", "code_llama"):
        (folder / "tokenizer.model").write_bytes(with_pieces(YUAN if kind == "yuan" else CODE_LLAMA))
    elif kind == "objectives":
        special = ("<unk>", "<bos>", "<eos>", *FIM, *EXTRA, "<mask>")
        hugging_face("bytes", special).save(str(folder / "tokenizer.json"))
    elif kind == "odd":
        hugging_face("bytes", ("<unk>", "<bos>", "<eos>", *CHAT, *ODD)).save(str(folder / "tokenizer.json"))
    elif kind == "control":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(control_symbols=CHAT))
    elif kind == "one_byte":
        training.write_bytes(CHAT, folder)
    elif kind == "tiktoken":
        (folder / "tokenizer.model").write_bytes(tiktoken_file())
        added = {str(TOKENS + 100 + i): {"content": piece, "special": True} for i, piece in enumerate([*CHAT, *CHATML])}
        (folder / "special_tokens_map.json").write_text(json.dumps({"added_tokens_decoder": added}))
    elif kind == "llama2c":
        (folder / "tokenizer.bin").write_bytes(llama2c_file(sentencepiece_model()))
    else:
        hugging_face(kind).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def hugging_face(kind, special=("<unk>", "<pad>", "<bos>", "<eos>", *CHAT)):
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@functools.cache
def _trained(user_defined_symbols, control_symbols):
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=writer,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user_defined_symbols),
        control_symbols=list(control_symbols),
        minloglevel=2,
    )
    return writer.getvalue()


def sentencepiece_model(user_defined_symbols=(), control_symbols=()):
    return _trained(tuple(user_defined_symbols), tuple(control_symbols))


def with_pieces(pieces):
    """A sentencepiece model with further pieces of the ordinary type."""
    proto = sentencepiece_proto(sentencepiece_model())
    for piece in pieces:
        proto.pieces.add(piece=piece, score=0.0, type=PieceType.NORMAL)
    return proto.SerializeToString()


def llama2c_file(model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i).replace("▁", " ").encode() for i in range(processor.vocab_size())]
    body = [struct.pack("<fi", processor.get_score(i), len(piece)) + piece for i, piece in enumerate(pieces)]
    return struct.pack("<i", max(map(len, pieces))) + b"".join(body)


@functools.cache
def tiktoken_file():
    """As many tokens as Llama 3 has: all bytes, all pairs of bytes, and triples of letters."""
    one = [bytes([byte]) for byte in range(256)]
    triples = map(bytes, itertools.product(b" etaoinshrdlcumwfgypbvkxqjz0123456789<|>_USERGPT", repeat=3))
    tokens = [*one, *map(b"".join, itertools.product(one, repeat=2)), *triples][:TOKENS]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
