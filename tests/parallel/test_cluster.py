"""Which flags and which cache a platform gets, found out without starting a backend; nothing else is touched."""

import os
import subprocess
import sys

import pytest

from easylm_plus.parallel import cluster

ONEDNN = "--xla_cpu_experimental_onednn_custom_call=true --xla_cpu_experimental_ynn_fusion_type="
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@pytest.fixture
def machine(monkeypatch):
    """A function (files there, libtpu installed, environment) that makes this machine look like another."""

    def look(files=(), libtpu=False, **environment):
        for name in ("JAX_PLATFORMS", "TPU_WORKER_ID", "XLA_FLAGS", "EASYLM_PLUS_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cluster.os.path, "exists", lambda path: path in files)
        monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: (libtpu and name == "libtpu") or None)

    return look


PLATFORMS = {
    "nothing": ({}, "cpu"),
    "chosen cpu beside a GPU": ({"files": ["/dev/nvidiactl"], "JAX_PLATFORMS": "cpu"}, "cpu"),
    "chosen cuda": ({"JAX_PLATFORMS": "cuda"}, "gpu"),
    "chosen rocm": ({"JAX_PLATFORMS": "rocm"}, "gpu"),
    "cuda first": ({"JAX_PLATFORMS": "cuda,cpu"}, "gpu"),
    "cpu first": ({"JAX_PLATFORMS": "cpu,cuda"}, "cpu"),
    "chosen tpu": ({"JAX_PLATFORMS": "tpu,cpu"}, "tpu"),
    "an NVIDIA driver": ({"files": ["/dev/nvidiactl"]}, "gpu"),
    "a TPU": ({"files": ["/dev/accel0"], "libtpu": True}, "tpu"),
    "a TPU by VFIO": ({"files": ["/dev/vfio"], "libtpu": True}, "tpu"),
    "a worker of a pod": ({"libtpu": True, "TPU_WORKER_ID": "0"}, "tpu"),
    "VFIO without libtpu": ({"files": ["/dev/vfio"]}, "cpu"),
    "libtpu without a TPU": ({"libtpu": True}, "cpu"),
}


@pytest.mark.parametrize("look, platform", PLATFORMS.values(), ids=PLATFORMS)
def test_the_platform(machine, look, platform):
    machine(**look)
    assert cluster._platform() == platform


FLAGS = {
    ("cpu", "float32", False): "",
    ("cpu", "float32", True): "",
    ("cpu", "bf16", False): ONEDNN,
    ("cpu", "bf16", True): ONEDNN,
    ("cpu", "bf16_pure", False): ONEDNN,
    ("tpu", "float32", False): "",
    ("tpu", "bf16", True): "",
    ("cuda", "float32", False): "",
    ("cuda", "bf16", False): "",
    ("cuda", "bf16", True): DETERMINISTIC,
    ("cuda", "float32", True): DETERMINISTIC,
}


@pytest.mark.parametrize("platform, precision, deterministic", FLAGS)
@pytest.mark.parametrize("before", ["", "--xla_dump_to=/x"])
def test_what_the_flags_become(machine, before, platform, precision, deterministic):
    machine(JAX_PLATFORMS=platform, XLA_FLAGS=before)
    others = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    for _ in range(2):  # a second call adds nothing
        cluster.set_backend_flags(precision, deterministic)
        wanted = FLAGS[platform, precision, deterministic]
        assert os.environ["XLA_FLAGS"] == f"{before} {wanted}".strip()
    assert {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} == others


def test_telling_only_gpus_apart_is_seen(machine, monkeypatch):
    """As it was: whatever is no GPU got the CPU's flags, and a TPU no compilation cache because of them."""
    machine(JAX_PLATFORMS="tpu")
    monkeypatch.setattr(cluster, "_platform", lambda: "gpu" if "cuda" in os.environ["JAX_PLATFORMS"] else "cpu")
    cluster.set_backend_flags("bf16", deterministic=False)
    assert os.environ["XLA_FLAGS"] != FLAGS["tpu", "bf16", True]


@pytest.mark.parametrize("flags, accepted", [(None, True), ("--xla_cpu_no_such_flag=true", False)])
def test_xla_knows_the_flags_of_a_cpu(flags, accepted):
    """XLA ends the process at a flag that it does not know, so a flag that a version drops would stop every run."""
    script = "import sys; from easylm_plus.parallel import cluster; cluster.set_backend_flags('bf16', False); "
    script += "import jax; assert float(jax.numpy.ones(3).sum()) == 3; print('went on')"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags or ""}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=400)
    assert ("went on" in done.stdout) == accepted == (done.returncode == 0), done.stderr[-2000:]


# --- the cache ---


@pytest.fixture
def updates(monkeypatch):
    """What is asked of jax.config, which itself stays as it is."""
    asked = {}
    monkeypatch.setattr(cluster.jax.config, "update", asked.__setitem__)
    return asked


ALWAYS = {"jax_persistent_cache_min_compile_time_secs": 0.5, "jax_persistent_cache_min_entry_size_bytes": -1}


def test_where_compiled_programs_are_kept(machine, updates, monkeypatch):
    machine(EASYLM_PLUS_CACHE="/somewhere")
    cluster.use_compilation_cache()
    assert updates == {**ALWAYS, "jax_compilation_cache_dir": "/somewhere/xla"}
    machine(HOME="/home/someone")
    cluster.use_compilation_cache()
    assert updates == {**ALWAYS, "jax_compilation_cache_dir": "/home/someone/.cache/easylm_plus/xla"}


@pytest.mark.parametrize("platform, precision, kept", [("cpu", "bf16", False), ("cpu", "float32", True),
                                                       ("tpu", "bf16", True), ("cuda", "bf16", True)])  # fmt: skip
def test_programs_that_call_onednn_are_not_kept(machine, updates, platform, precision, kept):
    machine(JAX_PLATFORMS=platform)
    cluster.set_backend_flags(precision, deterministic=True)
    cluster.use_compilation_cache()
    assert bool(updates) == kept
