"""Ternary weights in Hugging Face folders: transformers' BitNet formats (its integrations/bitnet.py), by
`quantization_config` of config.json.

    form            linear_class, mode       a matrix of the blocks is stored as
    online          autobitlinear, online    its latent in floats, rounded whenever it is used
    autobitlinear   autobitlinear, offline   codes, and weight_scale = gamma, by which the product is multiplied
    bitlinear       bitlinear, offline       codes, and weight_scale = 1 / gamma, by which the product is divided

Codes are those of a torch matrix [out, in], four a byte: with R = ceil(out / 4) rows of bytes, byte [r, c] holds those
of the rows r, r + R, r + 2R and r + 3R, the first in the lowest bits, as code + 1. Where 4 does not divide `out` the
last rows are padding, zeros that read as the code -1. An autobitlinear that transformers has opened and saved again
has the codes as floats [out, in].

The two conventions for weight_scale cannot be told apart by looking: the wrong one makes gibberish, not an error.
microsoft/bitnet-b1.58-2B-4T is autobitlinear, HF1BitLLM's models are bitlinear, which is also what absent keys mean.
"""

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.tensor_files import Layout, Tensors
from easylm_plus.numerics.rules import BITNET
from easylm_plus.numerics.two_bits import PER_BYTE, joined, parted

FORMS = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "autobitlinear": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {"linear_class": "bitlinear", "quantization_mode": "offline"},
}
PACKED = ("autobitlinear", "bitlinear")
ABSENT = FORMS["bitlinear"]  # what transformers takes for keys that are not there
# of those whose matrices stand in transformers' own classes under one name each
ARCHITECTURES = ("BitNetForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
SCALE = "_scale"  # after the name of a matrix


def is_ternary_name(name: str) -> bool:
    """Whether transformers' formats make this weight ternary: all linear layers of the blocks."""
    (rule,) = BITNET
    return bool(re.search(rule.rpartition("=")[0], re.sub(r"^layers/([^/]+)/", "layers/*/", name))) and name.endswith(
        "/kernel"
    )


def quantization_config(form: str) -> dict[str, Any]:
    """What config.json says of a form."""
    return {"quant_method": "bitnet", **FORMS[form]}


def form_of(found: Mapping[str, Any] | None, architecture: str, biased: bool, place: str) -> str:
    """The form that a config.json's quantization_config states; "" for none.

    Args:
      biased: whether some matrices have biases, which autobitlinear would multiply by gamma, too.

    Raises UserError for any other quantisation.
    """
    if not found:
        return ""
    method = found.get("quant_method", "unnamed")
    keys = {key: found.get(key, value) for key, value in ABSENT.items()}
    form = next((form for form, values in FORMS.items() if values == keys), None)
    more = [key for key in ("modules_to_not_convert", "use_rms_norm") if found.get(key)]
    if (
        method != "bitnet"
        or form is None
        or more
        or architecture not in ARCHITECTURES
        or (biased and form == "autobitlinear")
    ):
        told = ", ".join(f"{key} {value!r}" for key, value in found.items() if key != "quant_method")
        expected = (
            "plain weights, or bitnet's linear_class bitlinear or autobitlinear (the latter without biases), offline "
            f"or online, on all layers of the blocks of one of {', '.join(ARCHITECTURES)}"
        )
        raise UserError(f"{place}: found quantization_config of method {method!r} ({told}), expected {expected}")
    return form


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """{-1, 0, 1} as int8[out, in] -> uint8[ceil(out / 4), in]."""
    rows = -(-len(codes) // PER_BYTE)
    padded = np.full((rows * PER_BYTE, codes.shape[1]), -1, np.int8)
    padded[: len(codes)] = codes
    packed: np.ndarray = joined(padded.reshape(PER_BYTE, -1)).reshape(rows, -1)
    return packed


def unpack_rows(packed: np.ndarray, out: int) -> np.ndarray:
    """uint8[ceil(out / 4), in] -> int8[out, in], without what `out` was padded by."""
    codes: np.ndarray = parted(packed.reshape(-1)).reshape(-1, packed.shape[-1])
    return codes[:out]


class PackedTensors:
    """The tensors of a folder in a packed form: matrices of the blocks as what their codes stand for, in float32.

    Args:
      shapes: of the matrices [out, in] that are ternary, by name; what is packed does not tell `out`.

    Raises UserError for one that is not in codes, or has no scale.
    """

    def __init__(self, tensors: Tensors, form: str, shapes: Mapping[str, tuple[int, ...]]):
        self.place, self._tensors, self._form, self._shapes = tensors.place, tensors, form, shapes
        for name in sorted(shapes.keys() & tensors.names()):
            if (dtype := tensors.dtype(name)) != np.uint8 and form == "bitlinear":
                raise UserError(f"{self.place}: {name} is {dtype}, expected uint8: config.json says that it is packed")
            if name + SCALE not in tensors.names():
                raise UserError(f"{self.place}: found no tensor {name}{SCALE}, expected that of {name}")

    def names(self) -> Set[str]:
        return self._tensors.names() - {name + SCALE for name in self._shapes}

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._tensors.shape(name)
        if name not in self._shapes or self._tensors.dtype(name) != np.uint8:
            return found
        out, *rest = self._shapes[name]
        return self._shapes[name] if found == (-(-out // PER_BYTE), *rest) else (found[0] * PER_BYTE, *found[1:])

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._shapes else self._tensors.dtype(name)

    def read(self, name: str) -> np.ndarray:
        if (found := self.ternary(name)) is None:
            return self._tensors.read(name)
        codes, gamma = found
        return codes.astype(np.float32) * np.float32(gamma)

    def is_ternary(self, name: str) -> bool:
        return name in self._shapes

    def ternary(self, name: str) -> tuple[np.ndarray, float] | None:
        """(codes int8[out, in], gamma) of a packed matrix."""
        if name not in self._shapes:
            return None
        scale = self._tensors.read(name + SCALE).astype(np.float32).reshape(-1)
        if scale.shape != (1,) or not np.isfinite(scale[0]) or scale[0] <= 0:
            raise UserError(f"{self.place}: {name}{SCALE}: found {scale.tolist()}, expected one positive number")
        gamma = 1 / scale[0] if self._form == "bitlinear" else scale[0]
        read = self._tensors.read(name)
        if read.dtype == np.uint8:
            return unpack_rows(read, self._shapes[name][0]), float(gamma)
        codes = read.astype(np.int8)
        if (codes != read).any() or (np.abs(codes) > 1).any():
            raise UserError(f"{self.place}: {name}: found other numbers than -1, 0 and 1; expected those, or bytes")
        return codes, float(gamma)


def packed_layouts(layouts: Iterable[Layout], place: str) -> list[Layout]:
    """Of matrices that are going to be written packed."""
    made = []
    for name, _, (out, *rest) in layouts:
        if out % PER_BYTE:
            raise UserError(f"{place}: {name} has {out} rows; expected a multiple of 4, which transformers asks for")
        made += [Layout(name, np.dtype(np.uint8), (out // PER_BYTE, *rest)), Layout(name + SCALE, _SCALES, (1,))]
    return made


_SCALES = np.dtype(np.float32)


def packed_tensors(codes: np.ndarray, gamma: float, form: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes as bytes, weight_scale) of {-1, 0, 1} as int8[out, in]."""
    scale = np.float32(gamma)
    return pack_rows(codes), np.array([1 / scale if form == "bitlinear" else scale], _SCALES)
