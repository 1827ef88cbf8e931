"""Learning rates are the closed forms that the papers give, at every step; a rate one step off is told apart."""

import math

import jax
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.training.schedules import schedule, weight_decay

PEAK, END, WARMUP, TOTAL = 3e-3, 3e-4, 10, 110
SECOND = {"stage_at": 0.5, "stage_learning_rate": 1e-3}


def build(kind, **changes):
    config = {"schedule": kind, "learning_rate": PEAK, "end_learning_rate": END, "warmup_steps": WARMUP,
              "warmup_share": 0.0, **SECOND, **changes}  # fmt: skip
    return jax.jit(schedule(config, TOTAL))


def expected(kind, step):
    """The rate in exact arithmetic."""
    if step < WARMUP:
        done, warm = 0.0, (step + 1) / WARMUP
    else:
        done, warm = (step - WARMUP) / (TOTAL - WARMUP), 1.0
    line = lambda start: start + (END - start) * done
    half = lambda start: END + (start - END) * (1 + math.cos(math.pi * done)) / 2
    late = step >= SECOND["stage_at"] * TOTAL
    rates = {
        "constant": PEAK,
        "linear": line(PEAK),
        "cosine": half(PEAK),
        "two_stage": line(SECOND["stage_learning_rate"] if late else PEAK),
        "two_stage_cosine": half(SECOND["stage_learning_rate"] if late else PEAK),
    }
    return warm * rates[kind]


def agrees(kind, rate):
    steps = range(TOTAL + 5)
    wanted = [expected(kind, min(step, TOTAL)) for step in steps]
    return np.allclose([rate(np.int32(step)) for step in steps], wanted, rtol=3e-6, atol=0)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "two_stage", "two_stage_cosine"])
def test_closed_forms(kind):
    rate = build(kind)
    assert agrees(kind, rate)
    assert not agrees(kind, lambda step: rate(step + 1))


def test_key_points():
    rates = {kind: build(kind) for kind in ("linear", "cosine", "two_stage")}
    for rate in rates.values():
        np.testing.assert_allclose(
            [rate(np.int32(s)) for s in (0, WARMUP - 1, WARMUP)], [PEAK / WARMUP, PEAK, PEAK], rtol=1e-6
        )
        np.testing.assert_allclose(rate(np.int32(TOTAL)), END, rtol=1e-5)
    middle = np.int32(WARMUP + (TOTAL - WARMUP) // 2)
    np.testing.assert_allclose([rates[k](middle) for k in ("linear", "cosine")], (PEAK + END) / 2, rtol=1e-6)
    before, after = (float(rates["two_stage"](np.int32(step))) for step in (54, 55))
    assert before > 1.5 * after, "the rate drops at half of the run"


def test_warmup_as_a_share_of_the_run():
    same, share = build("cosine"), build("cosine", warmup_steps=0, warmup_share=WARMUP / TOTAL)
    assert [same(np.int32(s)) for s in range(0, TOTAL, 7)] == [share(np.int32(s)) for s in range(0, TOTAL, 7)]
    assert float(build("linear", warmup_steps=0)(np.int32(0))) == pytest.approx(PEAK)


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match=r"optimizer.schedule = 'cosin': expected one of constant, linear, cosine"):
        build("cosin")
    with pytest.raises(UserError, match=r"optimizer.warmup_steps = 111: longer than the run of 110 steps"):
        build("linear", warmup_steps=TOTAL + 1)


def test_weight_decay_ends_where_the_second_line_starts():
    config = {"schedule": "two_stage", "weight_decay": 0.1, "stage_weight_decay": 0.0, **SECOND}
    decay = weight_decay(config, TOTAL)
    assert [float(decay(np.int32(step))) for step in (0, 54, 55, 109)] == pytest.approx([0.1, 0.1, 0.0, 0.0])
    half = weight_decay({**config, "schedule": "two_stage_cosine"}, TOTAL)
    assert [float(half(np.int32(step))) for step in (0, 54, 55)] == pytest.approx([0.1, 0.05143, 0.0], abs=1e-5)
    assert weight_decay({**config, "schedule": "cosine"}, TOTAL) == 0.1, "one stage only"
    assert weight_decay({**config, "stage_weight_decay": 0.1}, TOTAL) == 0.1
