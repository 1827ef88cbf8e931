"""The sampler draws from the distribution that temperature, top-k and nucleus describe, derived here in NumPy."""

import jax
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.inference.sampling import GREEDY, Sampling, _filtered, checked, sample

DRAWS = 4000
LOGITS = np.asarray([1.3, -0.2, 2.1, 0.4, 2.0, -3.0, 0.9], np.float32)
OPTIONS = (
    Sampling(1.0),
    Sampling(0.7),
    Sampling(2.5),
    Sampling(1.0, top_k=3),
    Sampling(1.0, top_p=0.8),
    Sampling(1.5, top_k=4, top_p=0.7),
    Sampling(1.0, top_k=2, top_p=0.95),
)
draw = jax.jit(sample)


def drawn(sampling, seed=0):
    """DRAWS tokens from the same logits."""
    return np.asarray(draw(np.tile(LOGITS, (DRAWS, 1)), jax.random.key(seed), sampling))


def described(sampling):
    """The distribution float64[V]: tempered, cut to the k likeliest, of those to the smallest nucleus of mass p."""
    p = np.exp(LOGITS.astype(np.float64) / sampling.temperature)
    order = np.argsort(-p)
    p[order[sampling.top_k or len(p) :]] = 0
    p /= p.sum()
    nucleus = np.searchsorted(np.cumsum(p[order]), sampling.top_p) + 1 if sampling.top_p < 1 else len(p)
    p[order[nucleus:]] = 0
    return p / p.sum()


def chi_square(tokens, p):
    """Pearson's statistic per degree of freedom; around 1 where the tokens come from p, infinite where they cannot."""
    counts, expected = np.bincount(tokens, minlength=len(p)), len(tokens) * p
    if counts[expected == 0].any():
        return np.inf
    seen = expected > 0
    return ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum() / max(seen.sum() - 1, 1)


@pytest.mark.parametrize("sampling", OPTIONS)
def test_draws_follow_the_description(sampling):
    p = described(sampling)
    tokens = drawn(sampling)
    assert chi_square(tokens, p) < 4
    assert set(tokens) <= set(np.flatnonzero(p)) and set(np.flatnonzero(p > 0.01)) <= set(tokens)


@pytest.mark.parametrize(
    ("sampling", "other"),
    (
        (Sampling(0.7), Sampling(0.8)),
        (Sampling(1.0, top_k=3), Sampling(1.0, top_k=2)),
        (Sampling(1.0, top_k=3), Sampling(1.0)),
        (Sampling(1.0, top_p=0.8), Sampling(1.0, top_p=0.7)),
    ),
)
def test_draws_do_not_follow_another_description(sampling, other):
    assert chi_square(drawn(sampling), described(other)) > 4


def test_temperature_near_zero_is_greedy():
    rows = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    greedy = rows.argmax(1)
    for sampling in (GREEDY, Sampling(1e-4), Sampling(3.0, top_k=1), Sampling(3.0, top_p=1e-6)):
        np.testing.assert_array_equal(draw(rows, jax.random.key(1), sampling), greedy)
    assert (draw(rows, jax.random.key(1), Sampling(1.0)) != greedy).any()


def test_a_tie_goes_to_the_lower_id():
    tied = np.asarray([[0.0, 2.0, 2.0, 1.0]], np.float32)
    for sampling in (GREEDY, Sampling(1.0, top_k=1)):
        assert draw(tied, jax.random.key(0), sampling).tolist() == [1]


def test_seeds_are_reproducible_and_rows_independent():
    hot = Sampling(1.0)
    np.testing.assert_array_equal(drawn(hot, seed=5), drawn(hot, seed=5))
    assert (drawn(hot, seed=5) != drawn(hot, seed=6)).mean() > 0.5
    tokens = drawn(hot, seed=5)
    assert abs(np.corrcoef(tokens[:-1], tokens[1:])[0, 1]) < 0.06


def test_nothing_is_cut_that_was_not_asked_for():
    """Rounding of the cumulated mass must not count as a nucleus, even with a large vocabulary."""
    peaked = 4 * jax.random.normal(jax.random.key(2), (1, 50_257))
    kept = lambda sampling: int(np.isfinite(_filtered(peaked, sampling)).sum())
    assert kept(Sampling(1.0)) == 50_257
    assert kept(Sampling(1.0, top_k=9)) == 9


@pytest.mark.parametrize(
    ("sampling", "message"),
    (
        (Sampling(-0.1), r"temperature = -0\.1: expected 0 \(greedy\) or more"),
        (Sampling(1.0, top_p=0.0), r"top_p = 0\.0: expected a number in \(0, 1\]"),
        (Sampling(1.0, top_p=1.5), r"top_p = 1\.5"),
        (Sampling(1.0, top_k=-1), r"top_k = -1: expected 0 \(all\) or more"),
    ),
)
def test_options_that_make_no_sense(sampling, message):
    with pytest.raises(UserError, match=message):
        checked(sampling)
