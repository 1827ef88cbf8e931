"""NF4: bitsandbytes' bytes and values, on the host and on a device, in stacks, and in products that keep only codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.numerics import nf4 as module
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.nf4 import DYNAMIC, LEVELS, NF4, nf4
from easylm_plus.numerics.verbs import dense, lookup, project, project_grouped, unembed

XP = pytest.mark.parametrize("xp", (np, jnp), ids=("numpy", "jax"))
DOUBLE = pytest.mark.parametrize("double", (False, True), ids=("", "double"))


@functools.cache
def golden():
    with np.load(tiny.ROOT / "tests/golden/quant/nf4.npz") as arrays:
        return dict(arrays)


def theirs(block, double=False):
    """(codes [out, in / 2], absmax, dequantised [out, in]) of bitsandbytes, of its matrix x[out, in]."""
    name = f"bnb_nf4_b{block}" + "_double" * double
    out = len(golden()["x"])
    absmax = golden()[f"{name}.absmax_u8" if double else f"{name}.absmax"].reshape(out, -1)
    return golden()[f"{name}.packed"].reshape(out, -1), absmax, golden()[f"{name}.dequant"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- against bitsandbytes ---


def test_the_code_books():
    np.testing.assert_array_equal(LEVELS, golden()["nf4_codebook"])
    np.testing.assert_array_equal(DYNAMIC, golden()["bnb_nf4_b64_double.state2_code"])


@XP
@pytest.mark.parametrize("block", (64, 128))
def test_bytes_and_values(block, xp):
    packed, absmax, values = theirs(block)
    found = nf4(xp.asarray(golden()["x"].T), block)
    np.testing.assert_array_equal(found.codes, packed)
    np.testing.assert_array_equal(found.absmax, absmax)
    assert isinstance(decode(found), np.ndarray) == (xp is np)
    np.testing.assert_array_equal(decode(found).T, values)
    swapped = NF4((found.codes << 4) | (found.codes >> 4), found.absmax, found.inputs)
    assert (values != np.asarray(decode(swapped)).T).mean() > 0.8, "the first of a pair is in the high nibble"
    other = nf4(golden()["x"].T, 192 - block)
    assert (values != np.asarray(decode(other)).T).mean() > 0.3, "another block: one of two has another largest"


@XP
def test_rounded_absmaxes(xp):
    """Bit by bit from their codes. Of 64 codes bitsandbytes has one that is not the nearest, 4e-4 from the middle of
    two; the mean is a sum in another order."""
    packed, absmax, values = theirs(64, double=True)
    found = nf4(xp.asarray(golden()["x"].T), double=True)
    np.testing.assert_array_equal(found.codes, packed)
    np.testing.assert_allclose(found.mean, golden()["bnb_nf4_b64_double.offset"], rtol=2e-7)
    np.testing.assert_allclose(found.factor, golden()["bnb_nf4_b64_double.state2_absmax"], rtol=2e-7)
    differ = np.asarray(found.absmax) != absmax
    assert differ.sum() <= 1
    mean, factor = (xp.asarray(golden()[f"bnb_nf4_b64_double.{part}"]) for part in ("offset", "state2_absmax"))
    own = NF4(found.codes, xp.asarray(absmax), found.inputs, factor, mean)
    np.testing.assert_array_equal(decode(own).T, values)
    unshifted = NF4(found.codes, xp.asarray(absmax), found.inputs, factor, xp.zeros_like(mean))
    assert (values != np.asarray(decode(unshifted)).T).mean() > 0.8


def test_double_rounding_costs_little():
    """Blocks of 256 over a matrix with more absmaxes than that, the last block shorter."""
    w = normal(640, 60, seed=1)
    once, twice = nf4(w), nf4(w, double=True)
    assert twice.factor.shape == (3,) and twice.absmax.dtype == np.uint8
    error = lambda leaf: np.sqrt(np.square(decode(leaf) - w).mean())
    assert 0.08 < error(once) < error(twice) < 1.01 * error(once)
    bits = lambda leaf: 8 * leaf.nbytes / leaf.size
    assert bits(once) == 4.5 and bits(twice) == pytest.approx(4.125 + 32 * 4 / w.size)


# --- shapes ---


@DOUBLE
def test_in_features_that_the_block_does_not_divide(double):
    leaf = nf4(normal(100, 7), double=double)
    assert leaf.shape == (100, 7) and leaf.codes.shape == (7, 64) and leaf.absmax.shape == (7, 2)
    padded = nf4(np.pad(normal(100, 7), ((0, 28), (0, 0))), double=double)
    np.testing.assert_array_equal(decode(leaf), decode(padded)[:100])
    assert not decode(padded)[100:].any(), "zero is a level"


@DOUBLE
@pytest.mark.parametrize("stack", ((2,), (2, 3)), ids=str)
def test_matrices_of_a_stack_know_nothing_of_each_other(stack, double):
    w = jnp.asarray(normal(*stack, 128, 8))
    leaf = jax.jit(lambda w: nf4(w, double=double))(w)
    assert leaf.shape == w.shape and leaf.size == w.size
    last = tuple(n - 1 for n in stack)
    alone = nf4(np.asarray(w[last]), double=double)
    np.testing.assert_array_equal(leaf[last].codes, alone.codes)
    np.testing.assert_allclose(decode(leaf)[last], decode(alone), rtol=1e-6)
    np.testing.assert_array_equal(decode(leaf[last]), decode(leaf)[last])
    larger = jax.jit(lambda w: nf4(w, double=double))(w.at[(0,) * len(stack)].multiply(100.0))
    np.testing.assert_array_equal(decode(larger)[last], decode(leaf)[last])


@XP
def test_a_matrix_of_zeros(xp):
    for double in (False, True):
        leaf = nf4(xp.zeros((64, 3), np.float32), double=double)
        assert (np.asarray(leaf.codes) == 16 * module.ZERO + module.ZERO).all()
        np.testing.assert_array_equal(decode(leaf), 0)


# --- products ---


def test_products():
    x, w = jnp.asarray(normal(5, 100)), normal(100, 8, seed=1)
    leaf = nf4(jnp.asarray(w))
    values = decode(nf4(w))
    np.testing.assert_allclose(project(x, leaf), np.asarray(x) @ values, atol=1e-4)
    np.testing.assert_array_equal(dense(leaf), values)
    np.testing.assert_array_equal(lookup(jnp.asarray([3, 1]), leaf, jnp.float32), values[[3, 1]])
    np.testing.assert_allclose(unembed(x[:, :8], leaf), np.asarray(x)[:, :8] @ values.T, atol=1e-4)
    assert np.abs(project(x, leaf) - np.asarray(x) @ w).max() > 0.1, "four bits are seen"
    stack = nf4(jnp.asarray(normal(2, 100, 8)))
    groups = Groups(jnp.asarray([8, 16]), tile=8, implementation="tiled")
    rows = jnp.asarray(normal(24, 100))
    expected = np.concatenate([rows[:8] @ decode(stack)[0], rows[8:] @ decode(stack)[1]])
    np.testing.assert_allclose(project_grouped(rows, stack, groups), expected, atol=1e-4)


def test_between_the_passes_there_are_codes():
    """And the gradient to the inputs is that of the decoded matrix."""
    x, leaf = jnp.asarray(normal(16, 128)), nf4(jnp.asarray(normal(128, 64)))
    y, pull = jax.vjp(lambda x: project(x, leaf), x)
    np.testing.assert_allclose(pull(y)[0], y @ decode(leaf).T, rtol=1e-4, atol=1e-2)
    held = lambda way: {
        (a.shape, str(a.dtype)) for a in jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(way, x)[1], x))
    }
    assert held(lambda x: project(x, leaf)) == {((64, 64), "uint8"), ((64, 2), "float32")}
    assert ((128, 64), "float32") in held(lambda x: project(x, decode(leaf))), "as it would be of a plain product"
