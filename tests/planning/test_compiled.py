"""The real step compiled from a config: its memory by part, against arithmetic."""

import jax
import pytest

from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.planning.compiled import compile_step
from easylm_plus.planning.products import products
from easylm_plus.planning.wire import wire_bytes

D, F, L, V, T = 32, 64, 2, 96, 16  # embed, ffn, layers, vocabulary, length
MATRICES = L * (4 * D * D + 3 * D * F)
NORMS = (2 * L + 1) * D
VOCABULARY = 2 * V * D
N = 8  # devices


def compiled(level="none", parts=2, zero="none", ema=0.0, sums="float32", **mesh):
    config = base(
        "debug", vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=2, num_kv_heads=2,
        head_dim=16, max_length=T, attention="xla", remat="full", scan_layers=True,
    )  # fmt: skip
    config.data.length, config.data.batch_size = T, 8 * parts
    config.train.accumulate, config.train.ema = parts, ema
    config.numerics.precision = "float32"
    config.numerics.fp8_level, config.numerics.fp8_accumulate, config.optimizer.zero = level, sums, zero
    config.mesh.fsdp = 1
    config.mesh.update(mesh)
    return compile_step(config, jax.devices()[:N])


def test_float32_cut_over_fsdp():
    """Masters, two moments, a micro-batch's gradients and their sum, in float32: an eighth of each, norms whole."""
    memory = compiled(fsdp=N).memory()
    share = 4 * (MATRICES / N + NORMS)
    assert memory.weights == share
    assert memory.optimizer == 2 * share + 8  # and two counts
    assert memory.copies == 0
    assert memory.gradients == 2 * share
    assert memory.vocabulary == 5 * 4 * VOCABULARY / N
    parts = memory.weights + memory.optimizer + memory.copies + memory.gradients + memory.vocabulary + memory.rest
    assert parts == memory.peak > 0


def test_one_micro_batch_and_the_running_mean():
    memory = compiled(parts=1, ema=0.9, fsdp=N).memory()
    share = 4 * (MATRICES / N + NORMS)
    assert memory.gradients == share
    assert memory.optimizer == 3 * share + 8
    assert memory.vocabulary == 5 * 4 * VOCABULARY / N


def test_whole_on_each_replica():
    memory = compiled(replica=N).memory()
    whole = 4 * (MATRICES + NORMS)
    assert (memory.weights, memory.optimizer, memory.copies, memory.gradients) == (whole, 2 * whole + 8, 0, 2 * whole)


@pytest.fixture(scope="module")
def o3():
    """As the paper has it: state cut over replicas, weights and gradients whole on each."""
    return compiled("O3", zero="sharded", replica=N)


def test_o3_over_replicas(o3):
    memory = o3.memory()
    scales = 4 * L * 7  # one float32 a matrix and array of codes
    assert memory.weights == 2 * MATRICES / N + 4 * NORMS + scales
    assert memory.optimizer == 3 * MATRICES / N + 2 * 4 * NORMS + 2 * scales + 4
    assert memory.copies == MATRICES, "codes; norms are whole everywhere"
    assert memory.gradients == MATRICES + 4 * NORMS + 4 * (MATRICES + NORMS), "of a micro-batch, and their sum"
    assert memory.vocabulary == (1 + 2) * 4 * VOCABULARY / N + (1 + 1 + 1) * 4 * VOCABULARY


def test_sums_in_fp8():
    memory = compiled("O3", zero="sharded", sums="e4m3", replica=N).memory()
    assert memory.gradients == 2 * (MATRICES + 4 * NORMS), "of a micro-batch, and their sum, a byte a weight each"


def test_o3_takes_half_of_the_baseline_between_steps(o3):
    """5 bytes a matrix element against 12."""
    plain = compiled(zero="sharded", replica=N).memory()
    ours = o3.memory()
    assert (ours.weights + ours.optimizer) < 0.5 * (plain.weights + plain.optimizer)


def test_text_and_figures(o3):
    assert o3.memory().peak <= o3.memory().arguments + o3.memory().temporary
    assert "vocabulary" in str(o3.memory())
    table = wire_bytes(o3.hlo)
    assert table["all-gather", "u8"].payload == MATRICES, "one gather of weights a step"
    assert table["all-to-all", "u8"].payload == MATRICES, "and one exchange of gradients"
    tokens = 2 * T  # of a device, in two micro-batches
    assert sum(products(o3.hlo).values()) >= 4 * tokens * MATRICES  # forward twice, by remat


def test_a_mesh_that_does_not_fit():
    with pytest.raises(UserError, match="does not fit 8 devices"):
        compiled(fsdp=3)
