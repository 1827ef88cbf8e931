"""The log: each row once, whatever was interrupted; only JSON that any reader takes."""

import json

import pytest

from easylm_plus.training.metrics import MetricsLog, read_rows


def write(folder, start, rows):
    with MetricsLog(folder, start) as log:
        for step in rows:
            log.write(step, {"loss": float(step)})


def steps(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_a_resumed_run_writes_each_step_once(tmp_path):
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 4, range(5, 10))
    assert steps(tmp_path) == list(range(1, 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "loss": 9.0}) + "\n")
    assert steps(tmp_path) != list(range(1, 10)), "a repeated step would be seen"


@pytest.mark.parametrize("owes", [True, False])
def test_an_evaluation_that_is_still_owed_is_not_kept(tmp_path, owes):
    """A run that a signal stopped before an evaluation makes up for it at every start from that checkpoint."""
    write(tmp_path, 0, [1, 2])
    with MetricsLog(tmp_path, 2, owes) as log:
        log.write(2, {"eval/loss": 1.0})
    MetricsLog(tmp_path, 2, owes).close()
    assert steps(tmp_path) == ([1, 2] if owes else [1, 2, 2])


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
    """Rows of step 0 come before the first checkpoint, so that a run from step 0 writes them again."""
    write(tmp_path, 0, range(4))
    write(tmp_path, 0, range(2))
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    "rest", [b'{"step": 4, "lo', b'{"step": 4, "loss": 1.0', b"\x00\x00", '{"step": 4, "é'.encode()[:-1]]
)
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path, rest):
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(rest)
    assert steps(tmp_path) == [1, 2, 3]
    write(tmp_path, 2, range(3, 6))
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_what_is_not_finite_becomes_null(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": float("nan"), "norm": float("inf"), "skipped": 1, "examples": "a1", "ok": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    forbid = lambda name: pytest.fail(f"{name} is not JSON")
    row = json.loads(text, parse_constant=forbid)
    assert row == {"step": 1, "loss": None, "norm": None, "skipped": 1, "examples": "a1", "ok": 0.5}


def test_flushed_rows_are_on_disk(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 1.0})
        log.flush()
        assert steps(tmp_path) == [1]


def test_only_the_first_process_writes(tmp_path):
    with MetricsLog(tmp_path / "run", 0, enabled=False) as log:
        log.write(1, {"loss": 1.0})
        log.text(1, "config", "x")
        log.flush()
    assert not (tmp_path / "run").exists()
