"""What a step has seen of its FP8 and ternary matrices, in a run's log: each in TensorBoard, in short in the rows."""

import jax
import numpy as np
import pytest
from tiny_fp8 import by_name, run_of

from easylm_plus.numerics.fp8 import SEEN, TENSORS
from easylm_plus.numerics.ternary import ternary_codes
from easylm_plus.parallel import sharding
from easylm_plus.training import numerics_log

UP, DOWN = "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"


def report(mu=()):
    """Two matrices of two layers; every figure of every tensor is another one."""
    figures = np.arange(36, dtype=np.float32).reshape(2, 2, 3, 3)
    scale = 100 + np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    return {"seen": dict(zip((UP, DOWN), figures)), "scale": dict(zip((UP, DOWN), scale)), "mu": dict(mu)}


def test_each_figure_is_found_under_its_name():
    values = numerics_log.each(report({UP: np.array([0.5, 0.25])}))
    assert len(values) == 2 * 2 * 3 * (3 + 1) + 2
    assert values["fp8/amax/input/00/mlp/up_proj"] == 0
    assert values["fp8/underflow/output_grad/01/mlp/up_proj"] == 9 + 5
    assert values["fp8/overflow/gradient/01/mlp/down_proj"] == 18 + 9 + 7
    assert values["fp8/scale/input/01/mlp/down_proj"] == 100 + 6 + 3
    assert values["fp8/mu/01/mlp/up_proj"] == 0.25 and "fp8/mu/01/mlp/down_proj" not in values


def test_layers_of_their_own_have_the_same_names():
    """Of a model that is not scanned."""
    stacked = report()
    alone = {
        part: {name.replace("layers/", f"layers/{i}/"): x[i] for name, x in stacked[part].items() for i in (0, 1)}
        for part in ("seen", "scale")
    }
    assert numerics_log.each({**alone, "mu": {}}) == numerics_log.each(stacked)


def test_experts_of_layers_of_their_own():
    taps, scale = np.zeros((2, 4, 3, 3)), np.ones((2, 4, 3))
    stacked = {
        "seen": {"layers/mlp/experts/up_proj/kernel": taps},
        "scale": {"layers/mlp/experts/up_proj/kernel": scale},
    }
    names = [f"layers/{i}/mlp/experts/up_proj/kernel" for i in (0, 1)]
    alone = {"seen": dict(zip(names, taps)), "scale": dict(zip(names, scale))}
    assert numerics_log.each({**alone, "mu": {}}) == numerics_log.each({**stacked, "mu": {}})
    assert "fp8/amax/input/01/3/mlp/experts/up_proj" in numerics_log.each({**alone, "mu": {}})


def test_what_is_not_measured_is_left_out():
    """Of a matrix that does not multiply in FP8, all but its gradient."""
    told = report()
    told["seen"][UP][:, :2] = np.nan
    values = numerics_log.each(told)
    assert [name for name in values if "up_proj" in name and "gradient/" not in name] == []
    assert "fp8/underflow/gradient/01/mlp/up_proj" in values and "fp8/amax/input/01/mlp/down_proj" in values
    assert numerics_log.worst(told) == numerics_log.worst(report()), "down_proj has the worst anyway"
    told["seen"][DOWN][:, :2] = np.nan
    assert sorted(numerics_log.worst(told)) == ["fp8/overflow/gradient", "fp8/underflow/gradient"]


def test_narrow_matrices_report_their_gradients():
    run = run_of("O2", {}, scan_layers=True, rules=("up_proj=narrow",)).start()
    with sharding.use(run.mesh, run.parts.rules):
        _, metrics = run.parts.step(run.state, run.batch())
    values = numerics_log.each(jax.device_get(metrics["numerics"]))
    own = {name.removesuffix("/01/mlp/up_proj"): value for name, value in values.items() if "01/mlp/up" in name}
    assert sorted(own) == [f"fp8/{what}/gradient" for what in ("amax", "overflow", "scale", "underflow")]
    assert own["fp8/amax/gradient"] > 0 and 224 < own["fp8/amax/gradient"] * own["fp8/scale/gradient"] <= 448
    assert 0 <= own["fp8/underflow/gradient"] < 0.5 and own["fp8/overflow/gradient"] == 0


def test_the_row_has_the_worst_of_all():
    row = numerics_log.worst(report({UP: np.array([0.5, 0.25]), DOWN: np.array([1.0, 0.125])}))
    assert row["fp8/underflow/gradient"] == 35 and row["fp8/overflow/input"] == 28
    assert row["fp8/mu"] == 0.125
    assert len(row) == 2 * len(TENSORS) + 1
    without = numerics_log.worst(report())
    assert "fp8/mu" not in without and without["fp8/overflow/input"] == 28
    assert numerics_log.worst({}) == {} == numerics_log.each({})


RING = pytest.param("ring", {"fsdp": 2}, marks=pytest.mark.slow)


@pytest.mark.parametrize("reduction, sizes", (("two_shot", {}), RING))
def test_a_step_reports_what_it_saw(reduction, sizes):
    """The largest value of a tensor times its scale is below the format's largest, and above half of it."""
    run = run_of("O2", sizes, scan_layers=True, reduction=reduction).start()
    with sharding.use(run.mesh, run.parts.rules):
        _, metrics = run.parts.step(run.state, run.batch())
    told = jax.device_get(metrics["numerics"])
    values = numerics_log.each(told)
    assert ("fp8/mu" in numerics_log.worst(told)) == (reduction == "ring")
    largest = {"input": 448, "output_grad": 57344, "gradient": 448}
    for name in [name for name in values if name.startswith("fp8/amax/")]:
        tensor = name.split("/")[2]
        code = values[name] * values[name.replace("/amax/", "/scale/")]
        mu = values.get(name.replace("amax/gradient", "mu"), 1.0) if tensor == "gradient" else 1.0
        assert largest[tensor] * mu / 2 < code <= largest[tensor] * mu, name
    assert len(values) == 7 * 2 * len(TENSORS) * (len(SEEN) + 1) + (14 if reduction == "ring" else 0)
    assert all(0 <= share < 0.5 for name, share in values.items() if "flow/" in name)


# --- ternary ---


def test_ternary_shares_by_matrix_and_in_the_mean():
    shares = {UP: (np.array([[0.1, 0.3], [0.2, 0.4]]), 100), DOWN: (np.array([[0.5, 0.0], [0.5, 0.0]]), 300)}
    values = numerics_log.each({"ternary": shares})
    assert values["ternary/flips/01/mlp/up_proj"] == 0.2 and values["ternary/zeros/00/mlp/up_proj"] == 0.3
    assert len(values) == 8
    row = numerics_log.in_short({"ternary": shares})
    assert row == pytest.approx({"ternary/flips": 0.25 * 0.15 + 0.75 * 0.5, "ternary/zeros": 0.25 * 0.35})
    assert numerics_log.ternary_mean({}) == numerics_log.ternary_mean(report()) == {}


def test_matrices_of_more_weights_than_int32_counts():
    """LLaMA 13B's feed-forward stacks; sizes come from the device as int32."""
    size = np.asarray(5120 * 13824, np.int32)
    shares = {UP: (np.full((40, 2), 0.5), size), DOWN: (np.full((40, 2), 0.1), np.asarray(5120 * 5120, np.int32))}
    assert numerics_log.ternary_mean({"ternary": shares})["ternary/flips"] == pytest.approx((27 * 0.5 + 10 * 0.1) / 37)


@pytest.mark.parametrize("options", ({}, {"warmup": 10}, {"scan_layers": False}), ids=str)
def test_a_step_reports_what_it_turned(options):
    """Those of the codes before and after it, as they come out of the parameters."""
    run = run_of("none", rules=("mlp/.*_proj=ternary",), rate=3e-2, **options).start()
    before = by_name(jax.device_get(run.state.params))
    with sharding.use(run.mesh, run.parts.rules):
        run.state, metrics = run.parts.step(run.state, run.batch())
    after = by_name(jax.device_get(run.state.params))
    values = numerics_log.each(jax.device_get(metrics["numerics"]))
    assert len(values) == 2 * 2 * 3
    codes = [ternary_codes(jax.numpy.asarray(tree[UP][1]))[0] for tree in (before, after)]
    assert values["ternary/flips/01/mlp/up_proj"] == pytest.approx(float((codes[0] != codes[1]).mean()), rel=1e-5)
    assert values["ternary/zeros/01/mlp/up_proj"] == pytest.approx(float((codes[1] == 0).mean()), rel=1e-5)
    assert 0 < values["ternary/flips/01/mlp/up_proj"] < 0.5
