"""How the tests run: eight fake CPU devices, exact float32 products, compiled programs kept between runs.

Machine code is not optimised, which halves the time to compile; the optimised HLO, which tests read, is the same.
All of it is set through the environment, before anything imports JAX, so that tests without JAX stay without it and
the commands that tests start inherit it. JAX_PLATFORMS=cuda runs the tests elsewhere. Python looks for cycles to free a
hundred times less often: tracing makes many objects, and few of these.
"""

import functools
import gc
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("EASYLM_PLUS_CACHE") or Path.home() / ".cache" / "easylm_plus") / "xla_tests"
DATA = Path(__file__).parents[2] / "shared" / "data"
# marker -> the variable that names a Python interpreter with what such tests compare with, and what that is
PEERS = {
    "parity": ("EASYLM_PLUS_PEER", "torch and transformers"),
    "engine": ("EASYLM_PLUS_ENGINE", "llama_cpp (llama-cpp-python)"),
    "beam": ("EASYLM_PLUS_BEAM", "apache-beam and our requirements"),
}
COMPILERS = {"gpu": "jax_cuda13_plugin", "tpu": "libtpu"}
NO_COMPILER = "compiling for a machine that is not here needs, beside jax: "

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
XLA = {
    "xla_force_host_platform_device_count": 8,
    "xla_backend_optimization_level": 0,
    # a device that waits longer than this for the others ends the process; 40 s are little where 8 share a busy core
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}
for flag, value in XLA.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()

gc.set_threshold(200_000, 50, 1000)


def peer_interpreter(marker: str) -> Path | None:
    """The interpreter that tests so marked compare with, if there is one."""
    path = os.environ.get(PEERS[marker][0], "")
    return Path(path) if path and os.access(path, os.X_OK) and Path(path).is_file() else None


def absent(marker: str) -> str:
    variable, packages = PEERS[marker]
    return f"{marker} tests need {variable} = a Python interpreter with {packages}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("real_data") and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no {DATA}"))
        for marker in PEERS:
            if item.get_closest_marker(marker) and peer_interpreter(marker) is None:
                item.add_marker(pytest.mark.skip(reason=absent(marker)))
        if (aot := item.get_closest_marker("aot")) and not importlib.util.find_spec(COMPILERS[aot.args[0]]):
            item.add_marker(pytest.mark.skip(reason=NO_COMPILER + COMPILERS[aot.args[0]]))
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for marker, (_, packages) in PEERS.items():
        if count := sum(absent(marker) in str(report.longrepr) for report in skipped):
            told = f"NOT COMPARED with {packages}: {count} test(s) skipped; {absent(marker)}"
            terminalreporter.write_line(told, red=True, bold=True)
    for platform, package in COMPILERS.items():
        if count := sum(NO_COMPILER + package in str(report.longrepr) for report in skipped):
            told = f"NOT COMPILED for a {platform.upper()}: {count} test(s) skipped; {NO_COMPILER}{package}"
            terminalreporter.write_line(told, red=True, bold=True)


@pytest.fixture
def real_data() -> Path:
    """The folder of real files; a test that takes it is marked `real_data`, and skipped where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}")
    return DATA


def interpreter(marker: str) -> Path:
    path = peer_interpreter(marker)
    if path is None:
        pytest.skip(absent(marker))
    return path


@pytest.fixture(scope="session")
def peer() -> Path:
    """The interpreter with torch and transformers; a test that takes it is marked `parity`."""
    return interpreter("parity")


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The interpreter with llama.cpp; a test that takes it is marked `engine`."""
    return interpreter("engine")


@pytest.fixture(scope="session")
def beam_python() -> Path:
    """The interpreter with Apache Beam; a test that takes it is marked `beam`."""
    return interpreter("beam")


CACHED = type(functools.cache(len))
MAPPINGS = 35_000  # of memory; Linux allows a process 65,530, and XLA ends it in the middle of a compilation there
_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Drops compiled programs where there are many: each takes several mappings of memory for as long as it lives."""
    yield
    mappings = Path("/proc/self/maps")
    if next(_finished) % 20 or "jax" not in sys.modules or not mappings.is_file():
        return
    if mappings.read_bytes().count(b"\n") > MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def no_caches_of_other_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drops what a file's own caches hold, programs among it, when its tests are done."""
    yield
    for value in vars(request.module).values():
        if isinstance(value, CACHED) and value.__module__ == request.module.__name__:
            value.cache_clear()
