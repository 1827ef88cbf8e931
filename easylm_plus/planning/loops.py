"""How often a loop of a compiled program runs.

XLA writes `known_trip_count` beside a loop where it knows it (CPU, GPU). Where it does not (TPU), the count follows
from the loop itself: its condition compares a counter with a limit, its body adds a constant to the counter, and what
goes in says where the counter starts.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from easylm_plus.planning.hlo import Computation, Instruction, Program

_KNOWN = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"?(\d+)')
_COPIES = ("copy", "bitcast", "copy-start", "copy-done", "optimization-barrier")
# rounds of a counter at `start` that goes up by 1 to `limit`, by the direction of the comparison
_SPAN = {"LT": lambda span: span, "LE": lambda span: span + 1}


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
    """Rounds of a `while` that stands in `computation`. Raises ValueError where that cannot be told."""
    if known := _KNOWN.search(loop.attributes):
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    test = _value(program, program.computations[condition], program.computations[condition].root)
    if isinstance(test, tuple) and test[0] in _SPAN:
        direction, counter, limit = test
        if _is_carry(counter) and counter[2] == 0:
            start = _initial(program, computation, loop, counter[1])
            step = _step(program, program.computations[body], counter[1])
            if _is_carry(limit) and _step(program, program.computations[body], limit[1]) == 0:
                limit = _initial(program, computation, loop, limit[1])
            if isinstance(start, int) and isinstance(limit, int) and step > 0:
                return max(0, math.ceil(_SPAN[direction](limit - start) / step))
    raise ValueError(
        f"loop {loop.name} of {computation.name} ({loop.source or 'no source'}): its number of rounds is not known; "
        "expected known_trip_count, or a counter with a constant start, step and limit"
    )


def _initial(program: Program, computation: Computation, loop: Instruction, index: int) -> Any:
    """What element `index` of the carry is before the first round, if that is a constant."""
    carry = computation.instructions[loop.operands[0]]
    return _value(program, computation, carry.operands[index]) if carry.opcode == "tuple" else None


def _step(program: Program, body: Computation, index: int) -> int:
    """What a round adds to element `index`; -1 if it does something else with it."""
    root = body.instructions[body.root]
    after: Any = _value(program, body, root.operands[index]) if root.opcode == "tuple" else None
    return after[2] if _is_carry(after) and after[1] == index else -1


def _is_carry(value: Any) -> bool:
    return isinstance(value, tuple) and value[0] == "carry"


def _value(program: Program, computation: Computation, name: str, arguments: tuple[Any, ...] | None = None) -> Any:
    """An integer scalar by name: an int, ("carry", i, k) = element i of the loop's carry plus k, or None.

    A comparison is (direction, left, right). `arguments` are those of a fused computation.
    """
    instruction = computation.instructions[name]
    of = lambda i: _value(program, computation, instruction.operands[i], arguments)
    match instruction.opcode:
        case "constant":
            return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
        case opcode if opcode in _COPIES:
            return of(0)
        case "parameter":
            return ("parameter",) if arguments is None else arguments[int(instruction.operands[0])]
        case "get-tuple-element" if of(0) == ("parameter",):
            return "carry", int(re.search(r"index=(\d+)", instruction.attributes)[1]), 0  # type: ignore[index]
        case "add":
            left, right = of(0), of(1)
            left, right = (left, right) if _is_carry(left) else (right, left)
            return (*left[:2], left[2] + right) if _is_carry(left) and isinstance(right, int) else None
        case "compare":
            return re.search(r"direction=(\w+)", instruction.attributes)[1], of(0), of(1)  # type: ignore[index]
        case "fusion" | "call":
            fused = program.computations[instruction.called("calls", "to_apply")[0]]
            return _value(program, fused, fused.root, tuple(of(i) for i in range(len(instruction.operands))))
    return None


def executions(
    program: Program, name: str = "", times: int | None = 1
) -> Iterator[tuple[Computation, Instruction, Any]]:
    """(computation, instruction, how often it is executed) of the whole program; None where that is not known.

    Of a conditional, all branches count.
    """
    computation = program.computations[name or program.entry]
    for it in computation.instructions.values():
        yield computation, it, times
        if it.opcode == "while":
            (condition,), (body,) = it.called("condition"), it.called("body")
            try:
                rounds = None if times is None else times * trip_count(program, computation, it)
            except ValueError:
                rounds = None
            yield from executions(program, condition, None if rounds is None else rounds + 1)
            yield from executions(program, body, rounds)
        elif not it.opcode.endswith(("-done", "-update")):  # of an asynchronous call, which the start has counted
            for called in it.called("calls", "to_apply", "called_computations", "branch_computations",
                                    "true_computation", "false_computation"):  # fmt: skip
                yield from executions(program, called, times)
