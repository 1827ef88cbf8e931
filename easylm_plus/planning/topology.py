"""Devices of machines that are not here, to compile for (`jax.experimental.topologies`).

    h100:1x4x8    NVIDIA GPUs: NVLink domains x hosts x GPUs a host; targets/ has a file for each kind
    v5p:4x4x2     Cloud TPUs: generation and shape in chips; v2 to v6e and tpu7x, as libtpu knows them

The compiler comes with a plugin that runs without its device: for GPUs jax's CUDA plugin without the CUDA libraries
(415 MB), for TPUs libtpu. Nothing can be run or timed on such devices, and GPU kernels are not tuned.
"""

import dataclasses
import importlib.util
import os
import re
from importlib import metadata
from importlib.resources import files
from typing import Any

import jax
from jax.experimental import topologies

from easylm_plus.errors import UserError

TARGETS = files("easylm_plus.planning") / "targets"
GPUS = tuple(sorted(f.name.removesuffix(".txtpb") for f in TARGETS.iterdir() if f.name.endswith(".txtpb")))
TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
# Without a GPU XLA cannot time its kernels, and would take its own Triton products instead of the library's calls.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of no consequence, but its absence is complained about
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # two processes may compile at a time: no device is held
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a name stands for."""

    name: str
    platform: str  # gpu | tpu
    devices: list[Any]  # jax.Device, which nothing can be put on
    memory: int | None  # bytes of one device; None: the compiler itself refuses what does not fit (TPU)
    options: dict[str, Any]  # compiler options


def machine(name: str) -> Machine:
    """The devices of a named machine. Raises UserError for a name that is none, or a plugin that is not installed."""
    kind, _, shape = name.partition(":")
    if kind in GPUS and re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", shape):
        return _gpus(name, kind, shape)
    if kind in TPUS and re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", shape):
        return _tpus(name)
    raise UserError(
        f"machine {name!r}: expected {'|'.join(GPUS)}:DOMAINSxHOSTSxGPUS, as h100:1x4x8, or "
        f"{'|'.join(TPUS)}:XxY[xZ] in chips, as v5p:4x4x2"
    )


def missing(platform: str) -> str:
    """What to install to compile for gpu or tpu: a command; "" if it is there."""
    version = metadata.version("jaxlib")
    if platform == "gpu":
        if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
            return ""
        return f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
    return "" if importlib.util.find_spec("libtpu") else f"pip install 'jax[tpu]=={metadata.version('jax')}'"


def _require(name: str, platform: str) -> None:
    if command := missing(platform):
        raise UserError(f"machine {name!r}: the {platform.upper()} compiler is not installed; expected: {command}")


def _gpus(name: str, kind: str, shape: str) -> Machine:
    _require(name, "gpu")
    target = (TARGETS / f"{kind}.txtpb").read_text("utf-8")
    found = topologies.get_topology_desc(platform="cuda", topology_name=kind, target_config=target, topology=shape)
    memory = int(re.findall(r"^\s*device_memory_size: (\d+)$", target, re.MULTILINE)[0])
    return Machine(name, "gpu", list(found.devices), memory, GPU_OPTIONS)


def _tpus(name: str) -> Machine:
    _require(name, "tpu")
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"machine {name!r}: libtpu knows no such topology ({error})") from None
    return Machine(name, "tpu", list(found.devices), None, {})
