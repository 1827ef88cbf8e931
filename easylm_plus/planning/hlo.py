"""Reads the text of a compiled program (`compiled.as_text()`) into computations, instructions and their types.

HLO text has no published grammar. This reads what XLA of jax 0.10 to 0.12 prints for CPU, GPU and TPU: a computation
starts with a line that ends in "{", an instruction is one line

    ROOT %name = type opcode(%operand, ...), attribute=value, ..., metadata={...}, backend_config={...}

and a type is dtype[dims]{layout}, or several in parentheses.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(?!HloModule)(ENTRY )?%?([\w.\-]+) .*\{$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?$')
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LIST = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
LITERALS = ("constant", "parameter")  # whose operand is a literal, or a number


class Array(NamedTuple):
    """The type of an array: XLA's name of the dtype, and the dimensions on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """4-bit types are packed two a byte."""
        return math.prod(self.dims) * bits(self.dtype) / 8


class Instruction(NamedTuple):
    """One line. `arrays` are the leaves of its type; `operands` names, or the literal of a constant."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str  # what follows the operands, as printed

    def called(self, *kinds: str) -> list[str]:
        """Names of the computations it calls, by attribute: calls, to_apply, body, ..."""
        plain = _STRING.sub('""', self.attributes)
        found = [(kind, name) for kind, name in _CALLED.findall(plain)]
        for kind, names in _CALLED_LIST.findall(plain):
            found += [(kind, name.strip().lstrip("%")) for name in names.split(",")]
        return [name for kind, name in found if kind in kinds]

    @property
    def source(self) -> str:
        """Where in the traced program it comes from, as "jit(train_step)/.../dot_general"; "" if not told."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in order; the root's name."""

    name: str
    instructions: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    """A whole module."""

    computations: dict[str, Computation]
    entry: str
    devices: int  # partitions times replicas

    def callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """By computation: one place that calls it (computations of compiled programs have one, reducers aside)."""
        kinds = ("calls", "to_apply", "body", "condition", "called_computations")
        return {
            name: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            for name in instruction.called(*kinds)
        }


def bits(dtype: str) -> int:
    """Of one element: "f8e4m3fn" -> 8."""
    if dtype in ("token", "opaque"):
        return 0
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


@functools.lru_cache(maxsize=4)
def parse(text: str) -> Program:
    """Raises ValueError on a text that is no compiled module, or that this does not read right."""
    header = re.match(r"HloModule [^\n]*", text)
    entry, computations = "", {}
    for is_entry, computation in _computations(text):
        computations[computation.name] = computation
        entry = computation.name if is_entry else entry
    if not header or not entry:
        raise ValueError(f"expected the text of a compiled HLO module with an ENTRY, found {text[:80]!r}")
    count = lambda key: int((re.search(rf"{key}=(\d+)", header[0]) or ("", 1))[1])
    return Program(computations, entry, count("num_partitions") * count("replica_count"))


def _computations(text: str) -> Iterator[tuple[bool, Computation]]:
    name, is_entry = "", False
    lines: list[str] = []
    for line in text.split("\n"):
        if name and _END.match(line):
            yield is_entry, _computation(name, lines)
            name = ""
        elif name and _NAME.match(line):
            lines.append(line)
        elif name:  # attributes that go on in the next line, as those of Pallas kernels do
            lines[-1] += line
        elif head := _HEAD.match(line):
            name, is_entry, lines = head[2], bool(head[1]), []
    if name:
        raise ValueError(f"computation {name} has no end")


def _computation(name: str, lines: list[str]) -> Computation:
    starts = [_NAME.match(line) for line in lines]
    found = [_instruction(s[2], line[s.end() :]) for s, line in zip(starts, lines, strict=True) if s]
    instructions = {instruction.name: instruction for instruction in found}
    for instruction in found:
        for operand in instruction.operands if instruction.opcode not in LITERALS else ():
            if operand not in instructions:
                raise ValueError(f"{instruction.name} of {name} has an operand {operand!r} that is not there")
    root = next((s[2] for s in starts if s and s[1]), "")
    if not root:
        raise ValueError(f"computation {name} has no ROOT")
    return Computation(name, instructions, root)


def _instruction(name: str, rest: str) -> Instruction:
    """`rest` is what follows "%name = "."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    size = lambda dims: tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    arrays = tuple(Array(dtype, size(dims)) for dtype, dims in _ARRAY.findall(type_text))
    inside = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1 : close - 1])
    operands = (inside,) if opcode in LITERALS else tuple(_operand_names(inside))
    return Instruction(name, opcode, arrays, operands, rest[close:])


def _operand_names(inside: str) -> Iterator[str]:
    """ "f32[8,2]{1,0} %a, %b" -> a, b; a type may or may not stand before a name."""
    depth, start = 0, 0
    for i, char in enumerate(inside + ","):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            if word := inside[start:i].strip():
                yield word.split()[-1].lstrip("%")
            start = i + 1


def _closing(text: str, start: int) -> int:
    """Just after the bracket that closes the one at `start`, strings skipped."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i = _STRING.match(text, i).end()  # type: ignore[union-attr]
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        i += 1
        if not depth:
            return i
    raise ValueError(f"unbalanced brackets in {text[:120]!r}")
