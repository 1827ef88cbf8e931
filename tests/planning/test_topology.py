"""Machines that are not here: their names, and the real step compiled for them where the compilers are installed.

The tests marked `aot` need, in an environment of their own (benchmarks/README.md),

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt    (of jaxlib's version)
    pip install libtpu                                         (of jax's choice: 'jax[tpu]')
"""

import importlib.util
import math
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from easylm_plus.config import base
from easylm_plus.errors import UserError
from easylm_plus.planning.compiled import DoesNotFit, compile_step
from easylm_plus.planning.products import products
from easylm_plus.planning.topology import GPUS, machine
from easylm_plus.planning.wire import collectives, float_collectives, widened_f8, wire_bytes

ROOT = Path(__file__).parents[2]
D, F, L, V, T = 128, 256, 4, 512, 64  # embed, ffn, layers, vocabulary, length
MATRICES = L * (4 * D * D + 3 * D * F)  # weights that FP8 concerns
ROWS, PARTS = 64, 4


def experiment(level, heads=4, **mesh):
    """A small model in bfloat16 at an FP8 level."""
    config = base(
        "debug", vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=heads, num_kv_heads=heads,
        head_dim=D // heads, max_length=T, attention="xla", remat="dots", scan_layers=True,
    )  # fmt: skip
    config.data.length, config.data.batch_size, config.train.accumulate = T, ROWS, PARTS
    config.numerics.fp8_level = level
    config.optimizer.zero = "sharded" if mesh.get("replica", 1) > 1 else "none"
    config.mesh.fsdp = 1
    config.mesh.update(mesh)
    return config


@pytest.mark.parametrize(
    "name", ["h100", "h100:8", "h100:1x8", "h100:0x1x8", "a100:1x1x8", "v5p-32", "v5p:4", "v9:2x2", ""]
)
def test_a_name_that_is_none(name):
    with pytest.raises(UserError, match=r"expected h100\|h200:DOMAINSxHOSTSxGPUS, as h100:1x4x8, or .*v5p:4x4x2"):
        machine(name)


@pytest.mark.parametrize(
    "name, platform, command",
    [
        ("h100:1x4x8", "GPU", "pip install --no-deps jax-cuda13-plugin=={jaxlib} jax-cuda13-pjrt=={jaxlib}"),
        ("v5p:2x2x2", "TPU", "pip install 'jax[tpu]=={jax}'"),
    ],
)
def test_a_compiler_that_is_not_installed(name, platform, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as raised:
        machine(name)
    command = command.format(jax=metadata.version("jax"), jaxlib=metadata.version("jaxlib"))
    assert str(raised.value) == f"machine {name!r}: the {platform} compiler is not installed; expected: {command}"


def test_targets_are_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["easylm_plus"]
    packaged = {path for pattern in patterns for path in (ROOT / "easylm_plus").glob(pattern)}
    assert {path.stem for path in packaged if path.suffix == ".txtpb"} == set(GPUS) == {"h100", "h200"}


# --- with the compilers ---


def of_blocks(hlo):
    """Float collectives as large as a device's part of the smallest matrix, but for those of embedding and head.

    XLA may send many small arrays as one of one dimension: all norms, biases and scales together are smaller than that.
    """
    return [found for found in float_collectives(hlo) if math.prod(found[1]) >= D * D / 8 and V not in found[1]]


@pytest.mark.aot("gpu")
@pytest.mark.parametrize("name, memory", [("h100:1x4x8", 80e9), ("h200:1x1x1", 141e9)])
def test_gpus(name, memory):
    found = machine(name)
    assert len(found.devices) == (32 if "4x8" in name else 1)
    assert (found.platform, found.devices[0].compute_capability) == ("gpu", "9.0")
    assert memory < found.memory < 1.1 * memory


@pytest.mark.aot("gpu")
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"replica": 8}], ids=str)
@pytest.mark.parametrize("level", ["none", "O3"])
def test_the_step_of_eight_gpus(level, mesh):
    found = machine("h100:1x1x8")
    step = compile_step(experiment(level, **mesh), found.devices, found.options)
    tokens = ROWS * T // 8
    per_format = products(step.hlo)
    eight = {key: count for key, count in per_format.items() if "f8" in key}
    head = 3 * tokens * D * V  # forward, and both of its gradients in the same pass
    if level == "none":
        assert eight == {} and per_format["bf16 x bf16"] >= 3 * tokens * MATRICES + head
        assert of_blocks(step.hlo), "weights travel in wide floats"
        return
    assert eight == {
        "f8e4m3fn x f8e4m3fn": tokens * MATRICES,
        "f8e5m2 x f8e4m3fn": tokens * MATRICES,
        "f8e4m3fn x f8e5m2": tokens * MATRICES,
    }, "every product of a block, and each once"
    assert step.hlo.count('"__cublas$lt$matmul$f8"') >= 3 * 5, "as calls of the library; q, k and v may be one"
    assert of_blocks(step.hlo) == []
    assert widened_f8(step.hlo) == []
    narrow = sum(t.payload for (_, dtype), t in wire_bytes(step.hlo).items() if dtype in ("u8", "f8e4m3fn"))
    rounds = PARTS if "fsdp" in mesh else 1  # over replicas once a step; over fsdp weights forwards and backwards
    assert narrow == rounds * (3 if "fsdp" in mesh else 2) * MATRICES


@pytest.mark.aot("gpu")
@pytest.mark.parametrize("pieces", [False, True])
def test_gradients_of_activations_are_summed_over_tensor_once_a_block(pieces):
    """Each product sums its own dx; the compiler adds up those of q, k and v, and of gate and up, before: two sums a
    layer. Forwards there are two more, or with sequence parallelism a reduce-scatter each."""
    found, config = machine("h100:1x1x2"), experiment("O3", tensor=2)
    config.model.remat, config.mesh.sequence_parallel = "none", pieces
    step = compile_step(config, found.devices, found.options)
    a_layer = [c for c in collectives(step.hlo) if c.trips == PARTS * L and c.payload >= ROWS // PARTS * T * D]
    kinds = sorted((c.kind, c.dtype) for c in a_layer)
    gathers = [("all-gather", "u8")] * 4  # of what is read forwards, and of the gradient of what was written backwards
    sums = [("all-reduce", "bf16")] * 2 + [("reduce-scatter", "bf16")] * 2
    assert kinds == (gathers + sums if pieces else [("all-reduce", "bf16")] * 4)


@pytest.mark.aot("gpu")
def test_whole_tensors_over_eight_gpus():
    """Weights and gradients travel once a step, a byte each, with the padding of the fullest rank."""
    found, config = machine("h100:1x1x8"), experiment("O3", replica=8)
    config.optimizer.zero = "whole_tensor"
    step = compile_step(config, found.devices, found.options)
    stacks = step.assembly.numerics.deal.stacks.values()
    elements = sum(stack.matrix.size * math.prod(stack.sides) for stack in stacks)  # sent slot by slot
    assert elements >= MATRICES and widened_f8(step.hlo) == [] and of_blocks(step.hlo) == []
    table = {key: t.payload for key, t in wire_bytes(step.hlo).items() if key[1] == "u8"}
    assert table == {("all-gather", "u8"): elements, ("all-to-all", "u8"): elements}


@pytest.mark.aot("gpu")
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_an_activation_stays_out_of_fp8_products(activation):
    """XLA fuses a GELU that is written with tanh into the product before it, and cannot emit that in FP8."""
    found, config = machine("h100:1x1x1"), experiment("O3")
    config.model.update(activation=activation, gated=False, remat="full")
    assert '"__cublas$lt$matmul$f8"' in compile_step(config, found.devices, found.options).hlo


@pytest.mark.aot("tpu")
@pytest.mark.parametrize("level", ["none", "O3"])
def test_the_step_of_a_tpu(level):
    found = machine("v5p:2x2x1")
    step = compile_step(experiment(level, fsdp=4), found.devices, found.options)
    assert {c.ranks for c in collectives(step.hlo)} == {4}, "counted, so the length of every loop is known"
    assert widened_f8(step.hlo) == []
    if level == "O3":
        assert ("all-to-all", "u8") in wire_bytes(step.hlo)


@pytest.mark.aot("tpu")
def test_what_does_not_fit_a_tpu():
    found = machine("v5e:2x2")
    config = experiment("none", fsdp=4)
    config.model.update(
        hidden_size=8192, intermediate_size=32768, num_layers=64, num_heads=64, num_kv_heads=64, head_dim=128
    )
    with pytest.raises(DoesNotFit, match="RESOURCE_EXHAUSTED"):
        compile_step(config, found.devices, found.options)


@pytest.mark.aot("tpu")
def test_a_topology_that_libtpu_does_not_know():
    with pytest.raises(UserError, match="v5p:3x5x7': libtpu knows no such topology"):
        machine("v5p:3x5x7")
