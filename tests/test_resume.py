"""A run that is killed, stopped or moved continues as if nothing had been: every number of the log, bit for bit."""

import contextlib
import random
import re
import shutil
import signal
import socket
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from data_pipelines.batches import replay
from easylm_plus.training.checkpoint import steps as checkpoint_steps
from easylm_plus.training.metrics import read_rows
from easylm_plus.training.preemption import Preemption
from easylm_plus.tree import path_name

STEPS = 40
RUN = {"train__steps": STEPS, "train__ema": 0.9, "checkpoint__every": 6, "log__params_hash": True, "eval__every": 15}
TIMES = ("tokens_per_second", "tflops", "input_wait", "memory_bytes")  # not a matter of what is computed


def rows(folder):
    """All rows of the log without the measured times; training rows and evaluation rows in their order."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "metrics.jsonl")]


def training(folder):
    return [row for row in rows(folder) if "loss" in row]


def whole(folder, devices=1, **values):
    """An uninterrupted run."""
    folder.mkdir(exist_ok=True)
    status, output = tiny.run(f"--config={tiny.write_config(folder, **{**RUN, **values})}", devices=devices)
    assert status == 0 and "Warning" not in output, output
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("a"))


# appended to a config file: however slow this machine, the signal finds the run at its step
WAIT = """

import pathlib
import time

from easylm_plus.training.meter import Meter


def waiting(push):
    def until_told(self, step, *rest):
        push(self, step, *rest)  # writes the row of the step before
        while step == {step} + 1 and not pathlib.Path({told!r}).exists():
            time.sleep(0.01)

    return until_told


Meter.push = waiting(Meter.push)
"""


def reached(folder, step):
    """Whether the log has come to a step."""
    return (seen := training(folder)) and seen[-1]["step"] >= step


def saving(folder):
    """Whether a checkpoint is being written."""
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("[0-9]*"))


def interrupt(folder, number, step, or_when=lambda folder: False, devices=1):
    """Starts the run, sends it a signal when its log has come to a step, or before; returns its exit status."""
    told = folder / "told"
    told.unlink(missing_ok=True)
    config = folder / "tiny_config.py"
    (folder / "waiting.py").write_text(config.read_text() + WAIT.format(step=step, told=str(told)))
    process = tiny.start(f"--config={folder / 'waiting.py'}", devices=devices)
    while process.poll() is None and not reached(folder, step) and not or_when(folder):
        time.sleep(0.003)
    process.send_signal(number)
    told.touch()
    output = tiny.output_of(process)
    assert "Traceback" not in output, output[-2000:]
    return process.returncode


def finish(folder, devices=1):
    status, output = tiny.run(f"--config={folder / 'tiny_config.py'}", devices=devices)
    assert status == 0 and "starts from step" in output, output
    return output


def killed_and_continued(folder, saved_before, *steps):
    """Kills the run while it writes a checkpoint, then at each of these steps, and lets it end."""
    tiny.write_config(folder, **RUN)
    assert interrupt(folder, signal.SIGKILL, saved_before, or_when=saving) == -signal.SIGKILL
    for step in steps:
        assert interrupt(folder, signal.SIGKILL, step) == -signal.SIGKILL
    finish(folder)


def test_a_killed_run_continues_exactly(uninterrupted, tmp_path):
    killed_and_continued(tmp_path, 11, random.Random(0).randint(14, 30))  # the first leaves no checkpoint, or one
    assert [row["step"] for row in training(tmp_path)] == list(range(1, STEPS + 1))
    assert {"loss", "examples", "params_hash", "grad_norm"} <= set(training(tmp_path)[-1])
    assert rows(tmp_path) == rows(uninterrupted)


@pytest.mark.slow
def test_a_killed_run_in_fp8_continues_exactly(tmp_path):
    """O3 with windows, weights cut over replicas: codes, factors and windows come back from the disk, bit for bit."""
    values = {
        "numerics__fp8_level": "O3", "numerics__fp8_window": 16, "optimizer__zero": "sharded", "mesh__replica": 2,
        "model__scan_layers": True, "train__steps": 8, "train__ema": 0.0, "eval__every": 8, "checkpoint__every": 2,
    }  # fmt: skip
    alone, killed = whole(tmp_path / "alone", devices=4, **values), tmp_path / "killed"
    killed.mkdir()
    tiny.write_config(killed, **{**RUN, **values})
    assert interrupt(killed, signal.SIGKILL, 5, devices=4) == -signal.SIGKILL
    assert re.search(r"starts from step [24] of", finish(killed, devices=4)), "of which the last may be half written"
    assert rows(killed) == rows(alone) and len({row["params_hash"] for row in training(killed)}) == 8
    last = [read(folder / "checkpoints/8/state") for folder in (killed, alone)]
    assert bits(last[0]) == bits(last[1])
    assert bits(last[0]) != bits(read(alone / "checkpoints/6/state")), "another state would be told apart"


def read(state):
    """All arrays of a checkpoint, on the host."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = reader.metadata(state).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return reader.restore(state, args=ocp.args.PyTreeRestore(restore_args=how))


def bits(tree):
    return {path_name(path): x.tobytes() for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_a_run_killed_five_times_continues_exactly(uninterrupted, tmp_path):
    killed_and_continued(tmp_path, 11, *sorted(random.Random(1).sample(range(12, 38), 4)))
    assert rows(tmp_path) == rows(uninterrupted)


def test_a_signal_ends_a_run_after_a_checkpoint(uninterrupted, tmp_path):
    tiny.write_config(tmp_path, **RUN)
    assert interrupt(tmp_path, signal.SIGTERM, 8) == 143
    assert training(tmp_path)[-1]["step"] == checkpoint_steps(tmp_path / "checkpoints")[-1] == 9
    assert "starts from step 9 of" in finish(tmp_path)
    assert rows(tmp_path) == rows(uninterrupted)


def test_an_evaluation_that_a_signal_put_off_is_made_up_for(tmp_path):
    config = tiny.write_config(tmp_path, train__steps=6, eval__every=4, mesh__fsdp=4, mesh__tensor=2)
    with mock.patch.object(Preemption, "requested", lambda self, step: step == 4):
        assert tiny.inside(f"--config={config}")[0] == 143
    assert tiny.inside(f"--config={config}")[0] == 0
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [0, 4, 6]


def test_the_comparison_sees_another_seed(uninterrupted, tmp_path):
    tiny.write_config(tmp_path, **{**RUN, "train__seed": 1})
    interrupt(tmp_path, signal.SIGKILL, 4)
    other = training(tmp_path)
    assert len(other) >= 4
    for key in ("loss", "examples", "params_hash"):
        assert all(a[key] != b[key] for a, b in zip(training(uninterrupted), other)), key


# --- on another number of processes and devices ---


@contextlib.contextmanager
def two_processes(folder, **values):
    """The run as two processes of one device each, that find one another at a free port."""
    with socket.socket() as held:
        # held until the end, so that nothing else gets the port; gRPC, which shares ports, may have it all the same
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("0.0.0.0", 0))
        config = tiny.write_config(folder, **{**RUN, **values})
        job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{held.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        both = [tiny.start(f"--config={config}", JAX_PROCESS_ID=str(i), **job) for i in range(2)]
        try:
            yield both
        finally:
            for process in both:
                process.kill()
                process.communicate()


def close_to(found, wanted):
    """Another number of devices sums in another order; the same examples in the same order otherwise."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in wanted], rtol=0, atol=1e-5)


def seen_again(folder, numbers):
    """Whether each of these steps, made again from the configuration, has the examples that the run logged."""
    run = replay.open_run(folder)
    section, data = replay.open_run_data(run)
    return [replay.agrees(replay.at_step(run, section, data, number, lambda *_: None)) for number in numbers]


CALM = {"optimizer__learning_rate": 1e-3, "optimizer__schedule": "constant", "train__steps": 12, "eval__every": 12}


def loopback():
    """Whether two processes of this machine can talk to each other."""
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.settimeout(5)
        return client.connect_ex(server.getsockname()) == 0


@pytest.mark.skipif(not loopback(), reason="no loopback interface")
def test_two_processes_and_then_one(tmp_path):
    """Twelve steps: six by two processes, six by one."""
    alone, shared = whole(tmp_path / "alone", **CALM), tmp_path / "both"
    shared.mkdir()
    with two_processes(shared, **CALM) as both:
        outputs = [tiny.output_of(process) for process in both]
        assert [p.returncode for p in both] == [0, 0], outputs[0][-2000:] + outputs[1][-2000:]
    assert "2 x cpu" in outputs[0]
    close_to(training(shared), training(alone))
    assert all(row["examples_rows"] == "0:4" for row in training(shared)), "the first process logs its own"
    assert seen_again(shared, range(1, 13)) == [True] * 12
    evaluations = [[r["eval/loss"] for r in rows(f) if "eval/loss" in r] for f in (shared, alone)]
    np.testing.assert_allclose(*evaluations, rtol=0, atol=1e-5)

    shutil.rmtree(shared / "checkpoints/12")
    finish(shared)
    close_to(training(shared), training(alone))
    assert ["examples_rows" in row for row in training(shared)] == [True] * 6 + [False] * 6
    assert seen_again(shared, (1, 6, 7, 12)) == [True] * 4
    examples = lambda folder: [row["examples"] for row in training(folder)]
    assert examples(shared)[6:] == examples(alone)[6:] and examples(shared)[:6] != examples(alone)[:6]


def test_a_job_leaves_signals_to_jax(monkeypatch):
    """A handler of our own would replace the one by which JAX tells the other processes."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with Preemption():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.slow
@pytest.mark.skipif(not loopback(), reason="no loopback interface")
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    endless = {**CALM, "train__steps": 100_000, "eval__every": 0, "checkpoint__every": 100_000, "log__every": 5}
    with two_processes(tmp_path, **endless) as both:
        while both[0].poll() is None and not reached(tmp_path, 5):
            time.sleep(0.05)
        both[1].send_signal(signal.SIGTERM)
        outputs = [tiny.output_of(process) for process in both]
        assert [p.returncode for p in both] == [143, 143], outputs[0][-2000:]
    stopped = checkpoint_steps(tmp_path / "checkpoints")
    assert len(stopped) == 1 and 0 <= stopped[0] - training(tmp_path)[-1]["step"] < 5
