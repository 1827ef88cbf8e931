"""Does a function pass its tests, and do its tests test anything?

All tests are run, each against the code as the tests before it left it. Where the code ends its process, runs out of
time or floods the pipe, that test has failed, and the rest is run on a fresh copy. Every way to fail has a reason:

    does_not_compile   Python does not take it         time_limit     out of CPU time, or of the whole wall time
    does_not_run       it cannot be loaded             memory_limit   out of memory
    fails_tests        an assertion or an exception    output_limit   a result too long for the pipe
    exits              it ended its own process        killed         it died otherwise

Tests that test nothing are found with stubs in the place of the function. A test that passes although every call
raises NotImplementedError is none; and if all other tests pass with a function that always returns the same (None,
True, False, 0, …), they would not notice a wrong one.
"""

import dataclasses
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.synthesis.sandbox import Run, Sandbox

RAISES = "raise"
# in the form of `inside.pack`
STUBS: Mapping[str, Any] = {
    RAISES: "raise",
    "None": None,
    "True": True,
    "False": False,
    "0": ["int", "0x0"],
    "1": ["int", "0x1"],
    "''": "",
    "[]": ["list", []],
}
SHOWN = 300  # characters of a message


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A reason of those above, and what was found, for a person and for the model that is to repair it."""

    reason: str
    found: str


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What came of loading, and of each test: None if it went well. `passing_stubs`: the stubs that pass all tests
    which do not pass with the stub that raises; `empty`: the tests that do."""

    load: Failure | None
    tests: tuple[Failure | None, ...]
    empty: frozenset[int] = frozenset()
    passing_stubs: tuple[str, ...] = ()

    @property
    def passed(self) -> tuple[int, ...]:
        """The tests that passed and do test something."""
        return tuple(i for i, failure in enumerate(self.tests) if failure is None and i not in self.empty)

    @property
    def failure(self) -> Failure | None:
        """The first."""
        return self.load or next(filter(None, self.tests), None)


def judge(
    sandbox: Sandbox, code: str, tests: Sequence[str], names: Sequence[str], stubs: Mapping[str, Any] = STUBS
) -> Verdict:
    """Runs `tests`, texts of programs that call the functions `names` of `code`. Raises SandboxError if the sandbox
    does not work."""
    with sandbox.slots:  # the time counts from here
        return _judge(sandbox, code, tests, names, stubs)


def _judge(
    sandbox: Sandbox, code: str, tests: Sequence[str], names: Sequence[str], stubs: Mapping[str, Any]
) -> Verdict:
    end = time.monotonic() + sandbox.limits.wall_s
    found: list[Failure | None] = []
    passes: dict[str, frozenset[int]] = {}
    while len(found) < len(tests):
        job = {"tests": list(tests), "first": len(found), "names": list(names), "stubs": {} if found else dict(stubs)}
        run = sandbox.run(code, job, max(0.0, end - time.monotonic()))
        passes |= {line["stub"]: frozenset(line["passes"]) for line in run.report if "stub" in line}
        load = next((line for line in run.report if "load" in line), None)
        if load and load["load"] is not None:
            return Verdict(of_loading(load), ())
        found += [of_test(tests[line["test"]], line["error"]) for line in run.report if "error" in line]
        if len(found) < len(tests):
            ended = of_end(run, load is not None)
            if load is None:
                return Verdict(ended, ())
            lost = len(tests) - len(found) if run.stopped == "time" else 1  # no time is left for the others
            found += [dataclasses.replace(ended, found=f"{tests[len(found)]}\n{ended.found}")] * lost
    empty = passes.get(RAISES, frozenset())
    telling = frozenset(range(len(tests))) - empty
    return Verdict(None, tuple(found), empty, tuple(s for s in passes if s != RAISES and telling <= passes[s]))


def of_loading(line: Mapping[str, Any]) -> Failure:
    error = line["load"]
    if error.get("type") == "MemoryError":
        return Failure("memory_limit", said(error))
    return Failure("does_not_run" if line["compiled"] else "does_not_compile", said(error))


def of_test(test: str, error: Mapping[str, Any] | None) -> Failure | None:
    if error is None:
        return None
    reason = "memory_limit" if error.get("type") == "MemoryError" else "fails_tests"
    call = shown(error.get("call"))
    return Failure(reason, f"{test}\n{said(error)}" + (f"\n{call}" if call else ""))


def said(error: Mapping[str, Any]) -> str:
    """Type and message of an error that untrusted code may have made up."""
    line = error.get("line")
    where = f" (line {line})" if isinstance(line, int) else ""
    message = shown(error.get("message"))
    return shown(error.get("type")) + (f": {message}" if message else "") + where


def shown(value: object) -> str:
    """Text that can be written to a file: half a surrogate pair, which code may well make, becomes "?"."""
    return value[:SHOWN].encode(errors="replace").decode() if isinstance(value, str) else ""


def of_end(run: Run, loaded: bool) -> Failure:
    """Why the report of a run is not complete."""
    lost = next((line["lost"] for line in run.report if "lost" in line), None)
    if lost == "flood" or run.stopped == "report":
        return Failure("output_limit", "OutputLimit: the result is too long")
    if lost == "garbled":
        return Failure("fails_tests", "Garbled: what came is no result")
    if run.stopped == "time":
        return Failure("time_limit", "TimeLimit: the wall time was over")
    status = run.code_status if lost else run.tests_status
    if status == 128 + signal.SIGXCPU:
        return Failure("time_limit", "TimeLimit: the CPU time was over")
    if status > 128:
        return Failure("killed", f"Killed: the process was ended by signal {status - 128}")
    when = "in a call" if loaded else "when it was loaded"
    return Failure("exits", f"Exit: the code ended its process {when}, with status {status}")
