"""Tensors in PyTorch's own files (.bin, .pth, .pt), read without torch and without running anything.

Such a file is a zip archive of raw storages and of one pickle, a program for a small stack machine that says which
tensor is which part of which storage. Python's own machine lets that program import and call whatever it names. The
one below only understands the few instructions that build dicts, tuples, numbers and strings, and of names only
OrderedDict, torch's storage classes and _rebuild_tensor_v2; none of them is ever imported or called: a rebuilt tensor
is a tuple of numbers here. Everything else in the program is an error that says what was found.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from easylm_plus.errors import UserError

STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


class Refused(Exception):
    """The pickle holds what a file of plain tensors does not."""


class Name(NamedTuple):
    """Something that the pickle would have imported."""

    name: str


class Storage(NamedTuple):
    """A run of numbers in the archive."""

    dtype: np.dtype
    key: str
    elements: int


class View(NamedTuple):
    """A tensor: a part of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFiles:
    """The tensors of some files of torch.save({name: tensor})."""

    def __init__(self, paths: Sequence[Path], place: str):
        self.place = place
        self._views: dict[str, tuple[zipfile.ZipFile, str, View]] = {}
        for path in paths:
            archive, prefix = _archive(path)
            for name, view in _state_dict(path, archive.read(f"{prefix}data.pkl")).items():
                self._views[name] = (archive, prefix, view)

    def names(self) -> Set[str]:
        return self._views.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name][2].shape

    def dtype(self, name: str) -> np.dtype:
        return self._views[name][2].storage.dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor; the archive's checksum of its storage is compared."""
        archive, prefix, (storage, offset, shape, strides) = self._views[name]
        try:
            flat = np.frombuffer(archive.read(f"{prefix}data/{storage.key}"), storage.dtype)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.place}: {name}: damaged storage ({error})") from error
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and not 0 <= offset <= last < flat.size:
            raise UserError(f"{self.place}: {name}: found a view of elements {offset} to {last}, of {flat.size}")
        return np.lib.stride_tricks.as_strided(
            flat[offset:], shape, [stride * flat.itemsize for stride in strides], writeable=False
        )


def _archive(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The opened archive, and the folder in it."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: found no zip archive, expected what torch.save has written since PyTorch 1.6")
    archive = zipfile.ZipFile(path)
    found = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError(f"{path}: found {len(found)} entries data.pkl in the archive, expected 1")
    order = f"{found[0]}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise UserError(f"{path}: found byte order {archive.read(order)!r}, expected little")
    return archive, found[0]


def _state_dict(path: Path, program: bytes) -> dict[str, View]:
    """The program's result, which must be a dict of tensors."""
    try:
        result = Machine().run(program)
    except Refused as error:
        raise UserError(f"{path}: found {error}, which plain tensors do not need; nothing was run") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged pickle ({error})") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: found a {type(result).__name__}, expected a dict of tensors")
    for name, value in result.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise UserError(f"{path}: found {type(value).__name__} under {name!r}, expected a tensor under a name")
    return result


class Machine:
    """Runs the pickles of state dicts; every instruction that is not here is refused."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The object that the program builds."""
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in PUSH:
                self.stack.append(PUSH[opcode.name](argument))
            elif opcode.name in STEPS:
                STEPS[opcode.name](self, argument)
            else:
                raise Refused(f"the pickle instruction {opcode.name}")
        raise ValueError("no end")

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_since_mark(self, _: Any) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def tuple_of(self, count: int) -> None:
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def put(self, slot: int | None) -> None:
        self.memo[len(self.memo) if slot is None else slot] = self.stack[-1]

    def set_items(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"items set on a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def name(self, name: str) -> None:
        if name not in (ORDERED_DICT, REBUILD, *STORAGES):
            raise Refused(f"the name {name.replace(' ', '.')}")
        self.stack.append(Name(name))

    def persistent(self, _: Any) -> None:
        """("storage", its class, its key, its device, its length), as torch announces a storage."""
        kind, cls, key, _, count = self.stack.pop()
        if kind != "storage" or not isinstance(cls, Name) or cls.name not in STORAGES or "/" in key or ".." in key:
            raise Refused(f"the persistent object {(kind, cls, key)}")
        self.stack.append(Storage(STORAGES[cls.name], key, count))

    def reduce(self, _: Any) -> None:
        """A call; only two of them mean anything here."""
        arguments, callee = self.stack.pop(), self.stack.pop()
        if callee == Name(ORDERED_DICT) and arguments == ():
            self.stack.append({})
        elif callee == Name(REBUILD) and isinstance(arguments[0], Storage):
            storage, offset, shape, strides = arguments[:4]
            self.stack.append(View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides))))
        else:
            raise Refused(f"a call of {callee}")

    def build(self, _: Any) -> None:
        """Attributes of an OrderedDict (state_dict's _metadata): left out."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"attributes set on {type(self.stack[-1]).__name__}")


def _same(argument: Any) -> Any:
    return argument


PUSH: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _same),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), _same),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
}
STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": Machine.mark,
    "TUPLE": Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(None),
    "BINGET": lambda machine, slot: machine.stack.append(machine.memo[slot]),
    "LONG_BINGET": lambda machine, slot: machine.stack.append(machine.memo[slot]),
    "GLOBAL": lambda machine, name: machine.name(name),
    "STACK_GLOBAL": lambda machine, _: machine.name(" ".join(reversed((machine.stack.pop(), machine.stack.pop())))),
    "BINPERSID": Machine.persistent,
    "REDUCE": Machine.reduce,
    "BUILD": Machine.build,
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
}
