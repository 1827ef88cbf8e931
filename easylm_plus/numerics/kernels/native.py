"""The CPU kernels (cpu.cc): compiled for this machine when they are first used, and kept.

    $EASYLM_PLUS_CACHE or ~/.cache/easylm_plus, native/<hash>.so

The hash is of the source, the compiler and jaxlib, whose headers are compiled in. The library holds code for every
processor of its kind and is asked which this one can run, so a home folder may be shared by different machines.

A machine without a compiler has no kernels; `found` says why.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib import version

SOURCE = files("easylm_plus.numerics.kernels") / "cpu.cc"
COMPILERS = ("c++", "g++", "clang++")  # unless $CXX names one
# no contraction: a product has to be rounded before it is added to, as XLA does
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
PATIENCE = 300  # seconds; it takes five
LEVELS = ("portable", "AVX2", "AVX-512 VNNI")
HANDLERS = ("TernaryProduct", "IntegerProduct", "RowsProduct")
MOST_TOKENS = 8  # from there on XLA's int8 products, which unpack once for all tokens, are as fast
MOST_INPUTS = 2**19 - 256  # in-features: sums stay below 2^31


class Native(NamedTuple):
    """Kernels that are there."""

    level: int  # the best of LEVELS that this processor can run
    prefix: str  # of the names that XLA knows the handlers by


class Missing(NamedTuple):
    """Kernels that are not."""

    reason: str


@functools.cache
def found() -> Native | Missing:
    """The kernels, compiled and registered by the first call."""
    try:
        path = _compiled()
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError, RuntimeError, ValueError) as error:  # no home, no such CXX
        return Missing(_told(error))
    library.BestLevel.restype = ctypes.c_int64
    prefix = f"easylm_plus_{path.stem}_"  # a compiled program that was kept means this very source
    for name in HANDLERS:
        jax.ffi.register_ffi_target(prefix + name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return Native(library.BestLevel(), prefix)


def ternary_product(x_ND: jax.Array, codes: jax.Array, gamma: jax.Array, level: int | None = None) -> jax.Array:
    """x[N, D] times packed uint8[F, P/4] and gamma, float32 -> [N, F] in x's dtype; N up to MOST_TOKENS."""
    return _of_floats("TernaryProduct", x_ND, codes, gamma, level)


def rows_product(x_ND: jax.Array, codes: jax.Array, scale_F: jax.Array, level: int | None = None) -> jax.Array:
    """x[N, D] times rows int8[F, D], each with its scale -> [N, F] in x's dtype."""
    return _of_floats("RowsProduct", x_ND, codes, scale_F, level)


def integer_product(x_ND: jax.Array, codes: jax.Array, level: int | None = None) -> jax.Array:
    """int8[N, D] times packed uint8[F, P/4] -> int32[N, F]."""
    return _call("IntegerProduct", jnp.int32, x_ND, codes, level=level)


def _of_floats(name: str, x_ND: jax.Array, codes: jax.Array, scale: jax.Array, level: int | None) -> jax.Array:
    known = x_ND if x_ND.dtype in (jnp.float32, jnp.bfloat16) else x_ND.astype(jnp.float32)
    return _call(name, known.dtype, known, codes, scale.astype(jnp.float32), level=level).astype(x_ND.dtype)


def _call(name: str, dtype: jax.typing.DTypeLike, *args: jax.Array, level: int | None) -> jax.Array:
    kernels = found()
    assert isinstance(kernels, Native), "asked for by choice.path only where they are"
    shape = jax.ShapeDtypeStruct((args[0].shape[0], args[1].shape[0]), dtype)
    level = kernels.level if level is None else level
    return jax.ffi.ffi_call(kernels.prefix + name, shape)(*args, level=np.int64(level))


def _compiled() -> Path:
    """The library's file, made if it is not there. Raises OSError or SubprocessError."""
    compiler = _compiler()
    banner = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE).stdout
    made_of = (SOURCE.read_bytes(), banner, version.__version__.encode(), repr(FLAGS).encode())
    key = hashlib.sha256(b"\0".join((*made_of, platform.machine().encode()))).hexdigest()[:16]
    folder = Path(os.environ.get("EASYLM_PLUS_CACHE") or Path.home() / ".cache" / "easylm_plus") / "native"
    path = folder / f"{key}.so"
    if path.is_file():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # another process may be doing the same: each writes a file of its own, and the last one stays
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, made = Path(work) / "cpu.cc", Path(work) / "made.so"
        source.write_bytes(SOURCE.read_bytes())
        headers = ("-isystem", jax.ffi.include_dir())
        command = [*compiler, *FLAGS, *headers, str(source), "-o", str(made)]
        subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
        os.replace(made, path)
    return path


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise FileNotFoundError(f"no C++ compiler: expected one of {', '.join(COMPILERS)}, or CXX to name it")


def _told(error: Exception) -> str:
    """Why, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
        return f"{error.cmd[0]} ended with {error.returncode}: {first[:300]}"
    return " ".join(str(error).split())[:300]
