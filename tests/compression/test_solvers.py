"""GPTQ, AWQ, Wanda and SparseGPT on one matrix: against the textbook written out, and against doing less."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.compression import gptq as gptq_module
from easylm_plus.compression.awq import ALPHAS, SHARES, awq, clipped, scales
from easylm_plus.compression.gptq import gptq
from easylm_plus.compression.pruning import kept_of, magnitude, sparsegpt, wanda
from easylm_plus.compression.surgeon import DAMPING, change, factor
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.integer import Grid, integers, unpack
from easylm_plus.numerics.sparsity import sparse

D, F = 48, 20


def problem(D=D, F=F, rows=400, seed=0):
    """(weights, inputs): inputs are correlated, and some of them large."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, D)) @ rng.normal(size=(D, D)) * np.exp(rng.normal(size=D))
    return rng.normal(size=(D, F)).astype(np.float32), x.astype(np.float32)


def damage(w, new, x):
    """Mean square by which outputs change."""
    return float(np.square(x @ (np.asarray(new) - w)).mean())


# --- the textbook: in-feature after in-feature, the inverse taken anew each time, in float64 ---


def written_out(w, x, settle):
    """settle(i, weights now, inverse of what is left) -> what in-feature i becomes."""
    H = x.astype(np.float64).T @ x
    H += DAMPING * np.diag(H).mean() * np.eye(len(H))
    w, left = w.astype(np.float64).copy(), np.arange(len(w))
    for i in range(len(w)):
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        new = settle(i, w, inverse)
        error = (w[i] - new) / inverse[0, 0]
        w[left] -= np.outer(inverse[0], error)
        left = left[1:]
        w[i] = new
    return w


@pytest.mark.parametrize("bits", (4, 2))
def test_gptq_is_the_textbook(bits):
    w, x = problem()
    scale = np.abs(w).max(0).astype(np.float64) / (2 ** (bits - 1) - 1)
    grid = lambda v: np.clip(np.round(v / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    expected = written_out(w, x, lambda i, w, _: grid(w[i]) * scale)
    found = gptq(w, x.T @ x, bits)
    np.testing.assert_array_equal(unpack(found), grid(expected))
    nearest = integers(jnp.asarray(w), bits)
    assert (np.asarray(unpack(nearest)) != grid(expected)).mean() > 0.1, "rounding to nearest is told apart"


@pytest.mark.parametrize("share", (0.57, 0.7, 0.3))
def test_as_many_stay_as_there_is_room_for(share):
    """Where share * D * F and share * (D * F) are not the same whole number, too: 171 and 170 of 12 x 25."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(12, 25)), jnp.float32)
    kept = magnitude(w, share)
    assert int(kept.sum()) == kept_of(12, 25, share, "magnitude")
    np.testing.assert_array_equal(decode(sparse(w, kept, kept_of(12, 25, share, "magnitude"))), jnp.where(kept, w, 0))


def test_gptq_as_qwix_does_it(monkeypatch):
    """Code for code, on its grids: those of a group's weights before anything made up for errors, a bit wider than
    ours (numerics/test_integer.py)."""
    with np.load(tiny.ROOT / "tests/golden/quant/qwix.npz") as arrays:
        w, gram, codes, scale = (arrays[name] for name in ("w", "gram", "gptq.codes", "gptq.scale"))
    wider = lambda w, bits, asymmetric, axis=-2: Grid(jnp.abs(w).max(axis) / (2 ** (bits - 1) - 0.5), None)
    monkeypatch.setattr(gptq_module, "grid", wider)
    u, _ = factor(gram, DAMPING)
    found = [
        gptq_module._rounded(jnp.asarray(w), jnp.asarray(u), jnp.arange(64), 4, 32, False, static)
        for static in (True, False)
    ]
    np.testing.assert_array_equal(unpack(found[0]), codes.T)
    np.testing.assert_array_equal(found[0].scales, scale.T)
    assert (np.asarray(unpack(found[1])) != codes.T).mean() > 0.02, "grids of weights that were changed"


@pytest.mark.parametrize("share", (0.5, 0.9))
def test_sparsegpt_is_the_textbook(share):
    """One block: what goes is chosen with the first inverse of all later in-features each, and all at once."""
    w, x = problem()
    H = x.astype(np.float64).T @ x
    H += DAMPING * np.diag(H).mean() * np.eye(D)
    diagonal = np.asarray([np.linalg.inv(H[i:, i:])[0, 0] for i in range(D)])
    score = w.astype(np.float64) ** 2 / diagonal[:, None]
    stays = np.ones(D * F, bool)
    stays[np.argsort(score.ravel(), kind="stable")[: int(share * D * F)]] = False
    stays = stays.reshape(D, F)
    expected = written_out(w, x, lambda i, w, _: np.where(stays[i], w[i], 0))
    found, kept = sparsegpt(w, x.T @ x, share)
    np.testing.assert_array_equal(kept, stays)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert int(kept.sum()) == kept_of(D, F, share, "sparsegpt")
    assert np.abs(np.where(stays, w, 0) - expected).max() > 0.1, "weights that are only left out are told apart"


def test_sparsegpt_chooses_fours_as_it_comes_to_them():
    w, x = problem()
    stays = np.ones((D, F), bool)

    def settle(i, now, inverse):
        if i % 4 == 0:
            score = now[i : i + 4] ** 2 / [[np.linalg.inv(np.linalg.inv(inverse)[k:, k:])[0, 0]] for k in range(4)]
            stays[i : i + 4] = score.argsort(0, kind="stable").argsort(0) >= 2
        return np.where(stays[i], now[i], 0)

    expected = written_out(w, x, settle)
    found, kept = sparsegpt(w, x.T @ x, 0.0)
    np.testing.assert_array_equal(kept, stays)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert (np.asarray(kept) != np.asarray(sparsegpt(w, x.T @ x, 0.5)[1])).any()


# --- what is gained ---


@pytest.mark.parametrize("asymmetric", (False, True))
@pytest.mark.parametrize(("bits", "group"), ((4, 0), (3, 12), (4, 24)))
def test_fitted_codes_change_outputs_less(bits, group, asymmetric):
    w, x = problem()
    gram, size = x.T @ x, np.abs(x).sum(0)
    nearest = damage(w, decode(integers(jnp.asarray(w), bits, group, asymmetric)), x)
    found = {
        "gptq": decode(gptq(w, gram, bits, group, asymmetric)),
        "act_order": decode(gptq(w, gram, bits, group, asymmetric, act_order=True)),
        "awq": decode(awq(w, gram, size, bits, group, asymmetric)),
    }
    for method, new in found.items():
        assert damage(w, new, x) < 0.8 * nearest, method
    nothing = decode(gptq(w, np.eye(D, dtype=np.float32), bits, group, asymmetric))
    assert damage(w, nothing, x) > 0.9 * nearest, "without knowing the inputs nothing is gained"


def test_blocks_do_not_change_the_outcome():
    """A block of 128 and the rest, against the textbook."""
    w, x = problem(180, 6, 600)
    scale = np.abs(w).max(0).astype(np.float64) / 7
    expected = written_out(w, x, lambda i, w, _: np.clip(np.round(w[i] / scale), -8, 7) * scale)
    found = decode(gptq(w, x.T @ x, 4))
    assert np.mean(np.abs(found - expected) > 1e-3) < 0.02  # float32 turns a tie here and there
    assert damage(w, found, x) < 1.02 * damage(w, expected, x)
    assert np.mean(np.abs(np.asarray(decode(integers(jnp.asarray(w), 4))) - expected) > 1e-3) > 0.1


def test_awq_takes_the_best_of_its_grid():
    w, x = problem()
    gram, size = jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(0))
    mean = size / size.mean()
    tried = [decode(integers(jnp.asarray(w), 3, 12, False, scales(mean, n / ALPHAS))) for n in range(ALPHAS)]
    errors = [float(change(jnp.asarray(w), new, gram)) for new in tried]
    np.testing.assert_allclose(errors, [damage(w, new, x) * x.shape[0] * F for new in tried], rtol=1e-3)
    best = int(np.argmin(errors))
    assert best > 0
    found = awq(w, gram, size, 3, 12)
    np.testing.assert_allclose(found.channel, scales(mean, best / ALPHAS), rtol=1e-5)
    assert damage(w, decode(found), x) < 0.98 * damage(w, tried[best], x), "and clips"
    np.testing.assert_allclose(scales(mean, 0.0), np.ones(D))
    assert float(jnp.sqrt(scales(mean, 0.5).max() * scales(mean, 0.5).min())) == pytest.approx(1)


def test_clipping_takes_the_best_of_its_shares():
    """By hand, group after group and output after output."""
    w, x = problem()
    s = np.exp(np.random.default_rng(5).normal(size=D)).astype(np.float32)
    found = clipped(jnp.asarray(w), jnp.asarray(x.T @ x), jnp.asarray(s), 3, 12, False)
    up, down = w * s[:, None], x / s
    for g in range(4):
        rows = slice(12 * g, 12 * g + 12)
        for f in range(F):
            scale = np.abs(up[rows, f]).max() / 3
            tried = [np.clip(np.round(up[rows, f] / (scale * p)), -4, 3) * scale * p for p in np.asarray(SHARES)]
            lost = [np.square(down[:, rows] @ (new - up[rows, f])).sum() for new in tried]
            best = int(np.argmin(lost))
            assert found.scales[g, f] == pytest.approx(scale * float(SHARES[best]), rel=1e-5)
    whole = integers(jnp.asarray(w), 3, 12, False, jnp.asarray(s))
    assert (np.asarray(found.scales) < np.asarray(whole.scales) * 0.99).mean() > 0.2


# --- what goes ---


def test_magnitude_and_wanda_by_hand():
    w = np.asarray([[1.0, -4.0], [-2.0, 3.0], [3.0, 2.0], [-4.0, 0.1]], np.float32)
    gram = np.diag([100.0, 1, 1, 1]).astype(np.float32)
    assert np.asarray(magnitude(w, 0.5)).tolist() == [[False, True], [False, True], [True, False], [True, False]]
    assert np.asarray(wanda(w, gram, 0.5)).tolist() == [[True, True], [False, True], [False, False], [True, False]]
    assert np.asarray(wanda(w, gram, 0.0)).tolist() == [[True, True], [False, True], [False, False], [True, False]]
    assert np.asarray(magnitude(w, 0.25)).sum() == 6 == kept_of(4, 2, 0.25, "magnitude")
    assert (np.asarray(wanda(w, gram, 0.25)).sum(0) == 3).all() and kept_of(4, 2, 0.25, "wanda") == 6


@pytest.mark.parametrize("share", (0.5, 0.8, 0.0))
def test_who_knows_more_loses_less(share):
    w, x = problem(seed=3)
    gram = x.T @ x
    kept = {"magnitude": magnitude(w, share), "wanda": wanda(w, gram, share)}
    found = {method: damage(w, np.where(stays, w, 0), x) for method, stays in kept.items()}
    found["sparsegpt"] = damage(w, sparsegpt(w, gram, share)[0], x)
    assert found["sparsegpt"] < 0.95 * found["wanda"] < 0.95 * found["magnitude"]


@pytest.mark.parametrize("D", (300, 130, 12))
def test_shares_are_exact_whatever_the_blocks(D):
    w, x = problem(D, 5, 2 * D)
    for share in (0.5, 0.97):
        new, kept = sparsegpt(w, x.T @ x, share)
        assert int(kept.sum()) == kept_of(D, 5, share, "sparsegpt")
        assert not np.asarray(new)[~np.asarray(kept)].any() and np.isfinite(new).all()
    if D % 4 == 0:
        kept = np.asarray(sparsegpt(w, x.T @ x, 0.0)[1])
        assert (kept.reshape(-1, 4, 5).sum(1) == 2).all()
    else:
        with pytest.raises(ValueError, match=f"fours do not divide {D}"):
            sparsegpt(w, x.T @ x, 0.0)


# --- care ---


def test_inputs_that_never_come():
    w, x = problem()
    x[:, [3, 17]] = 0
    gram, size = x.T @ x, np.abs(x).sum(0)
    u, dead = factor(gram)
    assert np.flatnonzero(dead).tolist() == [3, 17] and np.isfinite(u).all()
    for leaf in (gptq(w, gram, 4, 12), gptq(w, gram, 4, act_order=True), awq(w, gram, size, 4, 12)):
        new = np.asarray(decode(leaf))
        assert np.isfinite(new).all() and damage(w, new, x) < damage(w, 0 * w, x) / 20
    assert not np.asarray(decode(gptq(w, gram, 4)))[[3, 17]].any()
    nothing = gptq(w, 0 * gram, 4)
    assert np.isfinite(decode(nothing)).all()


def test_the_factor():
    _, x = problem()
    u, _ = factor(x.T @ x)
    H = x.astype(np.float64).T @ x
    H += DAMPING * np.diag(H).mean() * np.eye(D)
    assert not np.tril(u, -1).any()
    np.testing.assert_allclose(u.T.astype(np.float64) @ u, np.linalg.inv(H), rtol=1e-4, atol=1e-6 / np.diag(H).min())
    # few rows: singular but for the damping
    assert np.isfinite(factor(x[:5].T @ x[:5])[0]).all()


def test_the_same_again():
    w, x = problem()
    one, two = (gptq(w, x.T @ x, 3, 12, act_order=True) for _ in range(2))
    np.testing.assert_array_equal(one.codes, two.codes)
