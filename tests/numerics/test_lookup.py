"""Rows of a table on any mesh, and their gradient, against `jnp.take` and a float32 sum on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easylm_plus.numerics import lookup as module
from easylm_plus.numerics.verbs import lookup
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning import wire

V, D, B, T = 32, 16, 8, 12
MESHES = {
    "one": {},
    "rows": {"tensor": 8},
    "columns": {"fsdp": 4},
    "rows and columns": {"fsdp": 2, "tensor": 4},
    "tokens": {"sequence": 4},
    "all": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "copies": {"replica": 2, "fsdp": 2, "tensor": 2},
    "experts": {"fsdp": 2, "expert": 4},
}
ON_MESHES = pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)


def arrays(dtype=jnp.float32, seed=0):
    """(table, ids of which some are out of range, gradient of the result)."""
    rng = np.random.default_rng(seed)
    table, dy = rng.standard_normal((V, D)), rng.standard_normal((B, T, D))
    return jnp.asarray(table, dtype), jnp.asarray(rng.integers(-5, V + 5, (B, T)), jnp.int32), jnp.asarray(dy, dtype)


def on_mesh(function, sizes, *args):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    with sharding.use(mesh):
        return jax.jit(lambda *args: function(*args))(*args)  # traced anew: tests replace parts


def both(table, ids, dy, rows="vocab"):
    """(rows, gradient of the table)."""
    y, backward = jax.vjp(lambda table: lookup(ids, table, dy.dtype, rows), table)
    return y, backward(dy)[0]


def expected(table, ids, dy):
    at = jnp.clip(ids, 0, V - 1)
    return table[at].astype(dy.dtype), jnp.zeros((V, D)).at[at].add(dy.astype(jnp.float32))


@ON_MESHES
def test_rows_and_gradients_are_those_of_one_device(sizes):
    table, ids, dy = arrays()
    assert ((ids < 0) | (ids >= V)).mean() > 0.1
    y, gradient = on_mesh(both, sizes, table, ids, dy)
    rows, total = expected(table, ids, dy)
    np.testing.assert_array_equal(y, rows)
    np.testing.assert_array_equal(y, jnp.take(table, ids, axis=0, mode="clip"))
    np.testing.assert_allclose(gradient, total, atol=1e-5)  # sums of about ten terms, in another order
    assert gradient.dtype == jnp.float32


@ON_MESHES
def test_a_table_in_bfloat16(sizes):
    """Its gradient is a float32 sum, rounded once: half a unit in the last of 8 bits."""
    table, ids, dy = arrays(jnp.bfloat16)
    y, gradient = on_mesh(both, sizes, table, ids, dy)
    rows, total = expected(table, ids, dy)
    assert y.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), rows.astype(jnp.float32))
    error = jnp.abs(gradient.astype(jnp.float32) - total)
    assert (error <= 2.0**-8 * jnp.abs(total) + 1e-5).all()


@ON_MESHES
def test_a_frequent_token_is_not_stuck_at_256(sizes):
    """The one token of a batch of 96, of gradients 8 and then 1: in bfloat16, 8 bits, a sum of 256 and more stays."""
    table, _, _ = arrays(jnp.bfloat16)
    ids = jnp.full((B, T), 3)
    dy = jnp.ones((B, T, D), jnp.bfloat16).at[:4].set(8)
    _, gradient = on_mesh(both, sizes, table, ids, dy)
    assert (gradient[3] == 4 * T * 8 + 4 * T).all()  # 432, which 8 bits hold
    assert (gradient.at[3].set(0) == 0).all()


def test_a_sum_in_bfloat16_is_stuck():
    """What the gradient of `jnp.take` is."""
    table, _, _ = arrays(jnp.bfloat16)
    taken = lambda table: jnp.take(table, jnp.full((1024,), 3), axis=0).sum(dtype=jnp.float32)
    assert jax.grad(taken)(table)[3, 0] == 256
    ours = lambda table: lookup(jnp.full((1, 1024), 3), table, jnp.bfloat16).sum(dtype=jnp.float32)
    assert jax.grad(ours)(table)[3, 0] == 1024


@pytest.mark.parametrize("table_dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("sizes", (MESHES["copies"], {"replica": 8}, {"replica": 4, "fsdp": 2}), ids=str)
def test_inside_a_region_of_replicas(sizes, table_dtype):
    """Each replica has its own rows of the batch, and a gradient of its own: the step sums them later."""
    table, ids, dy = arrays(table_dtype)

    def run(table, ids, dy):
        own = lambda table, ids, dy: jax.tree.map(lambda x: x[None], both(table, ids, dy))
        region = {"in_specs": (P(), P("replica"), P("replica")), "out_specs": P("replica")}
        return jax.shard_map(own, axis_names={"replica"}, check_vma=False, **region)(table, ids, dy)

    y, gradient = on_mesh(run, sizes, table, ids, dy)
    rows, total = expected(table, ids, dy)
    np.testing.assert_array_equal(y.reshape(B, T, D).astype(jnp.float32), rows.astype(jnp.float32))
    assert len(gradient) == sizes["replica"]
    each = [expected(table, *part)[1] for part in zip(*(jnp.split(x, sizes["replica"]) for x in (ids, dy)))]
    atol = 1e-5 if table_dtype == jnp.float32 else 2.0**-8 * float(jnp.abs(jnp.stack(each)).max())
    np.testing.assert_allclose(gradient.astype(jnp.float32), jnp.stack(each), atol=atol)
    np.testing.assert_allclose(gradient.astype(jnp.float32).sum(0), total, atol=len(gradient) * atol)


@pytest.mark.parametrize("sizes", (MESHES["all"], MESHES["copies"]), ids=("all", "copies"))
def test_rows_of_other_devices_must_not_count(sizes, monkeypatch):
    """Negative control: with every device taking its nearest row for its own, sums are of several rows."""
    own = module._own
    monkeypatch.setattr(module, "_own", lambda cut, V, ids: (jnp.clip(own(cut, V, ids)[0], 0, V - 1), ids == ids))
    table, ids, dy = arrays()
    y, gradient = on_mesh(both, sizes, table, ids, dy)
    rows, total = expected(table, ids, dy)
    assert (jnp.abs(y - rows) > 0.1).mean() > 0.5
    assert (jnp.abs(gradient - total) > 0.1).any()  # in the first and last rows of each part


@ON_MESHES
def test_positions_have_rows_that_nothing_cuts(sizes):
    table, _, dy = arrays()
    ids = jnp.broadcast_to(jnp.arange(T), (B, T))
    y, gradient = on_mesh(lambda *args: both(*args, rows=None), sizes, table, ids, dy)
    rows, total = expected(table, ids, dy)
    np.testing.assert_array_equal(y, rows)
    np.testing.assert_allclose(gradient, total, atol=1e-5)


def test_a_table_that_the_mesh_does_not_divide_is_whole():
    table, ids, dy = arrays()
    y, gradient = on_mesh(both, {"fsdp": 2, "tensor": 3}, table[:31, :15], jnp.clip(ids, 0, 30), dy[..., :15])
    rows, total = expected(table, jnp.clip(ids, 0, 30), dy)
    np.testing.assert_array_equal(y, rows[..., :15])
    np.testing.assert_allclose(gradient, total[:31, :15], atol=1e-5)


def test_what_travels():
    """The table's columns once forwards, the gradient's once back, results over `tensor`: never a [B, T] over data."""
    sizes = {"fsdp": 2, "sequence": 2, "tensor": 2}
    mesh = make_mesh(sizes, jax.devices()[:8])
    table, ids, dy = arrays()
    with sharding.use(mesh):
        pinned = lambda x, *axes: sharding.constrain(x, *axes)
        run = lambda table, ids, dy: both(
            pinned(table, "vocab", "embed"), pinned(ids, "batch", "length"), pinned(dy, "batch", "length", None)
        )
        text = jax.jit(run).lower(table, ids, dy).compile().as_text()
    assert sorted(wire.float_collectives(text)) == [
        ("f32", (2, V // 2, D // 2), "all-gather", 1),
        ("f32", (B // 2, T // 2, D), "all-reduce", 1),
        ("f32", (V // 2, D // 2), "all-reduce", 1),
        ("f32", (V // 2, D), "reduce-scatter", 1),
    ]
