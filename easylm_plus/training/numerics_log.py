"""What a step says of its FP8 and ternary matrices (numerics/levels.py, `report`), as numbers for the log.

The JSONL row has the worst of all FP8 matrices and the mean of the ternary ones; TensorBoard also has each matrix of
each layer, as fp8/amax/input/03/self_attn/q_proj or ternary/flips/03/self_attn/q_proj.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from easylm_plus.numerics.fp8 import SEEN, TENSORS

TERNARY = ("flips", "zeros")  # shares of weights whose code this step has changed, and whose code is 0


def in_short(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures of the row."""
    return worst(report) | ternary_mean(report)


def ternary_mean(report: Mapping[str, Any]) -> dict[str, float]:
    """Shares of all ternary weights; a matrix counts as often as it has weights."""
    if not (shares := report.get("ternary")):
        return {}
    sizes = [math.prod(np.shape(share)[:-1]) * int(size) for share, size in shares.values()]  # beyond int32
    means = [np.reshape(share, (-1, len(TERNARY))).mean(0) for share, _ in shares.values()]
    return {f"ternary/{what}": float(x) for what, x in zip(TERNARY, np.average(means, axis=0, weights=sizes))}


def worst(report: Mapping[str, Any]) -> dict[str, float]:
    """The largest shares of values that overflowed and that became 0, by tensor, and the smallest mu."""
    if "seen" not in report:
        return {}
    every = np.concatenate([np.reshape(taps, (-1, len(TENSORS), len(SEEN))) for taps in report["seen"].values()])
    largest = np.where(np.isnan(every), -1.0, every).max(0)  # -1: measured nowhere
    row = {
        f"fp8/{what}/{tensor}": float(largest[TENSORS.index(tensor), SEEN.index(what)])
        for what in ("overflow", "underflow")
        for tensor in TENSORS
    }
    row = {name: value for name, value in row.items() if value >= 0}
    if report["mu"]:
        row["fp8/mu"] = min(float(np.min(mu)) for mu in report["mu"].values())
    return row


def each(report: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of every matrix, under a name for TensorBoard; NaN in what was seen stands for not measured."""
    values: dict[str, float] = {}
    for name, taps in report.get("seen", {}).items():
        taps, scales = np.asarray(taps), np.asarray(report["scale"][name])
        stack = taps.shape[:-2]
        for index in itertools.product(*map(range, stack)):
            place = _place(name, index)
            for row, tensor in enumerate(TENSORS):
                if np.isnan(taps[(*index, row)]).any():
                    continue
                for column, what in enumerate(SEEN):
                    values[f"fp8/{what}/{tensor}/{place}"] = float(taps[(*index, row, column)])
                values[f"fp8/scale/{tensor}/{place}"] = float(scales[(*index, row)])
            if name in report["mu"]:
                values[f"fp8/mu/{place}"] = float(np.asarray(report["mu"][name])[index])
    for name, (shares, _) in report.get("ternary", {}).items():
        for index in itertools.product(*map(range, np.shape(shares)[:-1])):
            for what, share in zip(TERNARY, np.asarray(shares)[index]):
                values[f"ternary/{what}/{_place(name, index)}"] = float(share)
    return values


def _place(name: str, index: tuple[int, ...]) -> str:
    """layers/self_attn/q_proj/kernel and (3,), or layers/3/self_attn/q_proj/kernel and () -> 03/self_attn/q_proj; of
    experts 03/7/mlp/experts/up_proj."""
    parts = name.removesuffix("/kernel").split("/")[1:]
    own = [parts.pop(0)] if parts[0].isdecimal() else []
    layer, *rest = [*own, *map(str, index), *parts]
    return "/".join([layer.zfill(2), *rest])
