"""The bytes that the banner promises are those that the state takes on a device."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.config import base
from easylm_plus.models.families import preset
from easylm_plus.models.transformer import abstract_parameters
from easylm_plus.numerics.precision import precision
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning.memory import estimate, human, kept_per_token, sharded_bytes
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.state import new_state, state_shardings


def on_first_device(tree):
    """Bytes that the arrays of a tree really have there."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"replica": 8}], ids=str)
@pytest.mark.parametrize("ema", [True, False])
def test_state_bytes_are_exact(sizes, ema):
    model, params = tiny.model(vocab=64)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    optimizer = adamw(base().optimizer, 10)
    with sharding.use(mesh, sharding.rules_for(mesh, 4, 2)):
        shapes, axes = abstract_parameters(model)
        wanted = sharding.shardings(axes, shapes, mesh)
    abstract = jax.eval_shape(lambda p: new_state(p, optimizer, ema), shapes)
    shardings = state_shardings(abstract, wanted, mesh)
    state = jax.device_put(new_state(params, optimizer, ema), shardings)
    found = estimate(abstract, shardings, model.config, model.precision, tokens=512, accumulate=2, chunk=64)
    assert found.parameters == found.gradients / 2 == on_first_device(state.params)
    assert found.optimizer == on_first_device((state.opt_state, state.ema))
    assert found.parameters + found.optimizer + on_first_device((state.step, state.guard)) == on_first_device(state)
    if sizes.get("fsdp", 1) > 1:
        assert found.parameters < sum(x.nbytes for x in jax.tree.leaves(params)), "sharded"


def test_sharded_bytes():
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    tree = {"a": jax.ShapeDtypeStruct((8, 6), np.float32), "b": jax.ShapeDtypeStruct((5,), np.int8)}
    cut = {"a": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "b": NamedSharding(mesh, PartitionSpec())}
    assert sharded_bytes(tree, cut) == 2 * 3 * 4 + 5


def test_more_remat_keeps_less():
    kept = [sum(kept_per_token(preset("llama-7b", remat=r), precision("bf16"))) for r in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2]


def test_human():
    assert [human(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
