"""What the sections `numerics` and `optimizer` of a config say of formats, checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from easylm_plus.errors import UserError
from easylm_plus.numerics.formats import FORMATS, NARROW, WIDE, Format, Formats
from easylm_plus.numerics.rules import CODED
from easylm_plus.parallel.mesh import AXES
from easylm_plus.parallel.sharding import DATA_AXES, mesh_axis_size

CHOICES = {
    "numerics": {
        "fp8_level": ("none", "O1", "O2", "O3"),
        "fp8_reduction": ("two_shot", "ring"),
        "fp8_accumulate": ("float32", "e4m3"),
    },
    "optimizer": {
        "master": ("", *FORMATS),
        "first_moment": ("", *FORMATS),
        "second_moment": ("", *FORMATS),
        "rounding": ("nearest", "stochastic"),
        "zero": ("none", "sharded", "whole_tensor"),
    },
}
FIELDS = {"master": "master", "first": "first_moment", "second": "second_moment"}  # of Formats: keys of `optimizer`


def formats_of(level: str, optimizer: Mapping[str, Any]) -> Formats:
    """The level's formats, each replaced by the key of the `optimizer` section that names another."""
    usual = NARROW if level in ("O2", "O3") else WIDE
    return dataclasses.replace(usual, **{field: optimizer[key] for field, key in FIELDS.items() if optimizer[key]})


def check(section: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
    """Raises UserError for a value of the sections `numerics` and `optimizer` that is none."""
    for name, values in (("numerics", section), ("optimizer", optimizer)):
        for key, known in CHOICES[name].items():
            if values[key] not in known:
                expected = ", ".join(choice for choice in known if choice)
                raise UserError(f"{name}.{key} = {values[key]!r}: expected one of {expected}")
    if section["fp8_window"] < 1:
        raise UserError(f"numerics.fp8_window = {section['fp8_window']}: expected 1 (the tensor at hand) or more steps")


def check_transforms(level: str, optimizer: Mapping[str, Any], found: set[str], adapters: bool) -> None:
    """Raises UserError where level and formats do not go together with what the rules make of the weights."""
    if named := [key for key in FIELDS.values() if optimizer[key]]:
        reason = "adapters are kept in float32" if adapters else "no matrix that it concerns; see numerics.fp8_level"
        if adapters or found == {"plain"}:
            raise UserError(f"optimizer.{named[0]} = {optimizer[named[0]]!r}: found {reason}")
    if not adapters and (fixed := CODED.keys() & found):
        raise UserError(f"numerics.rules: found '={min(fixed)}', which does not learn; expected numerics.lora with it")
    if level == "none" and (needy := {"fp8", "narrow"} & found):
        raise UserError(f"numerics.rules: found '={min(needy)}', expected numerics.fp8_level = O1, O2 or O3 with it")
    if level != "none" and found == {"plain"}:
        raise UserError(f"numerics.fp8_level = {level!r}: found no matrix that it concerns")


def warmup_of(section: Mapping[str, Any], assigned: Mapping[str, str]) -> int:
    """Steps over which matrices turn ternary; UserError where nothing can, or a number is none."""
    steps, ternary = section["ternary_warmup"], [name for name, transform in assigned.items() if transform == "ternary"]
    if steps < 0:
        raise UserError(f"numerics.ternary_warmup = {steps}: expected a number of steps, or 0 for none")
    if steps and not ternary:
        raise UserError(f"numerics.ternary_warmup = {steps}: found no weight that numerics.rules make ternary")
    if steps and (experts := [name for name in ternary if "/experts/" in name]):
        raise UserError(f"numerics.ternary_warmup = {steps}: found ternary experts ({experts[0]}), which take none")
    return steps


def deals(section: Mapping[str, Any], optimizer: Mapping[str, Any], master: Format, adapters: bool) -> bool:
    """Whether whole tensors are dealt out to the replicas; UserError where they cannot be."""
    if optimizer["zero"] != "whole_tensor":
        return False
    cut = {axis for axis in AXES if mesh_axis_size(axis) > 1}
    expected = {
        "no mesh axis but mesh.replica larger than 1; sharded goes with all": cut <= {"replica"},
        "numerics.fp8_level = O2 or O3, and no adapters": section["fp8_level"] in ("O2", "O3") and not adapters,
        "a master with a scale, as optimizer.master = fp16": master.largest is not None,
        "numerics.fp8_reduction = two_shot with it": section["fp8_reduction"] == "two_shot",
    }
    for what, holds in expected.items():
        if not holds:
            raise UserError(f"optimizer.zero = 'whole_tensor': expected {what}")
    return bool(cut)


def rings(section: Mapping[str, Any]) -> bool:
    """Whether gradients are summed by the ring; UserError where it cannot be."""
    if section["fp8_reduction"] != "ring":
        return False
    if mesh_axis_size("replica") not in (1, summed_over()):
        raise UserError(
            "numerics.fp8_reduction = 'ring': sums over mesh.replica or over the other axes that cut the batch, not"
            " over both; expected one of them to be 1, or two_shot"
        )
    if section["fp8_accumulate"] == "e4m3":
        raise UserError("numerics.fp8_accumulate = 'e4m3': expected float32 with numerics.fp8_reduction = 'ring'")
    return True


def summed_over() -> int:
    """Devices whose gradients are added."""
    return math.prod(mesh_axis_size(axis) for axis in DATA_AXES)
