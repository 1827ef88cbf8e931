"""Matrix products of a compiled program, by the formats of their operands.

`products` counts multiply-adds of one execution on one device, in products of cuBLAS and in `dot`, which is what XLA
for GPUs and CPUs makes of them; attention kernels are neither, and TPUs have convolutions. Multiply-adds, not calls,
show what share is in FP8 whatever XLA has merged: three projections of the same activations may become one call.
`matmul_formats` counts calls in the program's text, of any library: what a run says of itself.
"""

import math
import re
from collections import Counter

from easylm_plus.planning.hlo import Computation, Instruction, parse
from easylm_plus.planning.loops import executions

_CALL = re.compile(r'custom_call_target="([^"]+)"')
_NAMES = {
    "__cublas$lt$matmul$f8": "cuBLASLt FP8",
    "__cublas$lt$matmul": "cuBLASLt",
    "__cublas$gemm": "cuBLAS",
    "__cudnn$fmha": "cuDNN attention",
    "__onednn$matmul": "oneDNN",
    "tpu_custom_call": "Pallas (TPU)",
}
_LIBRARY = re.compile(r'custom_call_target="__cublas\$')


def products(hlo: str) -> dict[str, int]:
    """{"f8e4m3fn x f8e5m2": multiply-adds}. Raises ValueError for a product in a loop of unknown length."""
    found: Counter[str] = Counter()
    for computation, it, times in executions(parse(hlo)):
        if it.opcode != "dot" and not (it.opcode == "custom-call" and _LIBRARY.search(it.attributes)):
            continue
        if times is None:
            raise ValueError(
                f"{it.opcode} {it.name} ({it.source or 'no source'}): how often it is executed is not known"
            )
        left, right = (computation.instructions[name].arrays[0].dtype for name in it.operands[:2])
        found[f"{left} x {right}"] += times * _multiply_adds(computation, it)
    return dict(found)


def _multiply_adds(computation: Computation, it: Instruction) -> int:
    """Of [..., M, K] x [..., K, N] -> [..., M, N]: the root of the product of all three sizes, but for the batch."""
    arrays = [computation.instructions[name].arrays[0] for name in it.operands[:2]] + [it.arrays[0]]
    batch = math.prod(arrays[0].dims[axis] for axis in _batch_axes(it.attributes))
    size = math.prod(math.prod(a.dims) for a in arrays)
    if math.isqrt(size // batch) ** 2 * batch != size:
        raise ValueError(f"{it.opcode} {it.name}: {[a.dims for a in arrays]} are no shapes of a matrix product")
    return math.isqrt(size // batch)


def _batch_axes(attributes: str) -> list[int]:
    """As `dot` writes them (lhs_batch_dims={0,1}), or the library's calls ("lhs_batch_dimensions":["0"])."""
    found = re.search(r'lhs_batch_dim(?:s=\{|ensions\\?":\[)([^\]}]*)', attributes)
    return [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []


def matmul_formats(hlo: str) -> str:
    """ "dot f32 x f32: 97, oneDNN: 12": the products of an optimised HLO text, counted in the program's text.

    A product inside a loop counts once.
    """
    counts: Counter[str] = Counter()
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", hlo))
    for operands in re.findall(r" dot\(([^)]*)\)", hlo):
        names = re.findall(r"%([\w.\-]+)", operands)
        counts["dot " + " x ".join(types.get(name, "?") for name in names)] += 1
    for target in _CALL.findall(hlo):
        prefix = next((p for p in sorted(_NAMES, key=len, reverse=True) if target.startswith(p)), None)
        if prefix:
            counts[_NAMES[prefix]] += 1
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common())
