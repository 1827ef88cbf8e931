"""The rule of mu, against both readings of the paper, the released pull request, and a loop with gradients in it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.auto_scaling import LARGEST, SMALLEST, initial_mu, update_mu
from easylm_plus.numerics.formats import E4M3, cast
from easylm_plus.numerics.reduction import encode_shared, owned_sum

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8" / "c_mu.npz")
RATIOS = GOLDEN["ratios"]  # of 6,000 steps; some lie within one part in 10^15 of the threshold, so it takes float64


def mu_before_steps(mu, threshold, window, every):
    """mu as each of the steps uses it."""
    step = lambda mu, x: (jnp.where(x[0] % every == 0, update_mu(mu, x[1], True, threshold, window), mu), mu)
    with jax.enable_x64(True):
        return np.asarray(jax.lax.scan(step, mu.astype(jnp.float32), (jnp.arange(len(RATIOS)), jnp.asarray(RATIOS)))[1])


@pytest.mark.parametrize(
    "name, threshold, window, every", (("N8_r1e-5_w1000_f1", 1e-5, 1000, 1), ("N8_r1e-3_w100_f10", 1e-3, 100, 10))
)
def test_it_is_that_of_the_pull_request(name, threshold, window, every):
    """Bit for bit, until it passes 2, where that one has no bound."""
    expected = GOLDEN[f"mu_pr140_{name}"]
    bounded = len(expected) if expected.max() <= LARGEST else int(np.argmax(expected > LARGEST))
    ours = mu_before_steps(initial_mu(8), threshold, window, every)
    assert bounded > 3000
    np.testing.assert_array_equal(ours[:bounded], expected[:bounded])
    assert ours.max() <= LARGEST


def test_it_is_the_relative_reading():
    """In float32, 6,000 roundings away from float64."""
    ours = mu_before_steps(jnp.float32(1), 1e-5, 1000, 1)
    np.testing.assert_allclose(ours, GOLDEN["mu_relative"], rtol=6000 * 2**-24)
    assert np.abs(ours / GOLDEN["mu_literal"] - 1).max() > 0.9
    wrong_threshold = mu_before_steps(jnp.float32(1), 2e-5, 1000, 1)
    assert np.abs(wrong_threshold / GOLDEN["mu_relative"] - 1).max() > 0.4


def test_it_doubles_in_a_window_and_halves_at_once():
    mu = initial_mu(16, (2,))
    np.testing.assert_array_equal(mu, [0.25, 0.25])
    np.testing.assert_array_equal(update_mu(mu, jnp.array([0, 1e-4]), True)[1], 0.125)
    doubled = jax.lax.fori_loop(0, 1000, lambda _, mu: update_mu(mu, jnp.zeros(2), True), mu)
    np.testing.assert_allclose(doubled, 0.5, rtol=1e-4)


def test_it_has_bounds():
    always = lambda share, mu: jax.lax.fori_loop(0, 200, lambda _, mu: update_mu(mu, share, True, window=10), mu)
    assert always(jnp.float32(1), jnp.float32(1)) == SMALLEST
    assert always(jnp.float32(0), jnp.float32(1)) == LARGEST


@pytest.mark.parametrize("share", (0.0, 1.0, jnp.nan))
def test_a_step_that_does_not_count_leaves_it(share):
    assert update_mu(jnp.float32(0.3), jnp.float32(share), jnp.bool(False)) == jnp.float32(0.3)
    if share == share:
        assert update_mu(jnp.float32(0.3), jnp.float32(share), jnp.bool(True)) != jnp.float32(0.3)


def test_the_loop_settles_where_sums_no_longer_saturate():
    """120 steps of 8 ranks whose gradients agree by 64 %, eight times larger in steps 60 to 63; from mu = 1."""

    @jax.jit
    def step(mu, g):
        """The share of codes that saturate where the sum of codes, in float32, is rounded once; the next mu."""

        def one(g):
            local = encode_shared(g, ("ranks",), mu)
            return owned_sum(local, ("ranks",), ("ranks",)), local.scale_inv

        total, scale_inv = jax.vmap(one, axis_name="ranks")(g.reshape(8, 128, 64))
        code = cast(total, jnp.float32(1), E4M3)
        share = (jnp.abs(code.astype(jnp.float32)) == 448).mean()
        return update_mu(mu, share, True), (mu, share, 1 / (mu * scale_inv[0]))

    mu, seen = jnp.float32(1), []
    for i, seed in enumerate(GOLDEN["cl_seeds"]):
        noise = np.random.default_rng(seed).standard_normal((8, 8192))
        g = (0.8 * GOLDEN["cl_base"] + 0.6 * noise) * (8e-4 if 60 <= i < 64 else 1e-4)
        mu, observed = step(mu, jnp.asarray(g, jnp.float32))
        seen.append(observed)
    mus, shares, scales = np.asarray(seen, np.float64).T
    np.testing.assert_allclose(mus, GOLDEN["cl_mu"], rtol=1e-4)
    np.testing.assert_allclose(shares, GOLDEN["cl_ratio"], atol=1e-9)
    np.testing.assert_allclose(scales, GOLDEN["cl_shared_scale"], rtol=1e-6)
