"""Which code multiplies by packed weights: chosen for the machine, or by name in $EASYLM_PLUS_TERNARY.

    xla      everywhere: unpacks for each product
    ffi      CPU, up to 8 tokens: C++ (native.py); int8 rows too
    triton   NVIDIA GPU, up to 16 tokens: Pallas (pallas.py)
    mosaic   TPU, up to 16 tokens: Pallas
    auto     ffi on a CPU if its kernels can be compiled, else xla; on GPUs and TPUs xla, until the others have been
             timed there

All give the same sums of whole numbers; more tokens always go XLA's way. A name that cannot be had is an error.
"""

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from easylm_plus.errors import UserError
from easylm_plus.numerics.kernels import native
from easylm_plus.parallel.sharding import device

VARIABLE = "EASYLM_PLUS_TERNARY"
NEEDS = {"ffi": "cpu", "triton": "gpu", "mosaic": "tpu"}
MOST_TOKENS = {"ffi": native.MOST_TOKENS, "triton": 16, "mosaic": 16, "xla": 0}

_forced: ContextVar[str | None] = ContextVar("ternary_path", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Everything traced inside goes this way."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def path() -> str:
    """xla | ffi | triton | mosaic, for what is traced here. Raises UserError for a name that cannot be had."""
    name, platform = _forced.get() or os.environ.get(VARIABLE) or "auto", device().platform
    if name == "auto":
        return "ffi" if platform == "cpu" and _is_native() else "xla"
    if name == "xla":
        return name
    if name not in NEEDS:
        raise UserError(f"{VARIABLE} = {name!r}: expected one of auto, xla, {', '.join(NEEDS)}")
    if NEEDS[name] != platform:
        raise UserError(f"{VARIABLE} = {name!r} needs a {NEEDS[name].upper()}, this is a {platform.upper()}; "
                        "expected xla or auto")  # fmt: skip
    if name == "ffi" and isinstance(kernels := native.found(), native.Missing):
        raise UserError(f"{VARIABLE} = 'ffi': the kernels cannot be compiled ({kernels.reason}); expected xla or auto")
    return name


def told() -> str:
    """What multiplies, for people: one line."""
    name = path()
    if name != "ffi":
        return {"xla": "XLA"}.get(name, f"{name} kernel")
    kernels = native.found()
    return f"{native.LEVELS[kernels.level]} kernel" if isinstance(kernels, native.Native) else ""


@functools.cache
def _is_native() -> bool:
    """Whether there are CPU kernels; if not, it is said, once."""
    kernels = native.found()
    if isinstance(kernels, native.Missing):
        print(f"easylm_plus: no CPU kernels for packed weights, which XLA multiplies by more slowly ({kernels.reason})",
              file=sys.stderr, flush=True)  # fmt: skip
    return isinstance(kernels, native.Native)
