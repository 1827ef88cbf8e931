"""Integers of 8 to 2 bits: rounded as the reference rounds, stored in exactly so many bits, and no bit lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.integer import (
    WIDTHS,
    Grid,
    Integers,
    grid,
    integers,
    of_codes,
    pack_bits,
    rounded,
    unpack,
    unpack_bits,
)
from easylm_plus.numerics.verbs import dense, project, project_grouped, unembed

KINDS = pytest.mark.parametrize("kind", ("sym", "asym"))


@functools.cache
def golden():
    with np.load(tiny.ROOT / "tests/golden/quant/int4_rtn.npz") as arrays:
        return {name: array.T for name, array in arrays.items()}  # [in, out] here


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@KINDS
@pytest.mark.parametrize("compiled", (False, True))
def test_four_bits_of_the_reference(kind, compiled):
    make = functools.partial(integers, bits=4, group=128, asymmetric=kind == "asym")
    leaf = (jax.jit(make) if compiled else make)(jnp.asarray(golden()["x"]))
    np.testing.assert_array_equal(unpack(leaf), golden()[f"{kind}.q"])
    np.testing.assert_allclose(leaf.scales, golden()[f"{kind}.scale"], rtol=2e-7)
    if kind == "asym":
        np.testing.assert_array_equal(leaf.zeros, golden()["asym.zero"])
    np.testing.assert_allclose(decode(leaf), golden()[f"{kind}.dequant"], rtol=1e-6, atol=1e-7)


@functools.cache
def qwix():
    with np.load(tiny.ROOT / "tests/golden/quant/qwix.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("bits", (8, 4))
def test_qwix_rounds_alike(bits):
    """On its grid, whose largest magnitude is half a step beyond the largest code of the symmetric kind: there, it is
    the largest code."""
    w, half = jnp.asarray(qwix()["w"]), 2 ** (bits - 1)
    ours, theirs = integers(w, bits, 32, asymmetric=True), lambda part: qwix()[f"int{bits}.asymmetric.{part}"]
    np.testing.assert_array_equal(unpack(ours) - half, theirs("codes"))
    np.testing.assert_array_equal(ours.zeros.astype(np.int16) - half, theirs("zero"))
    np.testing.assert_allclose(ours.scales, theirs("scale"), rtol=2e-7)
    ours, theirs = integers(w, bits, 32), lambda part: qwix()[f"int{bits}.symmetric.{part}"]
    on_theirs = rounded(w.reshape(2, 32, 8), Grid(jnp.asarray(theirs("scale"))[:, None], None), bits)
    np.testing.assert_array_equal(on_theirs.reshape(w.shape), theirs("codes"))
    np.testing.assert_allclose(ours.scales, theirs("scale") * (half - 0.5) / (half - 1), rtol=3e-7)
    assert (unpack(ours) != theirs("codes")).mean() > 0.1, "another grid"


@KINDS
def test_another_rounding_is_told_apart(kind):
    x = jnp.asarray(golden()["x"])
    whole = integers(x, 4, 0, kind == "asym")
    assert (np.asarray(unpack(whole)) != golden()[f"{kind}.q"]).mean() > 0.02, "one group for all in-features"
    other = integers(x, 4, 128, kind != "asym")
    assert (np.asarray(unpack(other)) != golden()[f"{kind}.q"]).mean() > 0.3, "the other kind"


@KINDS
@pytest.mark.parametrize("bits", WIDTHS)
def test_errors_and_bits(bits, kind):
    """Rounding is off by half a step at most, and a weight takes exactly its bits and its share of scale and zero."""
    w = normal(96, 24)
    leaf = integers(w, bits, 32, kind == "asym")
    off = np.abs(np.asarray(decode(leaf) - w)).reshape(3, 32, 24) / np.asarray(leaf.scales)[:, None]
    # zero is a value of the asymmetric grid, whose ends then miss by up to half a step more
    assert off.max() <= (0.5 if kind == "sym" else 1.0) + 1e-4
    assert leaf.codes.nbytes * 8 == bits * w.size
    beside = 3 * 24 * (4 if kind == "sym" else 5)
    assert leaf.nbytes == leaf.codes.nbytes + beside
    if bits < 8:
        finer = integers(w, bits + 1 if bits < 6 else 8, 32, kind == "asym")
        assert np.square(decode(finer) - w).mean() < 0.6 * np.square(decode(leaf) - w).mean()


@pytest.mark.parametrize("xp", (np, jnp), ids=("numpy", "jax"))
@KINDS
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", ((13, 5), (2, 3, 16, 7)), ids=str)
def test_packing_loses_nothing(shape, bits, kind, xp):
    low = 0 if kind == "asym" else -(2 ** (bits - 1))
    q = np.random.default_rng(0).integers(low, low + 2**bits, shape)
    ones = np.ones((*shape[:-2], 1, shape[-1]), np.float32)
    leaf = of_codes(jnp.asarray(q), Grid(jnp.asarray(ones), None if kind == "sym" else jnp.asarray(3 * ones)), bits)
    leaf = jax.tree.map(xp.asarray, leaf)
    assert isinstance(leaf.codes, np.ndarray) == (xp is np) and leaf.shape == shape
    np.testing.assert_array_equal(unpack(leaf), q)
    values = decode(leaf)
    assert isinstance(values, np.ndarray) == (xp is np)
    np.testing.assert_array_equal(values, q - (3 if kind == "asym" else 0))


def test_the_layout():
    bits = np.zeros((16, 2), np.uint8)
    bits[8 + 3, 1] = 1
    packed = pack_bits(bits)
    assert packed.tolist() == [[0, 0], [0, 8]]
    np.testing.assert_array_equal(unpack_bits(packed, 16), bits)
    leaf = integers(jnp.asarray([[1.0], [-7.0], [4.0]]), 4)  # codes 1, -7, 4, stored as 9, 1, 12
    assert leaf.codes[:, 0, 0].tolist() == [0b011, 0b000, 0b100, 0b101]


def test_zeros_stay_zeros():
    w = normal(16, 4).at[:, 1].set(0).at[3].set(0)
    for asymmetric in (False, True):
        found = decode(integers(w, 3, 8, asymmetric))
        assert np.isfinite(found).all() and not found[:, 1].any() and not found[3].any()


@pytest.mark.parametrize("bits", (8, 3))
def test_stacks_experts_and_products(bits):
    w, x = normal(2, 3, 40, 16), normal(24, 40, seed=1)
    stack = integers(w, bits, 20, True)
    assert stack.shape == w.shape and stack[1].shape == (3, 40, 16)
    one = integers(w[1, 2], bits, 20, True)
    np.testing.assert_array_equal(decode(stack[1, 2]), decode(one))
    np.testing.assert_allclose(project(x, one), x @ decode(one), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unembed(project(x, one), one), x @ decode(one) @ decode(one).T, rtol=1e-4, atol=1e-3)
    groups = Groups(jnp.asarray([8, 0, 16]), tile=8, implementation="tiled")
    found = project_grouped(x, stack[1], groups)
    np.testing.assert_allclose(found, project_grouped(x, decode(stack[1]), groups), rtol=1e-5, atol=1e-5)
    assert np.abs(found - project_grouped(x, decode(stack[0]), groups)).max() > 1
    dx = jax.grad(lambda x: project(x, one).sum())(x)
    np.testing.assert_allclose(dx[0], dense(one).sum(1), rtol=1e-4, atol=1e-4)


def test_a_factor_an_in_feature():
    w, channel = normal(32, 8), jnp.exp(normal(32, seed=2))
    leaf = integers(w, 4, 16, channel=channel)
    x = normal(5, 32, seed=3)
    bare = integers(w * channel[:, None], 4, 16)
    np.testing.assert_allclose(project(x, leaf), project(x / channel, bare), rtol=1e-4, atol=1e-4)
    assert np.abs(project(x, leaf) - project(x, bare)).max() > 0.1
    stack = integers(jnp.stack([w, w]), 4, 16, channel=jnp.stack([channel, jnp.ones(32)]))
    np.testing.assert_array_equal(decode(stack[0]), decode(leaf))
    assert isinstance(jax.tree.map(np.asarray, leaf), Integers)


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups of 24 do not divide 64 in-features"):
        integers(normal(64, 8), 4, 24)


def test_half_to_even():
    g = grid(jnp.asarray([[0.5], [1.5], [2.5], [7.0]]), 4, False)
    assert rounded(jnp.asarray([[0.5], [1.5], [2.5], [7.0]]), g, 4).ravel().tolist() == [0, 2, 2, 7]
