"""What the compiler made of a step: the formats that matrices are really multiplied in."""

import re
from collections import Counter

_CALL = re.compile(r'custom_call_target="([^"]+)"')
_NAMES = {
    "__cublas$lt$matmul$f8": "cuBLASLt FP8",
    "__cublas$lt$matmul": "cuBLASLt",
    "__cublas$gemm": "cuBLAS",
    "__cudnn$fmha": "cuDNN attention",
    "__onednn$matmul": "oneDNN",
    "tpu_custom_call": "Pallas (TPU)",
}


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
