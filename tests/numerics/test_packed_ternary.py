"""Packed ternary weights are those of training, bit by bit; their products are exact, and training's up to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.packed_ternary import PackedTernary, integer_product, pack, packed, unpack
from easylm_plus.numerics.ternary import Ternary, int8_activation, int8_codes, ternary_codes, ternary_weight
from easylm_plus.numerics.verbs import dense, project, project_grouped

GOLDEN = tiny.ROOT / "tests/golden/quant"
WEIGHTS = ("normal", "zeros", "tiny1e-7", "tiny_around_eps", "one_outlier", "constant", "ties", "single_nonzero")
ACTIVATIONS = ("normal", "with_zero_row", "tiny1e-7", "outlier", "neg_absmax", "ties", "batch3d")


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def far_from_a_tie(w, inverse):
    """Where the last bit of the mean decides nothing."""
    return np.abs(np.abs(w * inverse) - 0.5) > 1e-6


# --- what is rounded to ---


@pytest.mark.parametrize("kind", ("f32", "bf16"))
@pytest.mark.parametrize("case", WEIGHTS)
def test_codes_and_scales_of_the_released_code(case, kind):
    w, codes, inverse = (golden("weight_absmean")[f"{case}.{kind}.{part}"] for part in ("w", "codes", "inv_absmean"))
    found, scale = ternary_codes(jnp.asarray(w))
    # in bfloat16 the released code rounds the mean itself to 8 bits
    np.testing.assert_allclose(scale, inverse, rtol=1e-6 if kind == "f32" else 2**-8)
    if kind == "f32":
        sure = far_from_a_tie(w, inverse)
        np.testing.assert_array_equal(np.asarray(found)[sure], codes[sure])
        values = golden("weight_absmean")[f"{case}.f32.dequant"]
        np.testing.assert_allclose(np.asarray(ternary_weight(jnp.asarray(w)))[sure], values[sure], rtol=1e-6)


def test_a_stack_of_experts_has_a_scale_each():
    w = golden("weight_absmean")["expert_stack_3d.f32.w"]
    each = golden("weight_absmean")["expert_stack_3d.per_expert_dequant"]
    np.testing.assert_allclose(ternary_weight(jnp.asarray(w)), each, rtol=1e-6)
    assert np.abs(each - golden("weight_absmean")["expert_stack_3d.f32.dequant"]).max() > 1e-3, "one for all is another"


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_codes_of_activations(case):
    x, codes, scale = (golden("act_absmax")[f"{case}.f32.{part}"] for part in ("x", "codes", "scale"))
    found, largest = int8_codes(jnp.asarray(x))
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(127 / largest, scale, rtol=1e-6)
    np.testing.assert_allclose(int8_activation(x), golden("act_absmax")[f"{case}.f32.fakequant"], rtol=1e-6)


def test_one_scale_for_all_tokens_is_told_apart():
    x, codes = (golden("act_absmax")[f"batch3d.f32.{part}"] for part in ("x", "codes"))
    assert (np.round(x * 127 / np.abs(x).max()) != codes).mean() > 0.1


# --- the layer ---


def test_a_layer_and_its_gradients():
    x, w, y, dy, dx, dw = (golden("bitlinear_ste")[f"plain.{part}"] for part in ("x", "w", "y", "dy", "dx", "dw"))
    for leaf, learns in ((Ternary(jnp.asarray(w.T)), True), (packed(jnp.asarray(w.T)), False)):
        found, pull = jax.vjp(lambda x: project(x, leaf), jnp.asarray(x))  # noqa: B023
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-5)
        np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dx, rtol=0, atol=1e-5)
        if learns:
            learned = jax.vjp(project, jnp.asarray(x), leaf)[1](jnp.asarray(dy))[1]
            np.testing.assert_allclose(learned.latent.T, dw, rtol=0, atol=1e-5)
    plain = project(jnp.asarray(x), dense(packed(jnp.asarray(w.T))))
    assert np.abs(plain - y).max() > 1e-3, "activations that are not rounded"


def test_products_are_exact():
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (3, 700)).astype(np.int8)
    codes = rng.integers(-1, 2, (700, 50))
    expected = x.astype(np.int64) @ codes
    w = PackedTernary(pack(jnp.asarray(codes)), jnp.ones(()), 700)
    np.testing.assert_array_equal(integer_product(jnp.asarray(x), w), expected)
    swapped = PackedTernary(w.codes[:, ::-1], w.scale, 700)
    assert (np.asarray(integer_product(jnp.asarray(x), swapped)) != expected).mean() > 0.9


def test_served_as_trained():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(2, 5, 300)).astype(np.float32), rng.normal(size=(300, 40)).astype(np.float32)
    np.testing.assert_allclose(project(x, packed(jnp.asarray(w))), project(x, Ternary(jnp.asarray(w))), rtol=1e-5,
                               atol=1e-5)  # fmt: skip
    again = packed(decode(packed(jnp.asarray(w))))  # codes rounded once more have another scale
    assert abs(float(again.scale) / float(packed(jnp.asarray(w)).scale) - 1) > 0.2


# --- how it lies ---


@pytest.mark.parametrize("xp", (np, jnp), ids=("numpy", "jax"))
@pytest.mark.parametrize("shape", ((256, 3), (1, 1), (257, 4), (64, 5), (2, 3, 300, 7)), ids=str)
def test_packing_loses_nothing(shape, xp):
    codes = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    bytes_ = pack(xp.asarray(codes))
    assert isinstance(bytes_, np.ndarray) == (xp is np) and bytes_.dtype == np.uint8
    assert bytes_.shape == (*shape[:-2], shape[-1], -(-shape[-2] // 256) * 64)
    np.testing.assert_array_equal(unpack(bytes_, shape[-2]).swapaxes(-1, -2), codes)
    padding = np.asarray(unpack(bytes_, bytes_.shape[-1] * 4))[..., shape[-2] :]
    assert not padding.any(), "padding is the code 0"


def test_the_layout():
    codes = np.zeros((512, 1), np.int8)
    codes[256 + 5 + 64 * 2] = -1
    bytes_ = pack(codes)[0]
    zero = 0b01010101
    assert bytes_[64 + 5] == zero - (1 << 4) and (np.delete(bytes_, 64 + 5) == zero).all()


def test_a_stack_and_its_matrices():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 100, 8)), jnp.float32)
    stack = packed(w)
    assert stack.shape == w.shape and stack[1].shape == (3, 100, 8) and stack[1, 2].shape == (100, 8)
    np.testing.assert_array_equal(decode(stack[1, 2]), decode(packed(w[1, 2])))
    on_host = jax.tree.map(np.asarray, stack)
    assert isinstance(decode(on_host), np.ndarray)
    np.testing.assert_allclose(decode(on_host), ternary_weight(w), rtol=1e-6)


def test_experts():
    rng = np.random.default_rng(3)
    w, x = jnp.asarray(rng.normal(size=(2, 40, 8)), jnp.float32), jnp.asarray(rng.normal(size=(24, 40)), jnp.float32)
    groups = Groups(jnp.asarray([8, 16]), tile=8, implementation="tiled")
    np.testing.assert_allclose(project_grouped(x, packed(w), groups), project_grouped(x, Ternary(w), groups), atol=1e-5)
    other = packed(w[::-1])
    assert np.abs(project_grouped(x, other, groups) - project_grouped(x, Ternary(w), groups)).max() > 0.1
