"""Sparse matrices: what is kept comes back bit by bit, what is not is zero, and the rest takes no room."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.sparsity import Sparse, sparse, two_four
from easylm_plus.numerics.verbs import project


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def two_in_four(shape, seed=0):
    *stack, D, F = shape
    order = np.random.default_rng(seed).random((*stack, D // 4, 4, F)).argsort(-2).argsort(-2)
    return jnp.asarray(order < 2).reshape(shape)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("shape", ((8, 3), (12, 5), (2, 3, 20, 4)), ids=str)
def test_two_in_four(shape, dtype):
    w, kept = normal(*shape).astype(dtype), two_in_four(shape)
    leaf = two_four(w, kept)
    assert leaf.shape == shape and leaf.values.dtype == dtype
    expected = np.where(kept, w, 0)
    np.testing.assert_array_equal(decode(leaf), expected)
    on_host = jax.tree.map(np.asarray, leaf)
    assert isinstance(decode(on_host), np.ndarray)
    np.testing.assert_array_equal(decode(on_host), expected)
    swapped = leaf.replace(index=leaf.index ^ 1)
    assert (np.asarray(decode(swapped)) != expected).any()


def test_bits_of_two_in_four():
    leaf = two_four(normal(64, 8).astype(jnp.bfloat16), two_in_four((64, 8)))
    assert leaf.nbytes * 8 == 9 * 64 * 8


@pytest.mark.parametrize("shape", ((8, 3), (13, 5)), ids=str)
def test_sparse(shape):
    w = normal(*shape)
    kept = jnp.abs(w) > 0.7
    leaf = sparse(w, kept, int(kept.sum()))
    assert leaf.shape == shape
    np.testing.assert_array_equal(decode(leaf), np.where(kept, w, 0))
    on_host = jax.tree.map(np.asarray, leaf)
    np.testing.assert_array_equal(decode(on_host), np.where(kept, w, 0))
    assert leaf.nbytes == 4 * int(kept.sum()) + -(-shape[0] // 8) * shape[1]
    turned = Sparse(leaf.values[::-1], leaf.bitmap, leaf.inputs)
    assert (np.asarray(decode(turned)) != np.where(kept, w, 0)).any()


def test_a_kept_zero_is_stored():
    w = normal(8, 2).at[0].set(0)
    kept = jnp.zeros((8, 2), bool).at[:4].set(True)
    np.testing.assert_array_equal(decode(sparse(w, kept, 8)), np.where(kept, w, 0))


def test_stacks():
    w = normal(2, 3, 16, 4)
    kept = jnp.asarray(np.random.default_rng(1).random((2, 3, 64)).argsort(-1) < 20).reshape(w.shape)
    leaves = [[sparse(w[i, j], kept[i, j], 20) for j in range(3)] for i in range(2)]
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), *(jax.tree.map(lambda *xs: jnp.stack(xs), *row) for row in leaves))
    assert stack.shape == w.shape and stack[1].shape == (3, 16, 4)
    np.testing.assert_array_equal(decode(stack), np.where(kept, w, 0))
    x = normal(5, 16)
    np.testing.assert_allclose(project(x, stack[1, 2]), x @ np.where(kept, w, 0)[1, 2], rtol=1e-5, atol=1e-5)


def test_fours_that_do_not_divide():
    with pytest.raises(ValueError, match="fours do not divide 10 in-features"):
        two_four(normal(10, 2), jnp.ones((10, 2), bool))
