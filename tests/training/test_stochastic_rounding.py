"""Stochastic rounding of masters: no bias in any format, nothing moved that a format holds, no overflow.

The deliberately wrong ones are rounding to nearest and cutting off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.formats import FORMATS
from easylm_plus.training import scaled_adam
from easylm_plus.training.scaled_adam import stochastic


def truncated(key, x, scale, fmt):
    info = jnp.finfo(fmt.dtype)
    last_place = 2.0 ** jnp.floor(jnp.log2(jnp.abs(x * scale))) * float(info.eps)
    return (jnp.floor(x * scale / last_place) * last_place).astype(fmt.dtype)


def bias(round_, name, x, draws=20_000):
    """Standard errors between the mean of many roundings of x and x."""
    codes = round_(jax.random.key(1), jnp.full((draws, 1), x, jnp.float32), jnp.float32(1), FORMATS[name])
    found = np.asarray(codes, np.float64)
    assert len(np.unique(found)) <= 2
    return abs(found.mean() - float(np.float32(x))) / max(found.std() / draws**0.5, 1e-9 * abs(x))


@pytest.mark.parametrize("name", ("fp16", "bf16", "e4m3", "e5m2"))
def test_stochastic_rounding_is_unbiased(name):
    """Also of subnormals, which FP8 has within 2^-15 of its largest."""
    tiny = float(jnp.finfo(FORMATS[name].dtype).tiny)
    points = [1.37, -1.37, 100.3, -0.0123, 3.3 * tiny] + ([0.3 * tiny] if name != "bf16" else [])
    assert max(bias(stochastic, name, x) for x in points) < 4.5
    nearest = lambda key, *rest: scaled_adam.nearest(*rest)
    assert min(bias(nearest, name, x) for x in points) > 100
    assert max(bias(truncated, name, x) for x in points) > 100


@pytest.mark.parametrize("name", ("fp16", "bf16", "e4m3", "e5m2"))
def test_what_a_format_holds_is_not_moved_and_what_it_does_not_saturates(name):
    fmt = FORMATS[name]
    codes = np.arange(256, dtype=np.uint8) if name[0] == "e" else np.arange(2**16, dtype=np.uint16)
    held = codes.view(fmt.dtype).astype(np.float32)
    held = held[np.isfinite(held) & ((held == 0) | (np.abs(held) > 2.0**-119))]  # BF16's smallest: float32's limit
    rounded = lambda x: np.asarray(stochastic(jax.random.key(0), jnp.atleast_2d(x), 1.0, fmt), np.float32)
    np.testing.assert_array_equal(rounded(held)[0], held)
    assert len(held) > 200
    largest = float(jnp.finfo(fmt.dtype).max)
    for x, wanted in ((3.4e38, largest), (jnp.inf, largest), (-3.4e38, -largest), (-jnp.inf, -largest)):
        assert np.all(rounded(jnp.full(99, x)) == wanted)
    below = set(rounded(jnp.full(9999, largest * (1 - 1e-6 - float(jnp.finfo(fmt.dtype).eps) / 4))).ravel())
    assert below == {largest, float(held[held < largest].max())}
    assert jnp.isnan(rounded(jnp.full((1, 1), jnp.nan))).all(), "a NaN is not hidden"
