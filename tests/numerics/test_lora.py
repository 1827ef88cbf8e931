"""Low-rank adapters: they start as nothing, only they learn, and they stand beside any base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_fp8 import codes, run_of

from easylm_plus.errors import UserError
from easylm_plus.numerics import handles
from easylm_plus.numerics.formats import E4M3, decode, encode
from easylm_plus.numerics.lora import LowRank, new_adapter
from easylm_plus.numerics.verbs import dense, project

LORA = ("self_attn/(q|v)_proj=4", "mlp/down_proj=2")


def adapter(base=None, b=0.0):
    base = jax.random.normal(jax.random.key(0), (3, 16, 32)) if base is None else base
    leaf = new_adapter(jax.random.key(1), base, 4, 8.0)
    return LowRank(leaf.base, leaf.a, leaf.b + b, leaf.scale)


def layer(leaf, i=1):
    return jax.tree.map(lambda x: x[i], leaf)


def test_it_starts_as_its_base_and_moves_from_it():
    x = jax.random.normal(jax.random.key(2), (5, 16))
    leaf = adapter()
    np.testing.assert_array_equal(project(x, layer(leaf)), x @ leaf.base[1])
    assert np.abs(project(x, layer(adapter(b=0.1))) - x @ leaf.base[1]).max() > 0.1


@pytest.mark.parametrize("of", (lambda w: w, lambda w: encode(w, E4M3)), ids=("array", "codes"))
def test_merged_is_the_sum_of_both(of):
    """float32 sums of 16 terms of order 1: a few eps. On the host as on a device."""
    base = of(jax.random.normal(jax.random.key(0), (3, 16, 32)))
    leaf = adapter(base, b=0.3)
    expected = decode(base) + 8.0 / 4 * np.einsum("ldr,lrf->ldf", leaf.a, leaf.b)
    np.testing.assert_allclose(dense(leaf), expected, atol=2e-6)
    np.testing.assert_allclose(decode(jax.device_get(leaf)), expected, atol=2e-6)
    np.testing.assert_allclose(decode(leaf[1]), expected[1], atol=2e-6)
    assert np.abs(dense(leaf) - decode(base)).max() > 0.1


def test_only_the_pair_has_a_gradient():
    leaf = layer(adapter(b=0.1))
    cotangent = jax.grad(lambda h: project(jnp.ones((2, 16)), handles.hold(leaf, h)).sum())(handles.handle_of(leaf))
    assert set(cotangent) == {"a", "b"}
    assert all(np.abs(x).max() > 0 for x in cotangent.values())


@pytest.mark.parametrize(("level", "stored"), (("none", "float32"), ("O1", "float16"), ("O3", "float8_e4m3fn")))
def test_only_adapters_learn(level, stored):
    """Bit for bit; and nothing else has moments: 8 bytes a weight of the adapters."""
    run = run_of(level, lora=LORA, scan_layers=True).start()
    before = jax.device_get(run.state.params)
    losses = run.steps(9)
    assert losses[-3:] < losses[:3], "nothing is learned"
    after = jax.device_get(run.state.params)
    pairs = [(x, y) for x, y in zip(*(jax.tree.leaves(t, is_leaf=is_adapter) for t in (before, after)), strict=True)]
    assert sum(is_adapter(x) for x, _ in pairs) == 3
    trained = 0
    for x, y in pairs:
        base = [leaf.base if is_adapter(leaf) else leaf for leaf in (x, y)]
        for one, other in zip(*map(jax.tree.leaves, base), strict=True):
            np.testing.assert_array_equal(codes(one), codes(other))
        if is_adapter(x):
            assert np.abs(y.a - x.a).max() > 0
            assert np.abs(y.b - x.b).max() > 0
            assert (y.base.code if level != "none" else y.base).dtype == stored
            trained += x.a.size + x.b.size
    moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
    assert sum(x.nbytes for x in moments) == 8 * trained


def is_adapter(x):
    return isinstance(x, LowRank)


def test_the_start_depends_on_the_seed_and_the_matrix_only():
    first, again = (run_of("none", lora=LORA, scan_layers=True).start().state.params for _ in range(2))
    attention = [params["layers"]["self_attn"] for params in (first, again)]
    np.testing.assert_array_equal(attention[0]["q_proj"]["kernel"].a, attention[1]["q_proj"]["kernel"].a)
    q, v = (attention[0][f"{name}_proj"]["kernel"].a for name in "qv")
    assert np.abs(q - v).max() > 0.1


@pytest.mark.parametrize(
    ("rules", "message"),
    (
        (("self_attn=many",), "found 'self_attn=many', expected 'regular expression=rank'"),
        (("self_attn=0",), "expected 'regular expression=rank'"),
        (("lm_head=4",), "matches no matrix of the blocks"),
        (("(=4",), "not a regular expression"),
    ),
)
def test_bad_rules(rules, message):
    with pytest.raises(UserError, match="numerics"):
        run_of("none", lora=rules)
    try:
        run_of("none", lora=rules)
    except UserError as error:
        assert message in str(error)
