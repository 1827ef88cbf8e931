"""Smooth-SwiGLU: in-features that stand out do not push the others out of E4M3's range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.formats import E4M3, decode, encode
from easylm_plus.numerics.fp8 import Fp8, evened, new_handle
from easylm_plus.numerics.handles import gradients
from easylm_plus.numerics.verbs import project
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

B, T, D, F = 4, 16, 64, 32


def operands(outlier):
    """x[B, T, D] with one feature `outlier` times as large, w, and the gradient of the output."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    x[..., 5] *= outlier
    return x, rng.standard_normal((D, F)).astype(np.float32), rng.standard_normal((B, T, F)).astype(np.float32)


def product(x, w, dy, smooth):
    """(y, dx, dw) of the FP8 product."""
    codes = encode(jnp.asarray(w), E4M3)
    leaf = Fp8(codes.code, jnp.ones(()), codes.scale_inv, None, None, None, None, ("mlp", "embed"), smooth)

    def loss(x, handle):
        y = project(x, Fp8(**{**vars(leaf), "handle": handle}))
        return (y * dy).sum(), y

    (_, y), (dx, dhandle) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, new_handle(w.shape))
    return y, dx, decode(gradients({"w": dhandle})["w"])


def sqnr(found, exact):
    """Signal to noise in dB."""
    return 10 * np.log10((exact**2).sum() / ((np.asarray(found) - exact) ** 2).sum())


def without(feature, array, axis):
    """The array without the feature that stands out, whose size would hide all others."""
    return np.delete(np.asarray(array), feature, axis)


@pytest.mark.parametrize(("outlier", "left"), ((1e5, 15), (3e5, 1)))
def test_other_features_keep_their_precision(outlier, left):
    """The part of y that the ordinary features make, and their gradients. In ordinary data E4M3 gives 26 dB a product
    with both operands rounded (3 bits: relative errors of 2^-4 / sqrt(3) at most, uniform in the exponent)."""
    x, w, dy = operands(outlier)
    rest, ordinary = x.copy(), w.copy()
    rest[..., 5] = 0
    ordinary[5] = 0  # so that y shows the ordinary features only, while the outlier still sets the scale
    exact = rest @ ordinary
    smooth, plain = (product(x, ordinary, dy, flag) for flag in (True, False))
    assert sqnr(smooth[0], exact) > 25
    assert sqnr(plain[0], exact) < left
    dw = np.einsum("btd,btf->df", x, dy)
    assert sqnr(without(5, product(x, w, dy, True)[1], -1), without(5, dy @ w.T, -1)) > 23
    # kept in E4M3 with one scale, the gradient's small rows are lost whatever x's codes are; of the large one, 32
    # numbers of about 24 dB each, the figure scatters by 2 dB
    assert sqnr(product(x, w, dy, True)[2][5], dw[5]) > 20


def test_nothing_changes_where_no_feature_stands_out():
    x, w, dy = operands(1.0)
    even = np.asarray(evened(jnp.asarray(x)))
    assert set(even) <= {1.0, 2.0}
    for one, other in zip(product(x, w, dy, True), product(x, w, dy, False), strict=True):
        assert sqnr(one, np.asarray(other)) > 22


@pytest.mark.parametrize("sizes", ({"fsdp": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2}), ids=str)
def test_the_same_on_a_mesh(sizes):
    """Products of codes are exact; sums over devices differ in order, and the gradient is cast once more."""
    x, w, dy = operands(1e4)
    alone = jax.jit(product, static_argnums=3)(x, w, dy, True)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    with sharding.use(mesh):
        cut = jax.jit(product, static_argnums=3)(x, w, dy, True)
    assert sqnr(cut[0], np.asarray(alone[0])) > 100
    assert sqnr(cut[1], np.asarray(alone[1])) > 100
    assert sqnr(cut[2], np.asarray(alone[2])) > 25
