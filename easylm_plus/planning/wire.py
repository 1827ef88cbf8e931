"""What a compiled program sends between devices, from its text: bytes by kind of collective and dtype.

A loop's collectives count once a round, nested loops included; of a conditional the branch that sends more counts.
Bytes on the wire are those that each device sends (and receives) in a ring of n devices, b being the bytes of the
operand on one device (Thakur et al. 2005, section 4):

    kind                  payload    sent by each device
    all-gather            n b        (n - 1) b
    reduce-scatter        b          (n - 1) / n b
    all-reduce            b          2 (n - 1) / n b
    all-to-all            b          (n - 1) / n b
    collective-permute    b          b (0 if everybody keeps its own)
    collective-broadcast  b          b

The payload is the whole array that a device gets or gives: what "the bytes of the gradients" means, whatever n is.

Two traps. XLA:CPU has no narrow floats on the wire: it widens bfloat16 to float32 and FP8 to float16, so byte counts of
a CPU program say something about integers and float32 only. And the text of a program has a loop's body once.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from easylm_plus.planning.hlo import Array, Computation, Instruction, Program, parse
from easylm_plus.planning.loops import trip_count

# of n devices, in units of the operand's bytes: (payload, sent)
KINDS: dict[str, Callable[[int], tuple[float, float]]] = {
    "all-gather": lambda n: (n, n - 1),
    "reduce-scatter": lambda n: (1, (n - 1) / n),
    "all-reduce": lambda n: (1, 2 * (n - 1) / n),
    "all-to-all": lambda n: (1, (n - 1) / n),
    "collective-permute": lambda n: (1, n > 1),
    "collective-broadcast": lambda n: (1, n > 1),
}
UNCOUNTED = ("ragged-all-to-all", "send", "recv")  # whose bytes the text does not tell
WIDE = ("f16", "bf16", "f32", "f64")
CALLS = ("calls", "to_apply", "called_computations")
# what an array goes through without its numbers changing
_MOVES = (
    "bitcast", "broadcast", "concatenate", "copy", "copy-done", "copy-start", "dynamic-slice", "optimization-barrier",
    "pad", "reshape", "reverse", "slice", "transpose",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array in one collective instruction."""

    kind: str
    dtype: str
    dims: tuple[int, ...]  # of the operand on one device
    ranks: int  # devices that take part together
    trips: int  # times a step
    source: str  # where it comes from in the traced program
    place: tuple[str, str]  # computation, name of the operand

    @property
    def payload(self) -> float:
        """Bytes a step of the whole array."""
        return self.trips * KINDS[self.kind](self.ranks)[0] * Array(self.dtype, self.dims).bytes

    @property
    def wire(self) -> float:
        """Bytes a step that each device sends."""
        return self.trips * KINDS[self.kind](self.ranks)[1] * Array(self.dtype, self.dims).bytes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """A sum: arrays that collectives were given in one execution, and their bytes on one device."""

    arrays: int = 0
    payload: float = 0.0
    wire: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.arrays + other.arrays, self.payload + other.payload, self.wire + other.wire)


def wire_bytes(hlo: str) -> dict[tuple[str, str], Traffic]:
    """(kind, dtype) -> traffic of one execution. Raises ValueError for what cannot be counted."""
    table: dict[tuple[str, str], Traffic] = {}
    for c in collectives(hlo):
        key = c.kind, c.dtype
        table[key] = table.get(key, Traffic()) + Traffic(c.trips, c.payload, c.wire)
    return table


def collectives(hlo: str) -> list[Collective]:
    """All that are executed, with how often."""
    program = parse(hlo)
    return _within(program, program.entry, {})


def float_collectives(hlo: str) -> list[tuple[str, tuple[int, ...], str, int]]:
    """(dtype, dimensions, kind, trips) of the collectives of floats of 16 or more bits.

    Dimensions are those on one device; of a gather [n, ...], n devices' parts.
    """
    whole = lambda c: (c.ranks, *c.dims) if c.kind == "all-gather" else c.dims
    return [(c.dtype, whole(c), c.kind, c.trips) for c in collectives(hlo) if c.dtype in WIDE]


def widened_f8(hlo: str) -> list[Collective]:
    """Collectives of wide floats whose operand is an FP8 array that was only converted: bytes sent for nothing.

    One that was decoded on the way (multiplied by its scale) is another array; `float_collectives` has it.
    """
    program = parse(hlo)
    callers = program.callers()
    wide = [c for c in collectives(hlo) if c.dtype in WIDE]
    return [c for c in wide if _was_f8(program, callers, program.computations[c.place[0]], c.place[1])]


def _within(program: Program, name: str, known: dict[str, list[Collective]]) -> list[Collective]:
    """Collectives of one execution of a computation and of all that it calls."""
    if name not in known:
        computation = program.computations[name]
        found: list[Collective] = []
        for instruction in computation.instructions.values():
            found += _of(program, computation, instruction, known)
        known[name] = found
    return known[name]


def _of(program: Program, computation: Computation, it: Instruction, known: dict) -> list[Collective]:
    """Those of one instruction: itself, or what it calls."""
    inside = lambda *kinds: [_within(program, name, known) for name in it.called(*kinds)]
    kind = it.opcode.removesuffix("-start")
    if kind in KINDS:
        return _own(program, computation, it, kind)
    if kind in UNCOUNTED and "is_host_transfer=true" not in it.attributes:
        raise ValueError(f"{it.opcode} {it.name} ({it.source or 'no source'}): its bytes cannot be told from the text")
    if it.opcode == "while":
        (condition,), (body,) = inside("condition"), inside("body")
        if not condition and not body:
            return []
        trips = trip_count(program, computation, it)
        return _times(body, trips) + _times(condition, trips + 1)
    if it.opcode == "conditional":
        branches = inside("branch_computations", "true_computation", "false_computation")
        return max(branches, key=lambda found: sum(c.wire for c in found))
    if it.opcode.endswith(("-done", "-update")):  # of an asynchronous call, which the start has counted
        return []
    return [c for found in inside(*CALLS) for c in found]


def _times(found: list[Collective], trips: int) -> list[Collective]:
    return [dataclasses.replace(c, trips=c.trips * trips) for c in found]


def _own(program: Program, computation: Computation, it: Instruction, kind: str) -> list[Collective]:
    ranks = group_size(it.attributes, program.devices)
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU: fused with the slice that follows, of which only the name tells
    return [
        Collective(kind, array.dtype, array.dims, ranks, 1, it.source, (computation.name, name))
        for name in it.operands
        for array in computation.instructions[name].arrays
    ]


def group_size(attributes: str, devices: int) -> int:
    """Devices of the largest group of a collective, from its attributes in any of the forms that XLA writes:

    {{0,1},{2,3}}, {} (all), [2,4]<=[8] or [2,4]<=[4,2]T(1,0) (2 groups of 4), mesh['a'=2,'b'=4] {'b'} (the groups along
    b), source_target_pairs={{0,1},{1,0}} (2 if anything moves, else 1).
    """
    if pairs := re.search(r"source_target_pairs=\{([{}\d,\s]*)\}", attributes):
        return 2 if any(a != b for a, b in re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1])) else 1
    if listed := re.search(r"replica_groups=\{((?:\{[\d,\s]*\}[,\s]*)*)\}", attributes):
        return max((len(ids.split(",")) for ids in re.findall(r"\{([\d,\s]+)\}", listed[1])), default=devices)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[", attributes):
        return int(iota[1].split(",")[-1])
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a':(1)2 is a part of 'a', of size 2
        if parts and all(name in sizes for name, _ in parts):
            return math.prod(int(part) if part else sizes[name] for name, part in parts)
    raise ValueError(f"a collective whose groups cannot be read: {attributes[:200]!r}")


def _was_f8(program: Program, callers: dict, computation: Computation, name: str, index: int = 0) -> bool:
    """Follows an array (element `index` where it is a tuple) back through moves to a conversion from FP8."""
    it = computation.instructions[name]
    back = lambda operand, index=0: _was_f8(program, callers, computation, operand, index)
    if it.opcode == "convert":
        return computation.instructions[it.operands[0]].arrays[0].dtype.startswith("f8") or back(it.operands[0])
    if it.opcode in _MOVES:
        return back(it.operands[0], index)
    if it.opcode == "tuple":
        return back(it.operands[index])
    if it.opcode == "get-tuple-element":
        return back(it.operands[0], int(re.search(r"index=(\d+)", it.attributes)[1]))  # type: ignore[index]
    if it.opcode in ("fusion", "call"):
        inner = program.computations[it.called("calls", "to_apply")[0]]
        return _was_f8(program, callers, inner, inner.root, index)
    if it.opcode == "parameter" and computation.name in callers:
        caller, call = callers[computation.name]
        if call.opcode in ("fusion", "call", "while"):  # of a loop: what goes into it
            return _was_f8(program, callers, caller, call.operands[int(it.operands[0])], index)
    return False


def describe(table: dict[tuple[str, str], Traffic]) -> str:
    """Lines "all-gather bf16: 12 arrays, payload 3.00 GB, wire 2.91 GB", the largest first."""
    rows = sorted(table.items(), key=lambda item: -item[1].wire)
    return "\n".join(
        f"{kind} {dtype}: {t.arrays:,} arrays, payload {t.payload / 1e9:.3f} GB, wire {t.wire / 1e9:.3f} GB"
        for (kind, dtype), t in rows
    )
