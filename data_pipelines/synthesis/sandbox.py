"""Where generated code runs: two sandboxes of bubblewrap, one for the code and one for its tests.

What the code finds in there: the Python of this process and its libraries, read-only, /dev/null and /dev/urandom. No
place to write to (unless `tmp_mb` says so), no /bin, no home, no /etc, no /proc, no environment, no terminal, no
network, no other process, no rights (user nobody, no capabilities, no way to get any: no_new_privs, no user
namespaces), and the system calls that `seccomp` leaves. One process of limited CPU time, memory and files; both
sandboxes are killed when the wall time is over, when their report is too long, and when this process ends.

What a sandbox does not hold back: it can use the CPU time and the memory that the limits leave it, see the clock and
the kernel's version, and try the kernel's remaining system calls. With a /tmp, whose size is limited but not its number
of files, it can use up kernel memory by making empty ones, 250,000 a second here, until its CPU time is over. There is
no fallback: without bubblewrap, execution is an error.

Bubblewrap is https://github.com/containers/bubblewrap, LGPL-2.0+, a program of its own. It needs user namespaces;
some systems and most containers forbid them, which `Sandbox` finds out before anything else happens.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_pipelines.errors import InputError
from data_pipelines.synthesis import seccomp

INSTALL = "apt-get install bubblewrap, dnf install bubblewrap, or https://github.com/containers/bubblewrap"
LEAST = (0, 8)  # --disable-userns and --size
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")  # the C library and what Python is linked with
PROGRAM = Path(__file__).with_name("inside.py")
NOBODY = "65534"
REPORT = 1 << 20  # bytes of a report, at most
GRACE = 1.0  # seconds for a process that is said to have ended


class SandboxError(InputError):
    """There is no sandbox, or it does not work: nothing about the code."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of each of the two sandboxes; the wall time is that of a whole candidate, in as many runs as it takes."""

    cpu_s: float = 5.0
    wall_s: float = 20.0
    memory_mb: float = 512.0  # address space
    tmp_mb: float = 0.0  # size of /tmp; 0: there is none, and nothing at all can be written

    def job(self) -> dict[str, int]:
        """As `inside` wants them: whole seconds, and bytes."""
        megabytes = {"memory_bytes": self.memory_mb, "file_bytes": self.tmp_mb}
        return {"cpu_s": math.ceil(self.cpu_s), **{key: math.ceil(mb * (1 << 20)) for key, mb in megabytes.items()}}


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What was reported, and how the two ended: exit codes, 128 + signal for a signal. `stopped` says what ended the
    run from outside, if anything did: "time" or "report"."""

    report: tuple[dict[str, Any], ...]
    code_status: int
    tests_status: int
    stopped: str | None


class Sandbox:
    """Runs jobs of `inside`; may be used by several threads at once."""

    def __init__(self, limits: Limits | None = None):
        """Raises SandboxError if code cannot be run here safely, after trying."""
        self.limits = limits or Limits()
        self.bwrap = find_bwrap()
        self.filter = seccomp.program()
        self.slots = threading.BoundedSemaphore(os.cpu_count() or 1)  # more at once would only use up the wall time
        trial = {"tests": ["assert f() == 2"], "first": 0, "names": ["f"], "stubs": {}}
        run = self.run("def f(): return 2", trial, max(self.limits.wall_s, 20.0))
        if run.report[-1:] != ({"test": 0, "error": None},):
            raise SandboxError(f"the sandbox: a trial run gave {run}; expected a test that passes")

    def run(self, code: str, tests: dict[str, Any], seconds: float) -> Run:
        """Runs `tests`, a job of `inside`, on `code`, for `seconds` of wall time at most. Raises SandboxError if a
        sandbox cannot be set up."""
        limits = self.limits.job()
        jobs = {"code": {"limits": limits, "code": code}, "tests": {"limits": limits, **tests}}
        with contextlib.ExitStack() as stack:
            requests, replies = pipe(stack), pipe(stack)
            errors = stack.enter_context(tempfile.TemporaryFile())
            ends = {"code": (requests[0].fileno(), replies[1].fileno())}
            ends["tests"] = replies[0].fileno(), requests[1].fileno()
            processes = {r: stack.enter_context(self.start(r, jobs[r], ends[r], errors)) for r in ends}
            for end in (*requests, *replies):
                end.close()  # so that each side sees the end of the other
            report, stopped = read_report(processes["tests"].stdout, time.monotonic() + seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if stopped is None:
                    processes["code"].wait(GRACE)
            for process in processes.values():
                process.kill()
            code_status, tests_status = (processes[role].wait() for role in ("code", "tests"))
            errors.seek(0)
            if complaint := errors.read(2000).decode(errors="replace").strip():
                raise SandboxError(f"{self.bwrap}: {complaint}; expected a sandbox (user namespaces may be forbidden)")
        return Run(report, status(code_status), status(tests_status), stopped)

    @contextlib.contextmanager
    def start(
        self, role: str, job: dict[str, Any], ends: tuple[int, int], errors: IO[bytes]
    ) -> Iterator[subprocess.Popen[bytes]]:
        with memory_file(json.dumps(job).encode()) as stdin, memory_file(self.filter) as filter_file:
            command = [*self.command(filter_file.fileno()), role, *map(str, ends)]
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE if role == "tests" else subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(*ends, filter_file.fileno()),
                env={},
                cwd="/",
                start_new_session=True,  # a Ctrl-C is for us, and says nothing about the code
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def command(self, filter_fd: int) -> list[str]:
        """The start of the command line, up to the arguments of `inside`. Nothing from outside is in it."""
        executable, folders = interpreter()
        options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
        options += ["--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
        options += ["--setenv", "PYTHONHASHSEED", "0"]
        options += ["--setenv", "LD_LIBRARY_PATH", ":".join(folders)] if folders else []
        options += ["--seccomp", str(filter_fd)]
        for folder in SYSTEM:
            if os.path.islink(folder):
                options += ["--symlink", os.readlink(folder), folder]
            elif os.path.isdir(folder):
                options += ["--ro-bind", folder, folder]
        for path in (*folders, executable):
            options += ["--ro-bind", path, path]
        for device in ("/dev/null", "/dev/urandom"):
            options += ["--dev-bind", device, device]
        options += ["--ro-bind", str(PROGRAM), "/inside.py"]
        if self.limits.tmp_mb:
            options += ["--size", str(self.limits.job()["file_bytes"]), "--tmpfs", "/tmp"]
        options += ["--chdir", "/", "--remount-ro", "/"]
        return [self.bwrap, *options, "--", executable, "-s", "-S", "-P", "-B", "-X", "utf8", "/inside.py"]


def find_bwrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxError(
            f"the sandbox: found no program bwrap; expected bubblewrap, to run generated code: {INSTALL}"
        )
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    if version < LEAST:
        wanted = ".".join(map(str, LEAST))
        raise SandboxError(f"{path}: found {said.strip()!r}; expected version {wanted} or newer: {INSTALL}")
    return path


def interpreter() -> tuple[str, list[str]]:
    """This Python, outside its virtual environment, and the folders of its libraries that are not the system's. They
    are seen under their own paths, because that is where they look for one another."""
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    base = Path(executable).parents[1]
    if base == Path("/usr"):
        return executable, []
    return executable, [str(base / name) for name in ("lib", "lib64") if (base / name).is_dir()]


def pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Both ends, to be closed early, and else with `stack`. Files, because closing a file twice is harmless, whereas
    the number of a closed descriptor may be another thread's by then."""
    reads, writes = os.pipe()
    return stack.enter_context(open(reads, "rb", 0)), stack.enter_context(open(writes, "wb", 0))


@contextlib.contextmanager
def memory_file(data: bytes) -> Iterator[IO[bytes]]:
    with open(os.memfd_create("job"), "r+b") as file:
        file.write(data)
        file.seek(0)
        yield file


def read_report(stdout: IO[bytes] | None, deadline: float) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """The whole lines that came until the end, the deadline or too many bytes; and which of the latter two it was."""
    assert stdout is not None
    data, stopped = b"", None
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while True:
            if len(data) > REPORT:
                stopped = "report"
                break
            if not selector.select(max(0.0, deadline - time.monotonic())):
                stopped = "time"
                break
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                break
            data += chunk
    lines = data.split(b"\n")[:-1]
    return tuple(json.loads(line) for line in lines), stopped


def status(code: int) -> int:
    return 128 - code if code < 0 else code
