"""Adam's moments and the weight average lie on the mesh like the parameters they belong to; the rest is replicated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.config import base
from easylm_plus.models.transformer import abstract_parameters
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.state import new_state, state_shardings
from easylm_plus.training.step import average
from easylm_plus.tree import path_name


@pytest.mark.parametrize("scan", [True, False])
def test_what_mirrors_a_parameter_is_sharded_like_it(scan):
    model, _ = tiny.model(vocab=64, scan_layers=scan, qkv_bias=True)
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    with sharding.use(mesh, sharding.rules_for(mesh, 4, 2)):
        shapes, axes = abstract_parameters(model)
        wanted = sharding.shardings(axes, shapes, mesh)
    optimizer = adamw(base().optimizer, 10)
    abstract = jax.eval_shape(lambda p: new_state(p, optimizer, ema=True), shapes)
    found = state_shardings(abstract, wanted, mesh)
    adam = found.opt_state[0]
    for mirror in (found.params, adam.mu, adam.nu, found.ema):
        assert mirror == wanted
    cut = {path_name(p) for p, s in jax.tree_util.tree_leaves_with_path(wanted) if s.spec != PartitionSpec()}
    assert {name.split("/")[-1] for name in cut} >= {"kernel", "embedding", "bias"}
    whole = NamedSharding(mesh, PartitionSpec())
    assert all(s == whole for s in jax.tree.leaves((found.step, adam.count, found.guard)))


def test_a_name_alone_is_not_enough():
    """A factored statistic has its parameter's name but not its shape: it stays whole."""
    mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    optimizer = adamw(base().optimizer, 10)
    state = new_state({"kernel": jnp.zeros((8, 3))}, optimizer, ema=False)
    state = state.replace(opt_state={"row": {"kernel": array(8)}, "mu": {"kernel": array(8, 3)}, "other": array(8, 3)})
    found = state_shardings(state, {"kernel": cut}, mesh).opt_state
    assert found["mu"]["kernel"] == cut
    assert found["row"]["kernel"].spec == found["other"].spec == PartitionSpec()


def test_no_two_leaves_share_a_buffer():
    """The step donates all of them; donating one buffer twice is an error."""
    state = new_state({"kernel": jnp.ones((8, 3))}, adamw(base().optimizer, 10), ema=True)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    assert np.array_equal(state.ema["kernel"], state.params["kernel"]) and state.ema is not state.params


def test_the_average_of_16_bit_parameters_is_kept_in_32():
    """In 16 bits a decay of 0.999 would never move it: the share of a step is below half a unit in the last place."""
    ones, twos = ({"kernel": jnp.full(3, value, jnp.bfloat16)} for value in (1.0, 2.0))
    state = new_state(ones, adamw(base().optimizer, 10), ema=True)
    assert state.ema["kernel"].dtype == jnp.float32 and state.params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(average(state.ema, twos, 0.999, True)["kernel"], 1.001, rtol=1e-6)
    assert (average(ones, twos, 0.999, True)["kernel"] == 1.0).all()
