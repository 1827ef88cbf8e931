"""FP8-LM's optimizer: against vectors of the released code, and what it must not lose, overflow or mistake.

tests/golden/fp8/b_adam50.npz: 50 steps on 256 weights. `msamp` is the released code run in float32, `ref` float64
arithmetic with the same storage, `fp8grad` the released code with gradients that are first cast to E4M3.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.numerics.formats import E4M3, E5M2, FORMATS, FP16, Scaled, decode, encode
from easylm_plus.training import scaled_adam
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.scaled_adam import FORMAT_OF, Formats, scaled_adamw

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden/fp8/b_adam50.npz"))
KEPT = list(GOLDEN["kept_steps"])
CASES = ("mid", "tiny", "sparse", "zero")
OK, NORM = jnp.array(True), jnp.float32(1)


def settings(**changes):
    """The optimizer section of the golden run: rate 1e-3, betas .9 and .95, decay .1, no clipping."""
    config = base().optimizer
    rate, b1, b2, eps, decay = map(float, GOLDEN["hparams"])
    config.update(learning_rate=rate, schedule="constant", b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=0.0)
    config.update(changes)
    return config


def built(formats=Formats(), rounding="nearest", seed=0, **changes):  # noqa: B008
    narrow = lambda name: name.endswith("kernel")
    return scaled_adamw(settings(**changes), 50, narrow, formats, rounding, seed)


def matrix(x):
    return jnp.asarray(x).reshape(16, 16)


def run(case, formats=Formats(), rounding="nearest", fp8=False):  # noqa: B008
    """(parameter, first moment, second moment) as stored, before the first step and after each of 50."""
    optimizer = built(formats, rounding)
    step, params = jax.jit(optimizer.step), {"kernel": encode(matrix(GOLDEN[f"{case}_p0"]), FORMATS[formats.master])}
    state, history = optimizer.init(params), []
    for g in GOLDEN[f"{case}_g"]:
        history.append((params["kernel"], state.m["kernel"], state.v["kernel"]))
        grad = encode(matrix(g), E4M3) if fp8 else matrix(g)
        params, state, _ = step({"kernel": grad}, state, params, NORM, OK)
    return [*history, (params["kernel"], state.m["kernel"], state.v["kernel"])]


def golden(case, t, which):
    """The same of the golden vectors after step t (from 0)."""
    source, prefix = ("msamp", f"{case}_fp8grad") if which == "fp8grad" else (which, case)
    of_codes = t if which == "msamp" else KEPT.index(t)
    of_scales = KEPT.index(t) if which == "fp8grad" else t
    codes = [matrix(GOLDEN[f"{prefix}__{source}_{name}"][of_codes]) for name in ("p16", "m8", "v16")]
    scales = [jnp.float32(GOLDEN[f"{prefix}__{source}_{name}"][of_scales]) for name in ("ps", "ms", "vs")]
    codes[1] = jax.lax.bitcast_convert_type(codes[1], E4M3.dtype)
    return [Scaled(code, 1 / scale) for code, scale in zip(codes, scales)]


def values(leaf):
    return np.asarray(decode(leaf), np.float64)


def equal(found, wanted):
    """Share of equal values."""
    return np.mean(values(found) == values(wanted))


def passes(history, case, which, least=(0.98, 0.995, 0.98)):
    """The gates of the golden README, at every step that the vectors hold; `least`: shares of equal p, m and v."""
    for t in range(50) if which == "msamp" else KEPT:
        found, wanted = history[t + 1], golden(case, t, which)
        same_scales = all(isinstance(a, Scaled) and a.scale_inv == b.scale_inv for a, b in zip(found, wanted))
        p, q = values(found[0]), values(wanted[0])
        close = np.max(np.abs(p - q)) <= 2e-3 * np.max(np.abs(q))
        if not (same_scales and close and all(map(lambda a, b, n: equal(a, b) >= n, found, wanted, least))):
            return False
    return True


# --- the released code, and what must differ from it visibly ---


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_are_those_of_the_released_code(case):
    history = run(case)
    assert passes(history, case, "msamp")
    assert passes(history, case, "ref", (0.98, 0.995, 0.85))


def naive_scale(largest, fmt, previous=1.0):
    good = jnp.isfinite(largest) & (largest > 0)
    return jnp.where(good, jnp.exp2(jnp.floor(jnp.log2(fmt.largest / jnp.where(good, largest, 1.0)))), previous)


def adam_of_stored_moments(p, m, v, g, rates):
    m, v = rates.b1 * m + (1 - rates.b1) * g, rates.b2 * v + (1 - rates.b2) * g * g
    root = jnp.sqrt(decode(encode(v, FP16))) / jnp.sqrt(rates.second_correction) + rates.eps
    return p - rates.rate / rates.first_correction * (decode(encode(m, E4M3)) / root), m, v


def adam_with_eps_inside(p, m, v, g, rates):
    m, v = rates.b1 * m + (1 - rates.b1) * g, rates.b2 * v + (1 - rates.b2) * g * g
    return p - rates.rate / rates.first_correction * m / jnp.sqrt(v / rates.second_correction + rates.eps), m, v


WRONG = {
    "master in E4M3": {"formats": Formats(master="e4m3")},
    "v in E4M3": {"formats": Formats(second="e4m3")},
    "m in E5M2": {"formats": Formats(first="e5m2")},
    "exp2(floor(log2))": {"scale_of": naive_scale},
    "update of the stored moments": {"adam": adam_of_stored_moments},
    "eps inside the root": {"adam": adam_with_eps_inside},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_gates_tell_wrong_ones_apart(wrong, monkeypatch):
    change = dict(WRONG[wrong])
    formats = change.pop("formats", Formats())
    for name, function in change.items():
        monkeypatch.setattr(scaled_adam, name, function)
    assert not passes(run("mid", formats), "mid", "msamp")


def test_v_in_e4m3_makes_updates_far_too_large():
    """Table 6, row 4: small v underflow to 0, and the update is m / eps. In multiples of the learning rate."""

    def largest_update(*args):
        p = np.stack([values(leaves[0]) for leaves in run(*args)])
        return np.max(np.abs(np.diff(p, axis=0))) / 1e-3

    for case in ("mid", "sparse"):
        assert largest_update(case) < 5
        assert largest_update(case, Formats(second="e4m3")) > 50


@pytest.mark.parametrize("case", ("mid", "tiny", "sparse"))
def test_fp8_gradients(case):
    """On their coarse grid exact ties are common, and go by the last bit of 0.9 m + 0.1 g: SQNR over the run."""

    def sqnr(formats):
        p, q = values(run(case, formats, fp8=True)[-1][0]), values(golden(case, 49, "fp8grad")[0])
        return 10 * np.log10(np.sum(q**2) / np.sum((p - q) ** 2))

    assert sqnr(Formats()) > 35
    assert sqnr(Formats(master="e4m3")) < 25


@pytest.mark.parametrize("adam, agrees", ((scaled_adam.adam, True), (adam_of_stored_moments, False)))
def test_one_step_with_fp8_gradients_from_the_released_codes_state(adam, agrees, monkeypatch):
    """Ties then cost one place of m, and nothing of p and v beyond their own rounding."""
    monkeypatch.setattr(scaled_adam, "adam", adam)
    optimizer, good = built(), []
    for case in ("mid", "tiny", "sparse"):
        p, m, v = golden(case, 0, "fp8grad")
        state = scaled_adam.AdamState(jnp.int32(1), {"kernel": m}, {"kernel": v})
        grads = {"kernel": encode(matrix(GOLDEN[f"{case}_g"][1]), E4M3)}
        params, state, _ = jax.jit(optimizer.step)(grads, state, {"kernel": p}, NORM, OK)
        p, m, v = golden(case, 1, "fp8grad")
        place = lambda x: (np.asarray(x.code).view(np.uint8) & 127).astype(int) * np.where(values(x) < 0, -1, 1)
        good += [np.max(np.abs(place(state.m["kernel"]) - place(m))) <= 1]
        good += [equal(params["kernel"], p) >= 0.98, equal(state.v["kernel"], v) >= 0.98]
    assert all(good) == agrees


# --- rounding the master ---


def test_weight_decay_of_1e4_a_step_is_lost_to_nearest_and_kept_by_stochastic_rounding():
    kept = {}
    for rounding in ("nearest", "stochastic"):
        history = [values(leaves[0]) for leaves in run("zero", rounding=rounding)]
        kept[rounding] = np.sum(history[-1] * history[0]) / np.sum(history[0] ** 2)
    assert kept["nearest"] == 1, "as the released code"
    assert kept["stochastic"] == pytest.approx((1 - 1e-4) ** 50, abs=5e-4)  # 1 - 5e-3; 256 weights: s.d. 1e-4


def test_stochastic_rounding_is_a_function_of_seed_and_step():
    def after(seed, count=0):
        optimizer = built(rounding="stochastic", seed=seed)
        params = {"a": {"kernel": encode(jnp.ones((16, 16)) * 0.02, FP16)}}
        params["b"] = jax.tree.map(jnp.array, params["a"])
        state = optimizer.init(params).replace(count=jnp.int32(count))
        new = optimizer.step(jax.tree.map(jnp.zeros_like, params), state, params, NORM, OK)[0]
        return np.asarray(new["a"]["kernel"].code), np.asarray(new["b"]["kernel"].code)

    first, other = after(0)
    np.testing.assert_array_equal(first, after(0)[0])
    assert len({x.tobytes() for x in (first, other, after(1)[0], after(0, count=1)[0])}) == 4


# --- skipped steps, clipping, formats ---


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
@pytest.mark.parametrize("bad", (jnp.nan, jnp.inf))
def test_a_step_that_does_not_count_changes_no_bit(rounding, bad):
    optimizer = built(rounding=rounding, clip_norm=1.0)
    draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)
    params = {"layers": {"kernel": encode(draw(3, 16, 8), FP16), "weight": draw(3, 8)}, "kernel": draw(8, 8)}
    params["kernel"] = encode(params["kernel"], FP16)
    grads = {"layers": {"kernel": encode(draw(3, 16, 8), E4M3), "weight": draw(3, 8)}, "kernel": draw(8, 8)}
    step, nowhere = jax.jit(optimizer.step), jnp.array(False)
    params, state, _ = step(grads, optimizer.init(params), params, NORM, OK)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, bad), grads)
    bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
    after = step(poisoned, state, params, jnp.float32(bad), nowhere)
    assert bits(after[:2]) == bits((params, state))
    assert after[1].count == 1
    counted = step(poisoned, state, params, jnp.float32(bad), OK)
    assert all(a != b for a, b in zip(bits(counted[:2]), bits((params, state))) if len(a) > 12)


def test_fp8_gradients_are_clipped():
    """The released code counted them in the norm, and left them as they were."""
    grad = encode(100 * jax.random.normal(jax.random.key(0), (16, 16)), E4M3)
    norm = float(np.sqrt(np.sum(values(grad) ** 2)))

    def first_moment(clip_norm):
        optimizer, params = built(Formats(first="float32"), clip_norm=clip_norm), {"kernel": encode(matrix(1), FP16)}
        state = optimizer.step({"kernel": grad}, optimizer.init(params), params, jnp.float32(norm), OK)[1]
        return np.sqrt(np.sum(values(state.m["kernel"]) ** 2)) / (1 - 0.9)

    matrix = lambda x: jnp.full((16, 16), x, jnp.float32)
    assert first_moment(0.5) == pytest.approx(0.5, rel=1e-5)
    assert first_moment(0.0) == pytest.approx(norm, rel=1e-5) and norm > 1000
    assert first_moment(2 * norm) == pytest.approx(norm, rel=1e-5), "nothing to clip"


def test_without_narrow_weights_it_is_adamw():
    """The optax chain: schedule, decay, clipping and correction, 50 steps."""
    config = settings(clip_norm=1.0, schedule="cosine", warmup_steps=5)
    rng = np.random.default_rng(0)
    start = {"kernel": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32), "bias": jnp.ones(8)}
    wide = scaled_adamw(config, 50, lambda name: False)
    formats = scaled_adamw(config, 50, lambda name: name == "kernel", Formats("float32", "float32", "float32"))
    runs = []
    for optimizer in (adamw(config, 50), wide, formats):
        params, state, step, rates = start, optimizer.init(start), jax.jit(optimizer.step), []
        for t in range(50):
            grads = jax.tree.map(lambda p, t=t: jnp.sin(p * (t + 1)), start)
            params, state, metrics = step(grads, state, params, jnp.float32(3.0), jnp.array(t != 7))
            rates.append(float(metrics["learning_rate"]))
        runs.append((params, rates))
    for params, rates in runs[1:]:
        assert rates == runs[0][1]
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(runs[0][0])):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        assert np.max(np.abs(params["kernel"] - start["kernel"])) > 1e-3


ROWS = (
    Formats("bf16"), Formats("float32"), Formats("float32", "float32", "float32"), Formats("fp16", "bf16", "bf16"),
    Formats("fp16", "e4m3", "e5m2"), Formats("e4m3"), Formats("fp16", "e4m3", "e4m3"),
)  # fmt: skip


@pytest.mark.parametrize("formats", ROWS, ids=str)
def test_the_other_rows_of_the_ablation_are_stored_as_said(formats):
    for which, leaf in zip((formats.master, formats.first, formats.second), run("tiny", formats)[-1]):
        assert isinstance(leaf, Scaled) == (FORMATS[which].largest is not None)
        assert FORMAT_OF[(leaf.code if isinstance(leaf, Scaled) else leaf).dtype] is FORMATS[which]
        assert np.all(np.isfinite(values(leaf))) and np.any(values(leaf) != 0)


def test_what_is_refused():
    ones = jnp.ones((16, 16))
    with pytest.raises(UserError, match=r"optimizer.decay = '\(': expected a regular expression"):
        built(decay="(")
    for wrong in (ones, encode(ones, E5M2), ones.astype(jnp.float16)):
        with pytest.raises(UserError, match=r"a/kernel is stored in \w+: expected optimizer.master = 'fp16'"):
            built().init({"a": {"kernel": wrong}})
    with pytest.raises(UserError, match=r"kernel has shape \(16,\): expected \[..., D, F\]"):
        built(Formats(master="bf16")).init({"kernel": jnp.ones(16, jnp.bfloat16)})
