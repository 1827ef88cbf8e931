"""The device mesh: six named axes, always all present, of which most have size 1.

    stage     pipeline stages                     replica   data parallelism, weights copied
    fsdp      data parallelism, weights sharded   sequence  the length axis of activations
    expert    mixture-of-experts                  tensor    heads and hidden features

A matrix multiplied over `tensor` communicates in every layer, so that axis comes last, where neighbouring
devices are; `replica` communicates once a step and comes first.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

from easylm_plus.errors import UserError

AXES = ("stage", "replica", "fsdp", "sequence", "expert", "tensor")


def axis_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Fills in the one axis given as -1 so that the product is the number of devices.

    Raises UserError, naming the axes and the numbers, when that cannot be.
    """
    resolved = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    asked = " x ".join(f"{axis}={size}" for axis, size in resolved.items() if size != 1) or "1"
    free = [axis for axis, size in resolved.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: at most one axis can be -1, found {' and '.join(free)}")
    if bad := [axis for axis, size in resolved.items() if size < 1 and size != -1]:
        raise UserError(f"mesh.{bad[0]} = {resolved[bad[0]]}: expected a positive number, or -1 to fill in")
    fixed = math.prod(size for size in resolved.values() if size != -1)
    if free:
        resolved[free[0]] = devices // fixed
    if math.prod(resolved.values()) != devices:
        raise UserError(f"mesh {asked} does not fit {devices} device{'s' * (devices != 1)}: "
                         f"the sizes must multiply to {devices}")  # fmt: skip
    return resolved


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of these axis sizes over all devices of the job (or the given ones).

    Axes are of type Auto: the compiler chooses shardings between the constraints we state. (`jax.make_mesh`
    defaults to Explicit, under which `with_sharding_constraint` is an error.)
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(axis_sizes(sizes, len(devices)).values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
