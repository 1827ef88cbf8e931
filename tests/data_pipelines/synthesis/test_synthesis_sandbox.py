"""What generated code can do in the sandbox: nothing but compute. Every probe reaches its aim outside of it."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.files.records import read_rows
from data_pipelines.synthesis import sandbox as module
from data_pipelines.synthesis import seccomp
from data_pipelines.synthesis.judge import Failure, judge
from data_pipelines.synthesis.sandbox import Limits, Sandbox, SandboxError

ROOT = Path(__file__).parents[3]


def unusable():
    try:
        Sandbox()
    except SandboxError as error:
        return str(error)
    return ""


WHY_NOT = unusable()
needs_bwrap = pytest.mark.skipif(bool(WHY_NOT), reason=f"NOTHING ABOUT THE SANDBOX IS TESTED: {WHY_NOT}")


@pytest.fixture(scope="module")
def box():
    return Sandbox(Limits(cpu_s=1, wall_s=15, memory_mb=256))


def failure(box, code, *tests):
    return judge(box, textwrap.dedent(code), tests or ("assert f(2) == 4",), ["f"]).failure


# --- what it cannot reach ---

PROBES = {
    "a file of ours": "return open({canary!r}).read()",
    "the users": "return len(open('/etc/passwd').read())",
    "the list of processes": "return os.listdir('/proc')",
    "our process": "return os.kill({pid}, 0) is None",
    "a file to write": "return open({new!r}, 'w').write('x')",
    "a file next to the program": "return open('made', 'w').write('x')",
    "a link to outside": "os.symlink({canary!r}, 'link'); return open('link').read()",
    "the network": "return socket.create_connection(('127.0.0.1', {port}), 5) is not None",
    "an abstract socket": "s = socket.socket(socket.AF_UNIX); return s.connect({abstract!r}) is None",
    "another process": "pid = os.fork(); pid or os._exit(0); return os.waitpid(pid, 0)",
    "a thread": "t = threading.Thread(target=int); t.start(); return True",
    "a program": "return subprocess.run(['/bin/sh', '-c', 'exit 0']).returncode == 0",
    "a secret of the environment": "return os.environ['SECRET']",
    "a memory file": "return os.memfd_create('x')",
    "tracing": "return C.ptrace(0, 0, 0, 0) == 0",
    "shared memory": "return C.shmget(0, 4096, 0o1600) >= 0",
    "other devices": "return set(os.listdir('/dev')) - {{'null', 'urandom'}}",
    "reading input": "return sys.stdin.read() or open(0, 'rb', closefd=False).read(5)",
}  # fmt: skip
PROBE = """
import ctypes, os, socket, subprocess, sys, threading
C = ctypes.CDLL(None)
def probe():
    {body}
def f():
    try:
        found = probe()
    except Exception as error:
        return "refused: " + type(error).__name__
    return "reached" if found else "refused"
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """What there is to reach: a file, a variable, and servers whose connections are counted."""
    (tmp_path / "canary").write_text("secret")
    monkeypatch.setenv("SECRET", "secret")
    abstract = f"\0easylm-plus-{os.getpid()}-{tmp_path.name}"
    tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    unix.bind(abstract)
    reached = []

    def accept(server):
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()
                reached.append(server)

    for server in (tcp, unix):
        server.listen()
        threading.Thread(target=accept, args=(server,), daemon=True).start()
    known = {"canary": str(tmp_path / "canary"), "new": str(tmp_path / "new")}
    yield {**known, "pid": os.getpid(), "port": tcp.getsockname()[1], "abstract": abstract}, reached
    for server in (tcp, unix):
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()


@needs_bwrap
@pytest.mark.parametrize("aim", PROBES)
def test_it_reaches_nothing(aim, outside, box, tmp_path):
    places, reached = outside
    code = PROBE.format(body=PROBES[aim].format(**places))
    found = failure(box, code, "assert f() == 'reached'")
    assert found and found.reason == "fails_tests" and "returned 'refused" in found.found
    assert not reached and sorted(p.name for p in tmp_path.iterdir()) == ["canary"]
    run = subprocess.run(  # and now without the sandbox
        [sys.executable, "-c", f"{code}\nprint(f())"], cwd=tmp_path, input="input", capture_output=True, text=True
    )
    assert run.stdout == "reached\n", run
    assert bool(reached) == ("network" in aim or "socket" in aim)


@needs_bwrap
def test_namespaces_hold_where_system_calls_are_not_refused(outside, box, monkeypatch, tmp_path):
    places, reached = outside
    allow = struct.pack("<HBBI", seccomp.RETURN, 0, 0, seccomp.ALLOW)
    monkeypatch.setattr(box, "filter", allow)
    for aim in ("the network", "an abstract socket", "our process", "a program", "the list of processes"):
        found = failure(box, PROBE.format(body=PROBES[aim].format(**places)), "assert f() == 'reached'")
        assert "returned 'refused" in found.found, found
    assert not reached
    thread = PROBE.format(body=PROBES["a thread"])  # which the namespaces do not refuse
    assert failure(box, thread, "assert f() == 'reached'") is None


@needs_bwrap
def test_it_is_nobody(box):
    code = """
    import ctypes, os, resource
    def f():
        header, caps = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[1] * 6)
        ctypes.CDLL(None).capget(header, caps)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except ValueError:
            return [os.getuid(), os.getgid(), os.getgroups(), sum(caps), os.uname().nodename, sorted(os.environ)]
    """
    names = ["LC_CTYPE", "LD_LIBRARY_PATH", "PWD", "PYTHONHASHSEED"]
    for some in (names, [n for n in names if n != "LD_LIBRARY_PATH"]):
        if failure(box, code, f"assert f() == [65534, 65534, [], 0, 'sandbox', {some}]") is None:
            return
    pytest.fail(str(failure(box, code, "assert f() == 0")))


# --- what it can use up, and how it can end ---

HOSTILE = {
    "ends": ("import os\ndef f(x): os._exit(0)", "exits"),
    "ends when loaded": ("import os\nos._exit(0)\ndef f(x): return 4", "exits"),
    "leaves": ("import sys\ndef f(x): sys.exit(0)", "fails_tests"),
    "loops": ("def f(x):\n while True: pass", "time_limit"),
    "loops when loaded": ("while True: pass", "time_limit"),
    "will not be stopped": (
        "import signal\ndef f(x):\n signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n while 1: pass",
        "killed",
    ),
    "wants memory": ("def f(x): return len('x' * 10**10)", "memory_limit"),
    "takes memory": ("def f(x):\n a = []\n while 1: a.append(bytearray(10**6))", "memory_limit"),
    "returns too much": ("def f(x): return 'x' * (2 << 20)", "output_limit"),
    "prints for ever": ("def f(x):\n while 1: print('x' * 10**5)", "time_limit"),
    "floods the pipe": (
        "import os\ndef f(x):\n for i in range(10**6):\n  try: os.write(i % 300, b'x' * 4096)\n  except OSError: pass",
        "output_limit",
    ),
    "breaks the pipe": ("import os\ndef f(x):\n os.closerange(3, 300)\n return 4", "exits"),
    "crashes": ("import ctypes\ndef f(x): ctypes.string_at(0)", "killed"),
    "forks a bomb": ("import os\ndef f(x):\n while 1: os.fork()", "fails_tests"),
    "kills": ("import os\ndef f(x):\n for p in (-1, 1, os.getppid()): os.kill(p, 9)\n return 5", "fails_tests"),
    "stops itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "killed"),
    "nests": ("def f(x):\n v = []\n for _ in range(10**5): v = [v]\n return v", "fails_tests"),
    "is not Python": ("def f(x): return return", "does_not_compile"),
    "is not Python either": ("def f(x): nonlocal x", "does_not_compile"),
    "fails when loaded": ("1 / 0\ndef f(x): return 4", "does_not_run"),
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_contained_and_named(name, box):
    code, reason = HOSTILE[name]
    found = failure(box, code)
    assert found.reason == reason, found


@needs_bwrap
def test_a_sleeper_is_ended():
    start = time.monotonic()
    tests = "assert f(0) == 0", "assert f(30) == 4", "assert f(0) == 0"
    code = "import time\ndef f(x):\n time.sleep(x)\n return 0"
    verdict = judge(Sandbox(Limits(wall_s=4)), code, tests, ["f"])
    assert [failure and failure.reason for failure in verdict.tests] == [None, "time_limit", "time_limit"]
    assert time.monotonic() - start < 14


@needs_bwrap
def test_files_are_limited():
    code = """
    def f(count):
        try:
            for i in range(count):
                with open(f"/tmp/{i}", "wb") as file:
                    for _ in range(4): file.write(bytes(1 << 18))
        except OSError as error:
            return error.strerror
        return "written"
    """
    box = Sandbox(Limits(tmp_mb=3))
    assert failure(box, code, "assert f(2) == 'written'", "assert f(9) == 'No space left on device'") is None
    assert failure(Sandbox(), code, "assert f(1) == 'No such file or directory'") is None


@needs_bwrap
def test_nothing_is_left_running(monkeypatch):
    """Neither after a run that is stopped, nor after the death of whoever runs it."""
    script = (
        "from data_pipelines.synthesis.sandbox import *; import sys\nbox = Sandbox(); print('up', flush=True)\n"
        "box.run('import time\\ndef f(): time.sleep(60)', {'tests': ['f()'], 'first': 0, 'names': ['f'], 'stubs': {}},"
        " float(sys.argv[1]))\nprint('down', flush=True)\nsys.stdin.read()"
    )
    for seconds in (4.0, 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        with process:
            assert process.stdout.readline() == "up\n"
            below = until(lambda process=process: len(found := descendants(process.pid)) >= 6 and found)
            if seconds < 10:
                assert process.stdout.readline() == "down\n"
            else:
                process.send_signal(signal.SIGKILL)
            until(lambda below=below: not any(map(alive, below)))
            process.kill()


def descendants(pid):
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, thread.read_text().split()):
            found += [child, *descendants(child)]
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition):
    end = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


# --- verdicts ---


@needs_bwrap
def test_all_tests_are_run_and_the_failures_described(box):
    code = "import os\ndef f(x):\n    if x == 2: os._exit(3)\n    if x == 3: raise KeyError('no 3')\n    return 4 * x"
    verdict = judge(box, code, [f"assert f({i}) == 16" for i in (2, 4, 3, 1)], ["f"])
    assert verdict.tests == (
        Failure("exits", "assert f(2) == 16\nExit: the code ended its process in a call, with status 3"),
        None,
        Failure("fails_tests", "assert f(3) == 16\nKeyError: 'no 3' (line 4)\nf(3) raised KeyError"),
        Failure("fails_tests", "assert f(1) == 16\nAssertionError\nf(1) returned 4"),
    )
    assert verdict.passed == (1,) and verdict.failure == verdict.tests[0]


# name: (code, whether it would do if code and test ran in one process)
FORGERS = {
    "is equal to everything": ("class A:\n def __eq__(s, o): return True\ndef f(x): return A()", True),
    "is a number and equal": ("class A(int):\n def __eq__(s, o): return True\ndef f(x): return A(5)", True),
    "reads the caller": (
        "import sys\ndef f(x):\n g = sys._getframe(1)\n return next(c for c in g.f_code.co_consts if c == 4)",
        True,
    ),
    "reads all text": (
        "import gc\nT = '== ' + str(4)\ndef f(x):\n return 5 - any(T in o for o in gc.get_objects() if type(o) is str)",
        False,
    ),
    "reads the harness": ("T = '== ' + str(4)\ndef f(x): return 5 - (T in open('/inside.py').read())", False),
    "replaces the harness": (
        'import json\njson.dumps = lambda m: \'{"value": ["any"], "arguments": []}\'\ndef f(x): return 5',
        False,
    ),
    "ends the run": ("import os\ndef f(x):\n print('passed', flush=True)\n os._exit(0)", True),
    "prints a report": ('def f(x):\n print(\'{"test": 0, "error": null}\', flush=True)\n return 5', False),
    "replies for itself": (
        'import os\ndef f(x):\n for i in range(3, 300):\n  try: os.write(i, b\'{"test": 0, "error": null}\\n\')\n'
        "  except OSError: pass\n return 5",
        False,
    ),
    "changes assert": (
        "import sys, builtins\nsys.excepthook = lambda *a: print('passed')\ndef f(x): return 5",
        True,
    ),
}


@needs_bwrap
@pytest.mark.parametrize("name", FORGERS)
def test_a_result_cannot_be_forged(name, box):
    code, does = FORGERS[name]
    found = failure(box, code)
    assert found and found.reason in ("fails_tests", "exits")
    if does:
        naive = [sys.executable, "-c", f"{code}\nassert f(2) == 4\nprint('passed')"]
        assert subprocess.run(naive, capture_output=True, text=True).stdout == "passed\n"


LINES = (
    "", "{", "[]", "4", "null", "NaN", '"x"', "[" * 10**5, "{}", '{"value": 4}', '{"value": ["int", "0x4"]}',
    '{"value": ["int"], "arguments": []}', '{"value": ["list", 5], "arguments": []}',
    '{"value": ["any", "0x4"], "arguments": []}', '{"value": ["float", "x"], "arguments": []}',
    '{"value": ["set", [["list", []]]], "arguments": []}', '{"value": {"int": "0x4"}, "arguments": []}',
    '{"error": 5}', '{"error": {}}', '{"error": null}', '{"error": []}', '{"error": "", "value": null}',
    '{"error": {"type": 1, "message": {}, "line": [], "kinds": [1, "ExceptionGroup", "UnicodeError", "list"]}}',
    '{"error": {"type": "E", "message": "m", "line": 1, "kinds": ["SystemExit", "KeyboardInterrupt", "object"]}}',
    '{"load": []}', '{"load": {}}', '{"load": 1, "compiled": 7}', '{"load": {"type": [], "message": 5, "line": "1"}}',
    '{"value": ["int", "0x5"], "arguments": [["int", "0x2"]]}', '{"test": 0, "error": null}', "\\ud800", "\\xff",
)  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("early", (True, False))
def test_replies_that_are_none_fail_the_test(early, box):
    """Made by code that speaks for the program it runs in: from the start, or from the first call on."""
    for line in LINES[::3] if early else LINES:
        replaced = f"json.dumps = lambda message: {line!r}"
        code = f"import json\n{replaced if early else ''}\ndef f(x):\n    {replaced}\n    return 5"
        verdict = judge(box, code, ["assert f(2) == 4"], ["f"])
        assert verdict.failure and not verdict.passed, line
        assert all(isinstance(failure.found, str) for failure in filter(None, [verdict.load, *verdict.tests]))


@pytest.mark.real_data
@needs_bwrap
def test_human_eval_is_judged_right():
    """Its solutions pass its tests, and functions without a body do not."""
    path = ROOT.parent / "shared/data/eval/humaneval/HumanEval.jsonl.gz"
    for _, row in list(read_rows(path))[::12]:
        test = f"{row['test']}\ncheck({row['entry_point']})"
        for body, right in ((row["canonical_solution"], True), ("    return None\n", False)):
            names = re.findall(r"^def (\w+)", row["prompt"], re.MULTILINE)
            found = judge(Sandbox(Limits(wall_s=60)), row["prompt"] + body, [test], names, stubs={})
            assert (found.failure is None) == right, row["task_id"]


@needs_bwrap
def test_values_cross_as_they_are(box):
    values = "None, True, 2, -(10**50), 0.1, 1e300, 1j, 'é\\ud800', b'\\xff', [1, [2]], (1,), {1: (2, 's')}, {3}"
    values += ", frozenset({4}), [], {}, '', 0.0, float('inf')"
    code = "def f(x): return x\ndef g(x): x.append(9)"
    same = f"def test():\n    for v in ({values}):\n        assert f(v) == v and repr(f(v)) == repr(v)\ntest()"
    changed = "def test():\n    x = [1]\n    g(x)\n    assert x == [1, 9]\ntest()"
    assert judge(box, code, [same, changed], ["f", "g"]).failure is None
    enums = """
    import collections, enum
    class Size(enum.IntEnum): BIG = 3
    def f(): return [Size.BIG, collections.Counter("aab"), collections.namedtuple("P", "x y")(1, 2)]
    """
    assert failure(box, enums, "assert repr(f()) == \"[3, {'a': 2, 'b': 1}, (1, 2)]\"") is None
    assert "generator is not plain data" in failure(box, "def f(x): return (i for i in x)", "assert f([1])").found


@needs_bwrap
def test_what_is_found_can_be_written_down(box):
    code = "def f(x): raise ValueError('\\ud800\\0' + 'x' * 9999)"
    found = failure(box, code, "assert f('\\ud800') == 4").found
    assert "ValueError: ?" in found and len(found.encode()) < 2000


@needs_bwrap
def test_exceptions_cross_by_kind(box):
    code = "class Mine(KeyError): pass\ndef f(x):\n    raise {1: ValueError, 2: Mine, 3: SystemExit}[x]('said')"
    test = "def test():\n try: f({})\n except {} as e: assert 'said' in str(e)\n else: assert False\ntest()"
    cases = (1, "ValueError"), (2, "KeyError"), (2, "LookupError"), (3, "RuntimeError")
    right = [test.format(*case) for case in cases]
    assert judge(box, code, right, ["f"]).failure is None
    assert judge(box, code, [test.format(1, "KeyError")], ["f"]).failure.reason == "fails_tests"


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "tests", "empty", "stubs"),
    (
        ("def f(x): return x", ["assert f(1) == 1", "assert f(2) == 2"], (), ()),
        ("def f(x): return x", ["assert True", "assert f(2) == 2", "assert f(3) == 3"], (0,), ()),
        ("def f(x): return x > 0", ["assert f(1)", "assert f(5) is True"], (), ("True",)),
        ("def f(x): return x > 0", ["assert f(1)", "assert not f(0)"], (), ()),
        ("def f(x): pass", ["assert f(1) is None", "assert f(2) == f(1)"], (), ("None",)),
        ("def f(x): return x", ["def test():\n try: f(1)\n except Exception: pass\ntest()"], (0,), 7),
    ),
)  # fmt: skip
def test_tests_that_test_nothing_are_found(code, tests, empty, stubs, box):
    verdict = judge(box, code, tests, ["f"])
    assert verdict.failure is None and verdict.empty == set(empty)
    assert len(verdict.passing_stubs) == stubs if isinstance(stubs, int) else verdict.passing_stubs == stubs


@needs_bwrap
def test_verdicts_do_not_change_from_run_to_run(box):
    code = "import random\nSETS = {'a', 'b', 'c', 'd', 'e'}\ndef f(): return [list(SETS), random.random(), hash('x')]"
    found = {failure(box, code, "assert f() == 0").found for _ in range(3)}
    assert len(found) == 1


# --- without bubblewrap, or with one that does not do ---


def test_without_bubblewrap_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"found no program bwrap; expected bubblewrap.*apt-get install bubblewrap"):
        Sandbox()


@pytest.mark.parametrize(
    ("script", "message"),
    (
        ("echo bubblewrap 0.6.1", "found 'bubblewrap 0.6.1'; expected version 0.8 or newer"),
        (
            '[ "$1" = --version ] && echo bubblewrap 0.9.0 || { echo "bwrap: No permissions" >&2; exit 1; }',
            "bwrap: No permissions; expected a sandbox",
        ),
        ('[ "$1" = --version ] && echo bubblewrap 0.9.0', "a trial run gave"),
    ),
)
def test_a_sandbox_that_does_not_work_is_an_error(script, message, monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(fake))
    with pytest.raises(SandboxError, match=message):
        Sandbox()


# --- the filter of system calls, run on paper ---


def answer(program, arch, number, argument=0):
    """What the kernel would do: the classic BPF that `seccomp` uses, and no more."""
    data = struct.pack("<IIQQ", number, arch, 0, argument)
    steps = [struct.unpack("<HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    at = value = 0
    while True:
        code, if_true, if_false, k = steps[at]
        at += 1
        if code == seccomp.LOAD:
            (value,) = struct.unpack_from("<I", data, k)
        elif code == seccomp.RETURN:
            return k
        else:
            at += if_true if (value == k if code == seccomp.JUMP_EQUAL else value >= k) else if_false


@pytest.mark.parametrize(("machine", "column"), (("x86_64", 0), ("aarch64", 1)))
def test_the_filter(machine, column):
    program, arch = seccomp.program(machine), seccomp.AUDIT_ARCH[machine]
    eperm = seccomp.ERRNO | 1
    for name, numbers in seccomp.DENIED.items():
        assert numbers[column] is None or answer(program, arch, numbers[column]) == eperm, name
    denied = {numbers[column] for numbers in seccomp.DENIED.values()}
    rest = set(range(500)) - denied - {seccomp.CLONE3[column], seccomp.SOCKET[column]}
    assert {answer(program, arch, number) for number in rest} == {seccomp.ALLOW}
    assert answer(program, arch, seccomp.CLONE3[column]) == seccomp.ERRNO | 38
    sockets = {family: answer(program, arch, seccomp.SOCKET[column], family) for family in range(50)}
    assert [family for family, what in sockets.items() if what == seccomp.ALLOW] == [socket.AF_UNIX]
    assert answer(program, 0x40000003, 1) == seccomp.KILL  # i386
    if machine == "x86_64":
        assert answer(program, arch, seccomp.X32 | 56) == seccomp.KILL


def test_the_filter_knows_its_machines():
    with pytest.raises(InputError, match="found a machine of type 'sparc'; expected x86_64 or aarch64"):
        seccomp.program("sparc")
