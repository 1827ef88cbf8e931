"""Embeddings and heads in 8 bits a row: rounded once, multiplied by as the matrix that the codes mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.int8_rows import int8_rows
from easylm_plus.numerics.kernels import choice, native
from easylm_plus.numerics.ternary import int8_codes
from easylm_plus.numerics.verbs import dense, lookup, project, unembed

rng = np.random.default_rng(0)
TABLE = rng.normal(size=(96, 70)).astype(np.float32) * 10.0 ** rng.uniform(-2, 2, (96, 1)).astype(np.float32)
PATHS = ("xla", "ffi") if isinstance(native.found(), native.Native) else ("xla",)
LEVELS = range(native.found().level + 1) if len(PATHS) == 2 else ()


def tokens(N, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(N).normal(size=(N, 70)), dtype)


# --- what is rounded to ---


@pytest.mark.parametrize("xp", (np, jnp), ids=("numpy", "jax"))
def test_rounding_is_to_a_255th_of_each_row(xp):
    w = int8_rows(xp.asarray(TABLE))
    assert isinstance(w.codes, np.ndarray) == (xp is np)
    assert (w.codes.dtype, w.scale.dtype, w.shape) == (np.int8, np.float32, TABLE.shape)
    most = np.abs(TABLE).max(1)
    np.testing.assert_allclose(w.scale, most / 127, rtol=1e-6)
    assert (np.abs(np.asarray(w.codes)).max(1) == 127).all()
    error = np.abs(np.asarray(decode(w)) - TABLE)
    assert (error <= most[:, None] / 254 * 1.0001).all()
    assert not (error <= TABLE.max() / 254 * most[:, None] / most.max() * 0.5).all(), "the bound is met"
    assert (np.abs(TABLE - np.round(TABLE / (most.max() / 127)) * (most.max() / 127)) > most[:, None] / 254).any(), (
        "one scale for all rows would not do"
    )


def test_a_row_of_zeros_and_a_stack():
    table = TABLE.reshape(2, 48, 70).copy()
    table[1, 3] = 0
    w = int8_rows(jnp.asarray(table))
    assert w.shape == (2, 48, 70) and w.scale.shape == (2, 48) and np.isfinite(np.asarray(decode(w))).all()
    assert not np.asarray(decode(w))[1, 3].any()
    np.testing.assert_array_equal(decode(w[1]), decode(int8_rows(jnp.asarray(table[1]))))


# --- how it multiplies ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=lambda d: d.__name__)
def test_head_of_a_tied_model_and_head_of_its_own(dtype, path):
    table, kernel = int8_rows(jnp.asarray(TABLE)), int8_rows(jnp.asarray(TABLE.T), transposed=True)
    assert kernel.shape == (70, 96)
    np.testing.assert_array_equal(kernel.codes, table.codes)
    np.testing.assert_array_equal(dense(kernel), dense(table).T)
    for N in (1, 2, 5, 8, 9):
        x = tokens(N, dtype)
        expected = np.asarray(x, np.float64) @ np.asarray(decode(table), np.float64).T
        with choice.use(path):
            tied = jax.jit(lambda x, w: unembed(x, w))(x, table)
            own = jax.jit(lambda x, w: project(x, w))(x[None], kernel)[0]
        assert tied.dtype == own.dtype == dtype
        np.testing.assert_array_equal(tied, own)
        rtol, atol = (1e-6, 1e-5) if dtype == jnp.float32 else (2**-8, 1e-6)
        size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(decode(table), np.float64)).T
        assert (np.abs(np.asarray(tied, np.float64) - expected) <= rtol * np.abs(expected) + atol * size).all()
    unscaled = np.asarray(x, np.float64) @ np.asarray(table.codes, np.float64).T
    assert not np.allclose(np.asarray(tied, np.float64), unscaled, rtol=0.1)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: native.LEVELS[level])
@pytest.mark.parametrize("D", (1, 15, 16, 70, 160))
def test_every_processors_kernel(D, level):
    """Sums of few whole numbers are exact in any order."""
    codes = rng.integers(-127, 128, (67, D)).astype(np.int8)
    scale = 2.0 ** rng.integers(-3, 4, 67).astype(np.float32)
    for N in range(1, 9):
        x = rng.integers(-9, 10, (N, D)).astype(np.float32)
        found = native.rows_product(jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scale), level=level)
        np.testing.assert_array_equal(found, x @ codes.T.astype(np.float32) * scale)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_activations(path):
    w, x = int8_rows(jnp.asarray(TABLE)), tokens(3)
    dy = jnp.asarray(rng.normal(size=(3, 96)), jnp.float32)
    with choice.use(path):
        found = jax.jit(lambda x: jax.vjp(lambda x: unembed(x, w), x)[1](dy)[0])(x)
    np.testing.assert_allclose(found, jax.vjp(lambda x: unembed(x, decode(w)), x)[1](dy)[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=lambda d: d.__name__)
def test_lookup(dtype):
    w, ids = int8_rows(jnp.asarray(TABLE)), jnp.asarray([[3, 95], [0, 3]])
    np.testing.assert_array_equal(lookup(ids, w, dtype), lookup(ids, decode(w).astype(dtype), dtype))
    assert lookup(ids, w, dtype).dtype == dtype
    assert (lookup(ids, w, dtype) != lookup(ids, jnp.asarray(TABLE), dtype)).any()


def test_vmap_and_a_forced_path():
    w, x = int8_rows(jnp.asarray(TABLE)), tokens(6).reshape(3, 2, 70)
    expected = unembed(x, decode(w))
    for path in PATHS:
        with choice.use(path):
            np.testing.assert_allclose(jax.vmap(lambda x: unembed(x, w))(x), expected, rtol=1e-5, atol=1e-3)


def test_why_activations_are_not_rounded():
    """The error of the logits, with weights rounded and with both: what the module's docstring says."""
    table = np.random.default_rng(1).normal(size=(400, 256)).astype(np.float32)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(50, 256)), jnp.float32)
    w, exact = decode(int8_rows(jnp.asarray(table))), x @ table.T
    codes, largest = int8_codes(x)
    error = lambda logits: float(jnp.sqrt(jnp.mean((logits - exact) ** 2)))
    weights_only, both = error(x @ w.T), error(codes * largest / 127 @ w.T)
    assert 1.3 < both / weights_only < 1.6
