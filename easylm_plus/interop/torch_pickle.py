"""The pickle inside a PyTorch file, run by a machine that can neither import nor call anything.

A pickle is a program for a small stack machine. Python's own machine lets that program import and call whatever it
names. This one only understands the few instructions that build dicts, tuples, numbers and strings, and of names only
OrderedDict, torch's storage classes and _rebuild_tensor_v2; none of them is ever imported or called: a rebuilt tensor
is a tuple of numbers here. Everything else in the program is an error that says what was found.

What the program builds stays flat, so that neither hashing, comparing nor freeing it takes more time, memory or stack
than the program is long: keys of dicts are strings, and a tuple holds no tuple but one of integers. For the same reason
messages show names and kinds from the program, cut to one line, and never a structure.
"""

import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
AXES = 64  # at most: what torch and numpy have
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


class Refused(Exception):
    """The pickle holds what a file of plain tensors does not."""


class Name(NamedTuple):
    """Something that the pickle would have imported."""

    name: str


class Storage(NamedTuple):
    """A run of numbers in the archive: the file data/`key`."""

    dtype: np.dtype
    key: str


class View(NamedTuple):
    """A tensor: a part of a storage, in elements; nothing is negative."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def shown(text: str) -> str:
    """Text out of a file, fit for one line of a message."""
    text = text if len(text) <= 100 else text[:100] + "..."
    return text if text.isprintable() else ascii(text)


class Machine:
    """Runs the pickles of state dicts; every instruction that is not here is refused."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The object that the program builds; Refused, or what Python raises where the program makes no sense."""
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

    def last(self, count: int) -> list[Any]:
        """The last items, taken off the stack."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def tuple_of(self, items: list[Any]) -> None:
        for item in items:
            if isinstance(item, View) or (isinstance(item, dict) and item):
                raise Refused(f"a tuple with a {_kind(item)} in it")
            if type(item) is tuple and any(type(inner) is not int for inner in item):
                raise Refused("tuples nested in one another")
        self.stack.append(tuple(items))

    def put(self, slot: int | None) -> None:
        self.memo[len(self.memo) if slot is None else slot] = self.stack[-1]

    def set_items(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"items set on a {_kind(self.stack[-1])}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise Refused(f"a dict with a {_kind(key)} as a key")
            self.stack[-1][key] = value

    def name(self, name: str) -> None:
        if name not in (ORDERED_DICT, REBUILD, *STORAGES):
            raise Refused(f"the name {shown(name.replace(' ', '.'))}")
        self.stack.append(Name(name))

    def stack_name(self, _: Any) -> None:
        parts = self.last(2)
        if not all(isinstance(part, str) for part in parts):
            raise Refused("a name that is no text")
        self.name(" ".join(parts))

    def persistent(self, _: Any) -> None:
        """("storage", its class, its key, its device, its length), as torch announces a storage."""
        announced = self.stack.pop()
        if type(announced) is not tuple or len(announced) != 5 or announced[0] != "storage":
            raise Refused(f"a persistent object that is no storage, but a {_kind(announced)}")
        _, cls, key, _, _ = announced
        if not isinstance(cls, Name) or cls.name not in STORAGES:
            raise Refused(f"a storage of {shown(cls.name) if isinstance(cls, Name) else _kind(cls)}")
        if not isinstance(key, str) or not re.fullmatch(r"\w{1,100}", key):
            raise Refused(f"a storage in {shown(key) if isinstance(key, str) else _kind(key)}")
        self.stack.append(Storage(STORAGES[cls.name], key))

    def reduce(self, _: Any) -> None:
        """A call; only two of them mean anything here."""
        callee, arguments = self.last(2)
        if callee == Name(ORDERED_DICT) and arguments == ():
            self.stack.append({})
        elif callee == Name(REBUILD) and type(arguments) is tuple and len(arguments) >= 4:
            self.stack.append(_view(*arguments[:4]))
        else:
            raise Refused(f"a call of {shown(callee.name) if isinstance(callee, Name) else _kind(callee)}")

    def build(self, _: Any) -> None:
        """Attributes of an OrderedDict (state_dict's _metadata): left out."""
        owner, _attributes = self.last(2)
        if not isinstance(owner, dict):
            raise Refused(f"attributes set on a {_kind(owner)}")
        self.stack.append(owner)


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    """The view that _rebuild_tensor_v2 makes."""
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise Refused("a tensor that is no view of a storage")
    if len(shape) != len(strides) or len(shape) > AXES:
        raise Refused(f"a tensor of {len(shape)} sizes and {len(strides)} strides")
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
        raise Refused("a tensor with a size, stride or offset that is no integer from 0 to 2^63")
    return View(storage, offset, shape, strides)


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


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
    "TUPLE": lambda machine, _: machine.tuple_of(machine.since_mark()),
    "TUPLE1": lambda machine, _: machine.tuple_of(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.tuple_of(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.tuple_of(machine.last(3)),
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(None),
    "BINGET": lambda machine, slot: machine.stack.append(machine.memo[slot]),
    "LONG_BINGET": lambda machine, slot: machine.stack.append(machine.memo[slot]),
    "GLOBAL": lambda machine, name: machine.name(name),
    "STACK_GLOBAL": Machine.stack_name,
    "BINPERSID": Machine.persistent,
    "REDUCE": Machine.reduce,
    "BUILD": Machine.build,
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
}
