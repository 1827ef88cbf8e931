"""Before the first array: how this process finds its devices and the other processes of the job."""

import importlib.util
import os

import jax
from jax.experimental import multihost_utils

# XLA:CPU multiplies bfloat16 through oneDNN, which uses the processor's matrix units, only when asked to and when no
# other library is in its way; the step is 1.2 times as fast and compiles in a quarter of the time (docs/LOG.md).
_CPU_BF16 = ("--xla_cpu_experimental_onednn_custom_call=true", "--xla_cpu_experimental_ynn_fusion_type=")
_GPU_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def set_backend_flags(precision: str, deterministic: bool) -> None:
    """Adds what the precision and determinism settings need to XLA_FLAGS; must precede the first use of a device."""
    wanted = [_GPU_DETERMINISTIC] if deterministic and _platform() == "gpu" else []
    if precision != "float32" and _platform() == "cpu":
        wanted += _CPU_BF16
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*flags, *(flag for flag in wanted if flag not in flags)])


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $EASYLM_PLUS_CACHE or ~/.cache/easylm_plus.

    Not those that call oneDNN: XLA cannot write them, and warns of each.
    """
    if _CPU_BF16[0] in os.environ.get("XLA_FLAGS", ""):
        return
    folder = os.environ.get("EASYLM_PLUS_CACHE") or os.path.expanduser("~/.cache/easylm_plus")
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def join() -> None:
    """Joins the other processes of a job, if there are any.

    On TPU pods and under Slurm JAX finds them by itself; elsewhere JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(address, int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"]))
    elif int(env.get("SLURM_NTASKS", 1)) > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def meet(name: str) -> None:
    """Waits until all processes of the job are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _platform() -> str:
    """cpu, gpu or tpu, without asking JAX: that would start the backend, and flags would come too late."""
    if chosen := os.environ.get("JAX_PLATFORMS", "").split(",")[0]:
        return {"cuda": "gpu", "rocm": "gpu"}.get(chosen, chosen)
    if os.path.exists("/dev/nvidiactl"):
        return "gpu"
    tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio") or "TPU_WORKER_ID" in os.environ
    return "tpu" if tpu and importlib.util.find_spec("libtpu") else "cpu"
