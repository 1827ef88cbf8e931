"""The table from logical to mesh axes: what divides is cut, what does not stays whole, nothing is cut twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easylm_plus.errors import UserError
from easylm_plus.numerics.verbs import lookup
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh


def mesh(**sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.parametrize(
    "sizes, axes, shape, spec",
    [
        ({"fsdp": 4, "tensor": 2}, ("embed", "mlp"), (8, 6), P("fsdp", "tensor")),
        ({"fsdp": 4, "tensor": 2}, ("embed", "mlp"), (6, 6), P(None, "tensor")),
        ({"fsdp": 4, "tensor": 2}, ("layers", "embed", "heads"), (3, 8, 4), P(None, "fsdp", "tensor")),
        ({"fsdp": 8}, ("embed", "mlp"), (8, 6), P("fsdp", None)),
        ({"fsdp": 8}, ("vocab", "embed"), (7, 8), P(None, "fsdp")),
        ({"replica": 2, "fsdp": 2, "sequence": 2}, ("batch", "length"), (8, 6), P(("replica", "fsdp"), "sequence")),
        ({"replica": 2, "fsdp": 2, "sequence": 2}, ("batch", "length"), (6, 5), P("replica", None)),
        ({"replica": 2, "sequence": 2}, ("batch", "length"), (6, 6), P("replica", "sequence")),
        ({"tensor": 2}, ("heads", "mlp"), (4, 4), P("tensor", None)),
        ({"fsdp": 2}, (None, "embed"), (4, 4), P(None, "fsdp")),
    ],
)
def test_spec_of(sizes, axes, shape, spec):
    assert sharding.spec_of(axes, shape, mesh(**sizes)) == spec


def test_an_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="embedd"):
        sharding.spec_of(("embedd",), (8,), mesh(fsdp=8))


@pytest.mark.parametrize("heads, kv_heads, whole", [(4, 2, set()), (4, 1, {"kv_heads"}), (3, 3, {"heads", "kv_heads"})])
def test_heads_are_cut_only_where_their_count_divides(heads, kv_heads, whole):
    """Their features would divide here: 3 heads of 8 make 24, which two devices could share by halves."""
    two = mesh(tensor=2)
    with sharding.use(two, sharding.rules_for(two, heads, kv_heads)):
        for name, count in (("heads", heads), ("kv_heads", kv_heads)):
            cut = P(None) if name in whole else P("tensor")
            assert sharding.spec_of((name,), (count * 8,), two) == cut
            assert sharding.spec_of((f"act_{name}",), (count,), two) == cut


def test_rules_hold_inside_the_context_alone():
    two = mesh(tensor=2)
    with pytest.raises(RuntimeError), sharding.use(two, {**sharding.RULES, "mlp": None}):
        assert sharding.spec_of(("mlp",), (8,), two) == P(None)
        assert sharding.mesh_axis_size("tensor") == 2
        raise RuntimeError
    assert sharding.spec_of(("mlp",), (8,), two) == P("tensor")
    assert sharding.mesh_axis_size("tensor") == 1


def test_constrain():
    x = jnp.arange(32.0).reshape(4, 8)
    assert sharding.constrain(x, "batch", "act_mlp") is x, "without a mesh"
    one, eight = mesh(fsdp=1), mesh(fsdp=4, tensor=2)
    with sharding.use(one):
        assert sharding.constrain(x, "batch", "act_mlp") is x, "on one device"
    with sharding.use(eight):
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "act_mlp"))(x)
    assert y.sharding.spec == P("fsdp", "tensor") and np.array_equal(y, x * 2)


def test_shardings_of_a_tree():
    eight = mesh(fsdp=4, tensor=2)
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    found = sharding.shardings({"a": {"kernel": ("embed", "mlp")}, "b": (None,)}, shapes, eight)
    assert found["a"]["kernel"].spec == P("fsdp", "tensor") and found["b"].spec == P(None)


@pytest.mark.parametrize("sizes", ({"fsdp": 1}, {"fsdp": 8}), ids=str)
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(sizes):
    """In bfloat16 a sum of ones stops at 256; the table is cut over fsdp, the lookup computes in bfloat16."""
    ids, table = jnp.zeros((8, 512), jnp.int32), jnp.ones((16, 8))
    count = lambda dtype: lambda table: lookup(ids, table, dtype).astype(jnp.float32).sum()
    with sharding.use(mesh(**sizes)):
        found = jax.jit(jax.grad(count(jnp.bfloat16)))(table)
        half = jax.jit(jax.grad(count(jnp.bfloat16)))(table.astype(jnp.bfloat16))
    for gradient in (found, half):  # 4096 is a bfloat16 number
        np.testing.assert_array_equal(np.asarray(gradient[0], np.float32), 8 * 512)
    plain = jax.grad(lambda table: table[ids].astype(jnp.float32).sum())(table.astype(jnp.bfloat16))
    assert (np.asarray(plain[0], np.float32) < 8 * 512).all(), "a plain lookup in a bfloat16 table loses most"


def test_how_much_of_the_weights_an_axis_cuts():
    axes = {"a": ("embed", "mlp"), "b": ("embed",), "c": (None,)}
    shapes = {
        name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in {"a": (8, 6), "b": (6,), "c": (2,)}.items()
    }
    assert sharding.cut_shares(axes, shapes, mesh()) == {}
    assert sharding.cut_shares(axes, shapes, mesh(fsdp=4, tensor=2)) == {"fsdp": 48 / 56, "tensor": 48 / 56}
    with pytest.raises(UserError, match=r"mesh\.fsdp = 5: divides no side of the weights that it could cut"):
        sharding.cut_shares(axes, shapes, mesh(fsdp=5))
    with pytest.raises(UserError, match=r"mesh\.expert = 2: divides no side"):
        sharding.cut_shares(axes, shapes, mesh(expert=2))
