"""What stands in the files of a tokenizer besides its vocabulary, and llama2.c's own format."""

import dataclasses
import enum
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError

BESIDE = ("special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja")
USUAL_NAMES = {
    "bos": ("<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|endoftext|>"),
    "eos": ("</s>", "<|eos|>", "<eos>", "<|end_of_text|>", "[EOS]", "<|endoftext|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>"),
}
# Code Llama's pieces for filling in the middle: special in its released code, whatever the model file says of them.
INFILLING = frozenset(("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
_YUAN_PIECES = ("<eod>", "<n>", "<sep>")
# What Yuan 2.0's released code (tools/preprocess_data_yuan.py) hands to `add_tokens`, in its order.
_YUAN_ADDED = (
    "<sep>", "<pad>", "<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>", "<commit_before>",
    "<commit_msg>", "<commit_after>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
    "<empty_output>",
)  # fmt: skip


class PieceType(enum.IntEnum):
    """Types of a sentencepiece piece, numbered as in sentencepiece_model.proto."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the files beside a model say: names of bos, eos, pad; all special tokens (id or None); chat template."""

    names: Mapping[str, str]
    special: Mapping[str, int | None]
    chat_template: str | None

    @classmethod
    def read(cls, folder: Path) -> "Declared":
        config: dict[str, Any] = {}
        for name in BESIDE[:2]:
            if (folder / name).is_file():
                config |= json.loads((folder / name).read_text("utf-8"))
        content = lambda token: token["content"] if isinstance(token, dict) else token
        names = {kind: content(config[f"{kind}_token"]) for kind in USUAL_NAMES if config.get(f"{kind}_token")}
        extra = config.get("additional_special_tokens") or ()
        special: dict[str, int | None] = dict.fromkeys([*names.values(), *map(content, extra)])
        for token_id, token in config.get("added_tokens_decoder", {}).items():
            if token.get("special"):
                special[token["content"]] = int(token_id)
        template = config.get("chat_template")
        if (folder / BESIDE[2]).is_file():
            template = (folder / BESIDE[2]).read_text("utf-8")
        return cls(names, special, template if isinstance(template, str) else None)

    def or_of_yuan(self, pieces: Sequence[str]) -> "Declared":
        """Yuan 2.0's declarations if these are the pieces of its vocabulary, else these.

        Its sentencepiece file holds <eod> and <sep> as ordinary pieces, which sentencepiece would never find in a
        text (it spells "<", "sep", ">"), and lacks <mask>, <FIM_PREFIX> and others. The released code adds those to
        the tokenizer as it starts: they get the ids after the last piece, in the order of the list. There is no bos
        and the end of a text is <eod>, although the released tokenizer_config.json names <s> and add_bos_token.
        <n> stays an ordinary piece: in Yuan's files it is how a line break is written, and turned into one before
        the text is tokenised.
        """
        known = set(pieces)
        if not known.issuperset(_YUAN_PIECES):
            return self
        added = (piece for piece in _YUAN_ADDED if piece not in known)
        special: dict[str, int | None] = dict.fromkeys((*self.special, "<eod>", *_YUAN_ADDED))
        special |= {piece: i for i, piece in enumerate(added, start=len(pieces))}
        special |= {piece: i for piece, i in self.special.items() if i is not None}  # of a later release
        return Declared({"bos": "", "eos": "<eod>", "pad": "<pad>"}, special, self.chat_template)


def sentencepiece_proto(model: bytes = b"") -> Any:
    """A sentencepiece model as the protobuf message that it is stored as."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]


def llama2c_model(path: Path) -> bytes:
    """A llama2.c tokenizer.bin (int32 longest length, then float32 score, int32 length, bytes per token; 0 unk,
    1 bos, 2 eos, 3..258 the 256 bytes) as the sentencepiece BPE model that it was exported from."""
    proto = sentencepiece_proto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    first = [("<unk>", PieceType.UNKNOWN), ("<s>", PieceType.CONTROL), ("</s>", PieceType.CONTROL)]
    first += [(f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(256)]
    for token_id, (text, score) in enumerate(_llama2c_tokens(path)):
        piece, kind = first[token_id] if token_id < len(first) else (text.replace(" ", "▁"), PieceType.NORMAL)
        proto.pieces.add(piece=piece, score=score, type=kind)
    model: bytes = proto.SerializeToString()
    return model


def _llama2c_tokens(path: Path) -> Iterator[tuple[str, float]]:
    data, at = path.read_bytes(), 4
    while at < len(data):
        try:
            score, size = struct.unpack_from("<fi", data, at)
            text, at = struct.unpack_from(f"{size}s", data, at + 8)[0].decode("utf-8"), at + 8 + size
        except (struct.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, byte {at}: found {error}; expected a token of a llama2.c tokenizer") from error
        yield text, score
