"""Rows cover exactly the steps since the last row, also across a restart; too many skipped steps stop the run."""

import json

import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.training.meter import Meter
from easylm_plus.training.metrics import MetricsLog, read_rows


def result(step, ok=True, streak=0):
    """What a step returns: 10 + step tokens of source a, half as many of b, at a loss of `step` and 2 step."""
    tokens = np.array([10.0 + step, (10.0 + step) / 2], np.float32)
    nll = tokens * np.array([step, 2 * step], np.float32)
    return {"loss": np.float32(step if ok else np.nan), "ok": np.bool_(ok), "skipped": np.int32(not ok),
            "streak": np.int32(streak), "sums": {"nll": nll, "tokens": tokens}, "grad_norm": np.float32(0.5),
            "learning_rate": np.float32(1e-3)}  # fmt: skip


def meter(log, every=4, peak=0.0):
    return Meter(log, every, ["a", "b"], 100, 1e9, peak, max_streak=2)


def rows(folder, *parts, every=4):
    """Runs (steps to push) in parts, each with a new meter that takes over the state of the one before."""
    state, start = None, 0
    for part in parts:
        with MetricsLog(folder, start) as log:
            current = meter(log, every)
            if state:
                current.set_state(json.loads(json.dumps(state)))
            for step in part:
                current.push(step, result(step, ok=step != 6), {"examples": f"x{step}"})
            current.drain()
            state, start = current.get_state(), part[-1]
    timeless = ("tokens_per_second", "tflops", "input_wait", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in timeless} for row in read_rows(folder / "metrics.jsonl")]


def test_a_row_covers_its_steps(tmp_path):
    first, second, third = rows(tmp_path, range(1, 13))
    assert [r["step"] for r in (first, second, third)] == [4, 8, 12]
    counted = [5, 7, 8]  # step 6 was skipped
    tokens = np.array([10.0 + s for s in counted])
    assert second["loss"] == pytest.approx(np.mean(counted))
    assert second["loss/a"] == pytest.approx((tokens * counted).sum() / tokens.sum())
    assert second["loss/b"] == pytest.approx(2 * second["loss/a"])
    assert second["loss/a"] != pytest.approx(np.mean(counted), rel=1e-3), "weighted by tokens"
    assert second["loss_tokens"] == pytest.approx(1.5 * tokens.sum())
    assert second["examples"] == "x8" and second["grad_norm"] == 0.5


@pytest.mark.parametrize("at", [2, 5, 6, 7, 8])
def test_a_restart_between_rows_is_not_seen(tmp_path, at):
    whole = rows(tmp_path / "whole", range(1, 13))
    assert rows(tmp_path / "parts", range(1, at + 1), range(at + 1, 13)) == whole


def test_forgetting_the_sums_is_seen(tmp_path):
    whole = rows(tmp_path / "whole", range(1, 9))
    with MetricsLog(tmp_path, 6) as log:
        fresh = meter(log)
        for step in (7, 8):
            fresh.push(step, result(step), {})
        fresh.drain()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] != whole[1]["loss"]


def with_experts(step):
    """What a step of a model with experts returns."""
    return {**result(step), "sums": {**result(step)["sums"], "router": {"tokens": 4.0, "entropy": float(step)}}}


def later(log, saved):
    """A meter's state as it was saved, after two more steps of that meter, and of another that took it over."""
    first, second = meter(log), meter(log)
    first.push(1, with_experts(1), {})
    first.drain()
    state = saved(first)
    seen = [json.dumps(state)]
    second.set_state(state)
    for one in (first, second):
        for step in (2, 3):
            one.push(step, with_experts(step), {})
        one.drain()
        seen.append(json.dumps(state))
    return seen


def test_a_checkpoint_holds_the_sums_of_its_moment(tmp_path):
    """It is written in the background, while the steps after it are counted."""
    with MetricsLog(tmp_path, 0) as log:
        at_once, after_its_own, after_the_others = later(log, Meter.get_state)
        assert at_once == after_its_own == after_the_others and json.loads(at_once)["count"] == 1
        at_once, after_its_own, _ = later(log, lambda one: one._sums)
        assert at_once != after_its_own, "the sums themselves go on"


def test_numbers_are_read_one_step_late(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        late = meter(log, every=1)
        late.push(1, result(1), {})
        assert late.last == {}
        late.push(2, result(2), {})
        assert late.last["step"] == 1
        late.drain()
        assert late.last["step"] == 2


def test_an_interval_without_a_good_step_is_null(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        one = meter(log, every=1)
        one.push(1, result(1, ok=False), {})
        one.drain()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["loss"] is None and row["loss_tokens"] == 0 and "loss/a" not in row


def test_too_many_skipped_in_a_row_stop_the_run(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        one = meter(log, every=1)
        for streak in (1, 2):
            one.push(streak, result(streak, ok=False, streak=streak), {})
        one.drain()
        one.push(3, result(3, ok=False, streak=3), {})
        with pytest.raises(UserError, match=r"step 3: 3 steps in a row were skipped .* lower optimizer.learning_rate"):
            one.drain()
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3], "the log is on disk"


def test_mfu_needs_a_known_peak(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for peak in (0.0, 2.0):
            one = meter(log, every=1, peak=peak)
            one.push(1, result(1), {})
            one.drain()
            assert ("mfu" in one.last) == bool(peak)
        assert one.last["mfu"] == pytest.approx(one.last["tflops"] / 2.0)
