"""Axis sizes multiply to the devices there are, or the message says which do not."""

import jax
import pytest
from jax.sharding import AxisType

from easylm_plus.errors import UserError
from easylm_plus.parallel.mesh import AXES, axis_sizes, make_mesh


@pytest.mark.parametrize(
    "asked, devices, found",
    [
        ({}, 1, {}),
        ({"fsdp": -1}, 8, {"fsdp": 8}),
        ({"fsdp": -1, "tensor": 2}, 8, {"fsdp": 4, "tensor": 2}),
        ({"replica": 2, "fsdp": 2, "sequence": -1}, 8, {"replica": 2, "fsdp": 2, "sequence": 2}),
        ({"fsdp": -1, "tensor": 8}, 8, {"tensor": 8}),
    ],
)
def test_one_axis_is_filled_in(asked, devices, found):
    assert axis_sizes(asked, devices) == {axis: found.get(axis, 1) for axis in AXES}


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"fsdp": 3}, r"mesh fsdp=3 does not fit 8 devices: the sizes must multiply to 8"),
        ({"fsdp": -1, "tensor": 3}, r"mesh fsdp=-1 x tensor=3 does not fit 8 devices"),
        ({"fsdp": -1, "tensor": 16}, r"mesh fsdp=-1 x tensor=16 does not fit 8 devices"),
        ({"fsdp": -1, "tensor": -1}, r"at most one axis can be -1, found fsdp and tensor"),
        ({"fsdp": 8, "tensor": 0}, r"mesh.tensor = 0: expected a positive number, or -1 to fill in"),
        ({"fsdp": -2, "tensor": -4}, r"mesh.fsdp = -2: expected a positive number"),
    ],
)
def test_what_cannot_be_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        axis_sizes(asked, 8)


def test_the_mesh_has_all_axes_in_order():
    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": -1})
    assert mesh.axis_names == AXES and dict(mesh.shape) == axis_sizes({"replica": 2, "fsdp": 2, "tensor": 2}, 8)
    assert set(mesh.axis_types) == {AxisType.Auto}
    ids = [[d.id for d in row] for row in mesh.devices.reshape(4, 2)]
    assert ids[0] == [0, 1], "tensor, which communicates most, is innermost"
    assert make_mesh({}, jax.devices()[:1]).size == 1
