"""EasyLM's streaming checkpoints (streaming_params, streaming_train_state), as Koala and OpenLLaMA were published.

A file is a stream of msgpack values, one a tensor: an array of its path in the tree, as strings, and flax's bytes of
the tensor (https://github.com/young-geng/EasyLM, checkpoint.py). The parameters' paths start with "params", in a train
state with "params", "params". Nothing in the file says what the model is, so a preset's name has to; metadata.pkl
beside it is a pickle, and is not read.

Its kernels are [in, out] as here. Its rotary embedding pairs neighbouring features, ours the halves of a head, so the
columns of wq and wk are reordered.
"""

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from flax import serialization

from easylm_plus.errors import UserError
from easylm_plus.interop.tables import Arrays, Rule, Table, same
from easylm_plus.models.config import ModelConfig


def _rotary(ours: str, theirs: str) -> Rule:
    """Columns of each head from the order 0, 1, 2, 3 ... of pairs to 0, 2, ... 1, 3, ..., and back."""

    def read(arrays: Arrays, config: ModelConfig) -> Arrays:
        pairs = arrays[0].reshape(len(arrays[0]), -1, config.head_dim // 2, 2)
        return (pairs.swapaxes(2, 3).reshape(arrays[0].shape),)

    def write(arrays: Arrays, config: ModelConfig) -> Arrays:
        halves = arrays[0].reshape(len(arrays[0]), -1, 2, config.head_dim // 2)
        return (halves.swapaxes(2, 3).reshape(arrays[0].shape),)

    return Rule((ours,), (theirs,), read, write)


_OURS, _THEIRS = "layers/{i}/", "transformer/h/{i}/"
EASYLM: Table = (
    same("embed_tokens/embedding", "transformer/wte/embedding"),
    same("norm/weight", "transformer/ln_f/kernel"),
    same("lm_head/kernel", "lm_head/kernel"),
    same(f"{_OURS}input_layernorm/weight", f"{_THEIRS}attention_norm/kernel"),
    same(f"{_OURS}post_attention_layernorm/weight", f"{_THEIRS}ffn_norm/kernel"),
    *(_rotary(f"{_OURS}self_attn/{p}_proj/kernel", f"{_THEIRS}attention/w{p}/kernel") for p in "qk"),
    *(same(f"{_OURS}self_attn/{p}_proj/kernel", f"{_THEIRS}attention/w{p}/kernel") for p in "vo"),
    *(
        same(f"{_OURS}mlp/{ours}_proj/kernel", f"{_THEIRS}feed_forward/w{n}/kernel")
        for ours, n in (("gate", 1), ("down", 2), ("up", 3))
    ),
)


class Record(NamedTuple):
    """Where a tensor lies in the stream."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: np.dtype


class EasyLMStream:
    """The parameters of a streaming checkpoint. The file is read once for what there is, then tensor by tensor."""

    def __init__(self, path: Path):
        self.place, self._path = str(path), path
        self._records = dict(self._scan())
        if not self._records:
            raise UserError(f"{path}: found no parameters, expected a stream of EasyLM (streaming_params_...)")

    def _scan(self) -> Iterator[tuple[str, Record]]:
        with self._path.open("rb") as file:
            stream = msgpack.Unpacker(file, read_size=1 << 24, max_buffer_size=2**32 - 1)
            start, size = 0, self._path.stat().st_size
            while start < size:
                try:
                    key, value = stream.unpack()
                except Exception as error:  # msgpack raises many kinds for what is none of its own
                    told = f"damaged after byte {start} of {size} ({type(error).__name__} {error})"
                    raise UserError(f"{self._path}: {told}; expected pairs of a path and a tensor") from error
                end = stream.tell()
                if not isinstance(key, list) or not key or not all(isinstance(part, bytes | str) for part in key):
                    raise UserError(f"{self._path}: found {key!r} after byte {start}, expected a path of strings")
                if (name := _name(key)) is not None:
                    array = self._array(value)
                    yield name, Record(start, end, array.shape, array.dtype)
                start = end

    def _array(self, value: Any) -> np.ndarray:
        array = serialization.msgpack_restore(value) if isinstance(value, bytes) else value
        if not isinstance(array, np.ndarray):
            raise UserError(f"{self._path}: found {type(array).__name__}, expected a tensor")
        return array

    def names(self) -> Set[str]:
        return self._records.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._records[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._records[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor, read from the file anew."""
        record = self._records[name]
        with self._path.open("rb") as file:
            file.seek(record.start)
            _, value = msgpack.unpackb(file.read(record.end - record.start), max_bin_len=2**32 - 1)
        return self._array(value)


def _name(key: list[bytes | str]) -> str | None:
    """The path of a parameter without what leads to the parameters; None for another part of a train state."""
    parts = [part.decode(errors="replace") if isinstance(part, bytes) else part for part in key]
    if parts[0] != "params":
        return None
    return "/".join(parts[2:] if parts[1:2] == ["params"] else parts[1:])
