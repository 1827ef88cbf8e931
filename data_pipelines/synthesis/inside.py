"""The program that runs inside a sandbox, and nowhere else: generated code in one, its tests in another.

    inside.py code  REQUESTS REPLIES     loads the code, then calls its functions as it is asked to
    inside.py tests REPLIES REQUESTS     runs the tests, whose calls go to the other sandbox, and reports on stdout

The last two are the numbers of the file descriptors of two pipes. The job comes as JSON on stdin:

    {"limits": {"cpu_s", "memory_bytes", "file_bytes"}, "code": text}
    {"limits": …, "tests": [text, …], "first": i, "names": [function, …], "stubs": {label: packed value or "raise"}}

and the report is a line of JSON each:

    {"stub": label, "passes": [i, …]}    the tests that pass with this stub in the place of every function
    {"load": error or null}              whether the code could be loaded; "compiled" is false if it is not Python
    {"test": i, "error": error or null}  from test `first` on
    {"test": i, "lost": why}             "ended": no answer came, "flood": one longer than MESSAGE, "garbled": something
                                         else. The report ends here; i is null if that was on loading

An error is {"type", "message", "line"}; the line is that of the generated code, if it came from there.

What the code's side says is believed as much as a wrong result would be: it can reply what it likes, but it is not
told what is expected. Values cross as plain data and are built anew on the other side, so `==` compares objects of the
tests' own process. Where a function changed its arguments, so are the lists, dicts and sets that the test passed.
"""

from __future__ import annotations  # so that nothing is imported for the sake of types

import builtins
import contextlib
import importlib.machinery
import json
import math
import os
import resource
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn

    Json = dict[str, Any]

MESSAGE = 1 << 20  # bytes of a message between the two, at most
DEPTH = 64  # of nested values
TEXT = 300  # characters of an error's message
PLAIN = "None, bool, int, float, complex, str, bytes, list, tuple, dict, set or frozenset"


class NotPlain(TypeError):
    """A value that cannot cross."""


class Lost(BaseException):
    """The other side is gone. No Exception, so that no test can catch it."""


class Text(importlib.machinery.SourceFileLoader):
    """A module out of memory: the code's side has no file of the tests that it could read."""

    def __init__(self, text: str, path: str):
        super().__init__(path, path)
        self.text = text

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.text, self.path)

    def run(self, module: types.ModuleType) -> None:
        module.__file__ = self.path
        sys.modules[module.__name__] = module  # where dataclasses look for their module
        self.exec_module(module)


class Channel:
    """Lines of JSON over two pipes. `lost` is set once the other side is gone, whatever a test made of that."""

    def __init__(self, reads: int, writes: int):
        self.reads, self.writes, self.rest = reads, writes, b""
        self.lost: str | None = None

    def send(self, message: Json) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.writes, data) :]
        except BrokenPipeError:
            self.lose("ended")

    def receive(self) -> Json:
        """The next message. Raises Lost at the end, and for one that is too long or none."""
        parts, size = [self.rest], len(self.rest)
        while b"\n" not in parts[-1]:
            if self.lost or size > MESSAGE:
                self.lose("flood")
            data = os.read(self.reads, 1 << 16)
            if not data:
                self.lose("ended")
            parts.append(data)
            size += len(data)
        line, _, self.rest = b"".join(parts).partition(b"\n")
        try:
            message: Json = json.loads(line)
        except (ValueError, RecursionError):
            self.lose("garbled")
        if not isinstance(message, dict):
            self.lose("garbled")
        return message

    def lose(self, how: str) -> NoReturn:
        self.lost = self.lost or how
        raise Lost(self.lost)


def pack(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON; one of a subclass (an enum, a named tuple) as what it is a kind of."""
    if value is None or value is True or value is False:
        return value
    if depth > DEPTH:
        raise NotPlain(f"a value of more than {DEPTH} levels is not plain data")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(int.__index__(value))]
    if isinstance(value, float):
        return ["float", float.__float__(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [pack(item, depth + 1) for item in value]]
    raise NotPlain(f"{type(value).__name__} is not plain data ({PLAIN})")


def unpack(value: Any) -> Any:
    """The way back. Whatever is not of the form above ends in some Exception."""
    if value is None or isinstance(value, bool | str):
        return value
    kind, *rest = value
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "complex":
        return complex(*map(float.fromhex, rest))
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in rest[0]}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(unpack, rest[0]))


def described(error: BaseException, path: str = "") -> Json:
    """An error as the report has it, and the names of the built-in exceptions that it is a kind of."""
    try:
        message = str(error)[:TEXT]
    except BaseException:
        message = ""
    line: int | None = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return {"type": type(error).__name__, "message": message, "line": line, "kinds": names}


# --- the side of the code ---


def serve(job: Json, channel: Channel) -> None:
    """Loads the code and answers calls until the other side is gone."""
    try:
        load = Text(job["code"], "<code>")
        load.get_code("code")
    except BaseException as error:
        channel.send({"load": described(error, "<code>"), "compiled": False})
        return
    if "random" in job["code"]:
        import random

        random.seed(0)  # the same answer is judged alike every time
    module = types.ModuleType("generated")
    try:
        load.run(module)
    except BaseException as error:
        channel.send({"load": described(error, "<code>"), "compiled": True})
        return
    channel.send({"load": None})
    while True:
        channel.send(answer(module, channel.receive()))


def answer(module: types.ModuleType, request: Json) -> Json:
    try:
        arguments = [unpack(item) for item in request["arguments"]]
        named = {key: unpack(item) for key, item in request["named"].items()}
        value = getattr(module, request["name"])(*arguments, **named)
        return {"value": pack(value), "arguments": [pack(item) for item in arguments]}
    except BaseException as error:
        return {"error": described(error, "<code>")}


# --- the side of the tests ---


class Functions:
    """What stands in the tests for the functions of the other side. `last` is what the last call came to."""

    def __init__(self, names: Sequence[str], channel: Channel):
        self.channel, self.last = channel, ""
        self.by_name = {name: self.function(name) for name in names}

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            words = [*map(shown, arguments), *(f"{key}={shown(value)}" for key, value in named.items())]
            said = f"{name}({', '.join(words)})"[:TEXT]
            self.last = f"{said} gave no result"
            packed = {"arguments": [pack(a) for a in arguments], "named": {k: pack(v) for k, v in named.items()}}
            self.channel.send({"name": name, **packed})
            reply = self.channel.receive()
            if "error" in reply:
                error = reply["error"]
                self.last = f"{said} raised {error['type']}"[: 2 * TEXT]
                raise raised(error)
            value = unpack(reply["value"])
            changed = map(unpack, reply["arguments"])
            for old, new in zip(arguments, changed):
                replace(old, new)
            self.last = f"{said} returned {shown(value)}"[: 2 * TEXT]
            return value

        return call


def shown(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__}"


def replace(old: Any, new: Any) -> None:
    """Gives a list, dict or set the content of another."""
    if type(old) is not type(new) or old == new:
        return
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


def raised(error: Json) -> Exception:
    """The exception of the other side, as the nearest that is built in."""
    made: Exception = RuntimeError(f"{error['type']}: {error['message']}")
    for name in error["kinds"]:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                made = kind(error["message"])
            except TypeError:  # some want more arguments
                continue
            break
    made.from_code = error  # type: ignore[attr-defined]
    return made


def failure(test: str, functions: Mapping[str, Callable[..., Any]]) -> Json | None:
    """None if the test passes, else the error."""
    module = types.ModuleType("test")
    module.__dict__.update(functions, math=math)
    try:
        Text(test, "<test>").run(module)
    except Exception as error:
        return getattr(error, "from_code", None) or described(error)
    return None


def stub(packed: Any) -> Callable[..., Any]:
    """Stands for every function: raises, or always returns the same, a new object each time."""

    def call(*_: Any, **__: Any) -> Any:
        if packed == "raise":
            raise NotImplementedError
        return unpack(packed)

    return call


def judge(job: Json, channel: Channel, report: Callable[[Json], None]) -> None:
    tests: list[str] = job["tests"]
    for label, packed in job["stubs"].items():
        instead = dict.fromkeys(job["names"], stub(packed))
        report({"stub": label, "passes": [i for i, test in enumerate(tests) if failure(test, instead) is None]})
    i: int | None = None
    try:
        reply = channel.receive()
        load = reply.get("load")
        if load is not None and not isinstance(load, dict):
            channel.lose("garbled")
        report({"load": load, "compiled": bool(reply.get("compiled", True))})
        if load is not None:
            return
        functions = Functions(job["names"], channel)
        for i in range(job["first"], len(tests)):
            functions.last = ""
            error = failure(tests[i], functions.by_name)
            if channel.lost:  # a test that catches everything has caught that, too
                raise Lost(channel.lost)
            report({"test": i, "error": None if error is None else {**error, "call": functions.last}})
    except Lost as lost:
        report({"test": i, "lost": str(lost)})


def limit(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Limits for this process, which is the only one; none of them can be raised again."""
    for name, soft, hard in (
        ("CPU", cpu_s, cpu_s + 1),  # SIGXCPU, then SIGKILL
        ("AS", memory_bytes, memory_bytes),
        ("FSIZE", file_bytes, file_bytes),
        ("NOFILE", 64, 64),
        ("CORE", 0, 0),
        ("MEMLOCK", 0, 0),
        ("MSGQUEUE", 0, 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))


def main() -> None:
    role, reads, writes = sys.argv[1], *map(int, sys.argv[2:])
    job = json.loads(sys.stdin.buffer.read())
    limit(**job["limits"])
    channel, report = Channel(reads, writes), Channel(-1, os.dup(1))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what generated code prints goes nowhere, and it has nothing to read
        os.dup2(nothing, standard)
    if role == "tests":
        judge(job, channel, report.send)
        return
    os.close(report.writes)
    with contextlib.suppress(Lost):  # the tests are over
        serve(job, channel)


if __name__ == "__main__":
    main()
