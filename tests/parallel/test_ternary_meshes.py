"""Ternary training on meshes of eight fake devices: the numbers of one device, and codes instead of weights on the
wire."""

import functools

import numpy as np
import pytest
from tiny_fp8 import run_of, sqnr

from easylm_plus.numerics import levels, ternary_codes
from easylm_plus.numerics.rules import BITNET
from easylm_plus.numerics.ternary import ternary_codes as rounded
from easylm_plus.parallel.mesh import AXES
from easylm_plus.planning import wire

VOCAB, LAYERS = 96, 3
MATRICES = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))
ELEMENTS = LAYERS * sum(D * F for D, F in MATRICES)
ENDS = 2 * VOCAB * 32  # embedding and head
MESHES = {
    "fsdp": {"fsdp": 4},
    "three": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "copies, zero": {"replica": 2, "fsdp": 2, "tensor": 2, "zero": "sharded"},
    "dealt": {"replica": 4, "zero": "whole_tensor"},
}


def run_on(mesh, level="none", rules=BITNET, **more):
    options = {**MESHES.get(mesh, {}), **more}
    sizes = {axis: options.pop(axis) for axis in AXES if axis in options}
    return run_of(
        level, sizes, vocab_size=VOCAB, num_layers=LAYERS, chunk=128, scan_layers=True, rules=rules, **options
    )


@functools.cache
def first_step(mesh, **more):
    return run_on(mesh, **more).start().gradients()


@pytest.mark.parametrize("mesh", ("fsdp", "three", "copies, zero"))
def test_the_first_step_is_that_of_one_device(mesh):
    """Codes are those of whole matrices and whole tokens. An activation between two of its 255 values may go the other
    way where sums have another order: 40 dB are left."""
    loss, gradients, _ = first_step(mesh)
    one_loss, one, _ = first_step("one")
    assert loss == pytest.approx(one_loss, abs=1e-4)
    for name, gradient in gradients.items():
        assert sqnr(gradient, one[name]) > 40, name


def test_scales_of_a_device_of_its_own_are_seen(monkeypatch):
    """Negative control: gamma as it would be of the first quarter of a matrix's in-features."""
    of_a_part = lambda w: (rounded(w)[0], rounded(w[..., : w.shape[-2] // 4, :])[1])
    monkeypatch.setattr(levels, "ternary_codes", of_a_part)
    _, gradients, _ = run_on("fsdp").start().gradients()
    assert min(sqnr(g, first_step("one")[1][name]) for name, g in gradients.items()) < 30


def gathered(text):
    """{dtype: bytes a step of the whole arrays that are brought together}."""
    return {dtype: t.payload for (kind, dtype), t in wire.wire_bytes(text).items() if kind == "all-gather"}


def test_codes_travel_instead_of_weights():
    """A quarter of a byte a weight, forwards and again backwards, an eighth of what bfloat16 has. Floats are float32
    here: XLA:CPU has no narrower ones on the wire."""
    bytes_ = gathered(run_on("fsdp").gradients_program.as_text())
    assert bytes_.pop("u8") == 2 * ELEMENTS / 4
    assert bytes_ == {"f32": 4 * ENDS}
    plain = gathered(run_on("fsdp", rules=()).gradients_program.as_text())
    assert plain == {"f32": 4 * (2 * ELEMENTS + ENDS)}


def test_codes_are_cut_wherever_latents_are():
    """Also where a quarter of the side that `fsdp` cuts is not divided by it: 3200 in-features over 64 devices, say."""
    matrices = ((12, 32), (12, 16), (12, 16), (32, 12), (12, 64), (12, 64), (64, 12))
    bytes_ = gathered(run_on("fsdp", hidden_size=12).gradients_program.as_text())
    assert bytes_.pop("u8") == 2 * LAYERS * sum(D * F for D, F in matrices) / 4
    assert bytes_ == {"f32": 4 * 2 * VOCAB * 12}


def test_unpinned_codes_are_not_what_travels(monkeypatch):
    """Negative control: left to the partitioner, what the codes are made of is brought together."""
    monkeypatch.setattr(ternary_codes, "constrain", lambda x, *axes: x)
    bytes_ = gathered(run_on("fsdp").gradients_program.as_text())
    assert bytes_.get("u8", 0) != 2 * ELEMENTS / 4


def test_replicas_bring_codes_together_once_a_step():
    text = run_on("one", replica=4, zero="sharded", accumulate=4).gradients_program.as_text()
    assert gathered(text)["u8"] == ELEMENTS / 4
    assert {c.trips for c in wire.collectives(text) if c.dtype == "u8"} == {1}


@functools.cache
def six_steps(mesh):
    return run_on(mesh).start().steps(6)


@pytest.mark.parametrize("mesh", ("fsdp", "copies, zero"))
def test_steps_go_on_alike(mesh):
    """The first as on one device; later ones as near as codes leave them that sums in another order have turned."""
    one, losses = six_steps("one"), six_steps(mesh)
    learned = one[0] - one[3]  # the same batch
    assert learned > 0.3
    np.testing.assert_allclose(losses[0], one[0], atol=1e-4)
    np.testing.assert_allclose(losses, one, atol=0.02 * learned)


def test_dealt_out_masters_too():
    """Whole tensors, at FP8-LM's levels: the loss of one device."""
    loss, _, _ = run_on("dealt", level="O2").start().gradients()
    assert loss == pytest.approx(run_on("one", level="O2").start().gradients()[0], abs=1e-4)
