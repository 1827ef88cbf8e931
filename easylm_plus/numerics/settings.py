"""What the sections `numerics` and `optimizer` of a config say of formats, checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from easylm_plus.errors import UserError
from easylm_plus.numerics.formats import FORMATS, NARROW, WIDE, Formats
from easylm_plus.parallel.sharding import DATA_AXES, mesh_axis_size

CHOICES = {
    "fp8_level": ("none", "O1", "O2", "O3"),
    "fp8_reduction": ("two_shot", "ring"),
    "fp8_accumulate": ("float32", "e4m3"),
}


def formats_of(level: str, optimizer: Mapping[str, Any]) -> Formats:
    """The level's formats, each replaced by the key of the `optimizer` section that names another."""
    usual = NARROW if level in ("O2", "O3") else WIDE
    keys = {"master": "master", "first": "first_moment", "second": "second_moment"}
    named = {field: optimizer[key] for field, key in keys.items() if optimizer[key]}
    for field, name in named.items():
        if name not in FORMATS:
            raise UserError(f"optimizer.{keys[field]} = {name!r}: expected one of {', '.join(FORMATS)}")
    return dataclasses.replace(usual, **named)


def check(section: Mapping[str, Any]) -> None:
    """Raises UserError for a value of the `numerics` section that is none."""
    for key, known in CHOICES.items():
        if section[key] not in known:
            raise UserError(f"numerics.{key} = {section[key]!r}: expected one of {', '.join(known)}")
    if section["fp8_window"] < 1:
        raise UserError(f"numerics.fp8_window = {section['fp8_window']}: expected 1 (the tensor at hand) or more steps")


def check_transforms(level: str, found: set[str]) -> None:
    """Raises UserError where the level and what the rules make of the weights do not go together."""
    if level == "none" and (needy := {"fp8", "narrow"} & found):
        raise UserError(f"numerics.rules: found '={min(needy)}', expected numerics.fp8_level = O1, O2 or O3 with it")
    if level != "none" and found == {"plain"}:
        raise UserError(f"numerics.fp8_level = {level!r}: found no matrix that it concerns")


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
