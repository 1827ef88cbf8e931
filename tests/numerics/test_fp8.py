"""The FP8 product by itself: the released code's numbers, what is compiled for accelerators, what it tells."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_fp8 import codes, forward_and_backward, leaf, run_of, sqnr

from easylm_plus.numerics import fp8, handles
from easylm_plus.numerics.formats import E4M3, E5M2, FP16, decode, encode
from easylm_plus.numerics.verbs import project
from easylm_plus.numerics.windows import new_window
from easylm_plus.parallel import sharding

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8" / "g_linear.npz")
EAGER = pytest.mark.parametrize("jit", (lambda f: f, jax.jit), ids=("eager", "jit"))
ACCELERATORS = pytest.mark.parametrize("platform", ("cuda", "rocm", "tpu"))


def golden_weight():
    """In our layout [in, out]. The released code's weight comes from a master in FP16: rounded twice."""
    return encode(decode(encode(jnp.asarray(GOLDEN["w"].T), FP16)), E4M3)


def golden_product(jit=jax.jit, dtype=jnp.float32):
    """(y, dx, dw as stored, transposed to the golden layout, the handle's cotangent)."""
    x, dy = (jnp.asarray(GOLDEN[name], dtype) for name in ("x", "dy"))
    y, dx, handle = forward_and_backward(leaf(golden_weight()), x, dy, jit)
    return y, dx, decode(handles.gradient_of(handle)).T, handle


# --- the numbers ---


@EAGER
def test_products_are_those_of_the_released_codes(jit):
    """y and dx are products of the golden codes, to the precision of float32; the stored dw has the golden codes."""
    weight = golden_weight()
    np.testing.assert_array_equal(codes(weight.code), GOLDEN["w_codes"].T)
    y, dx, _, handle = golden_product(jit)
    assert sqnr(y, GOLDEN["y"]) > 120 and sqnr(dx, GOLDEN["dx"]) > 120  # sums of 48 and 64 terms, each exact to 2^-24
    np.testing.assert_array_equal(codes(handle.code), GOLDEN["dw_e4m3_codes"].T)
    assert handle.scale_inv == GOLDEN["dw_scale_inv"]


def test_a_weight_that_was_rounded_once_has_other_codes():
    assert (codes(encode(jnp.asarray(GOLDEN["w"].T), E4M3).code) != GOLDEN["w_codes"].T).any()


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_products_are_as_exact_as_their_formats_allow(dtype):
    """y 29.6, dx 24.8, dw 25.0 dB; dw as it is stored, in E4M3, 23.9."""
    y, dx, stored, _ = golden_product(dtype=dtype)
    assert y.dtype == dx.dtype == dtype
    assert sqnr(y, GOLDEN["y_hp"]) >= 27
    assert sqnr(dx, GOLDEN["dx_hp"]) >= 23
    assert sqnr(stored, GOLDEN["dw_hp"]) == pytest.approx(23.88, abs=0.1)
    x, dy = encode(jnp.asarray(GOLDEN["x"], dtype), E4M3), encode(jnp.asarray(GOLDEN["dy"], dtype), E5M2)
    dw = fp8._dot(x.code, dy.code, (0, 0), jnp.float32, fp8.FULL) * (x.scale_inv * dy.scale_inv)
    assert sqnr(dw.T, GOLDEN["dw_hp"]) >= 23
    assert sqnr(dw.T, GOLDEN["dw_hp"]) == pytest.approx(24.96, abs=0.1)


def test_activations_in_e5m2_are_seen(monkeypatch):
    """2 bits of mantissa instead of 3."""
    narrowed = fp8.narrowed
    monkeypatch.setattr(fp8, "narrowed", lambda x, fmt, window: narrowed(x, E5M2, window))
    assert sqnr(golden_product()[0], GOLDEN["y_hp"]) < 27


def test_leading_axes_make_no_difference():
    x, dy = (jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    flat = forward_and_backward(leaf(golden_weight()), x, dy)
    batched = forward_and_backward(leaf(golden_weight()), x.reshape(4, 8, -1), dy.reshape(4, 8, -1))
    for one, other in zip(jax.tree.leaves(flat), jax.tree.leaves(batched), strict=True):
        np.testing.assert_array_equal(codes(one).ravel(), codes(other).ravel())


def test_a_weight_that_travels_wide_has_the_same_codes():
    """O1 and O2 send the float32 or FP16 master with its factor to E4M3, O3 the codes."""
    x, dy = (jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    master, weight = encode(jnp.asarray(GOLDEN["w"].T), FP16), golden_weight()
    factor = 1 / weight.scale_inv
    in_fp16 = leaf(weight, weight=master.code, scale=factor * master.scale_inv)
    in_float32 = leaf(weight, weight=decode(master), scale=factor)
    expected = forward_and_backward(leaf(weight), x, dy)
    for wide in (in_fp16, in_float32):
        jax.tree.map(np.testing.assert_array_equal, forward_and_backward(wide, x, dy), expected)


# --- what is compiled ---


def products(text):
    """(operands, result, precision) of the products in a lowered program."""
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            *operands, result = re.findall(r"tensor<(?:\d+x)*(\w+)>", line)
            yield tuple(operands), result, {word for word in ("DEFAULT", "HIGHEST") if word in line}


def lowered(platform, dtype=jnp.bfloat16):
    w, (x, dy) = leaf(golden_weight()), (jnp.asarray(GOLDEN[name], dtype) for name in ("x", "dy"))
    run = lambda handle, x, dy: forward_and_backward(dataclasses.replace(w, handle=handle), x, dy, lambda f: f)
    return jax.jit(run).trace(handles.handle_of(w), x, dy).lower(lowering_platforms=(platform,)).as_text()


@ACCELERATORS
def test_accelerators_multiply_codes(platform):
    """Forwards E4M3, fast; backwards E5M2 of the output's gradient, with sums in full; the weight's in float32."""
    assert list(products(lowered(platform))) == [
        (("f8E4M3FN", "f8E4M3FN"), "bf16", {"DEFAULT"}),
        (("f8E5M2", "f8E4M3FN"), "bf16", {"HIGHEST"}),
        (("f8E4M3FN", "f8E5M2"), "f32", {"HIGHEST"}),
    ]


def test_a_cpu_multiplies_what_they_stand_for():
    """In bfloat16, which holds every code of both formats."""
    assert [operands for operands, *_ in products(lowered("cpu"))] == [("bf16", "bf16")] * 3
    every = np.arange(256, dtype=np.uint8)
    for fmt in (E4M3, E5M2):
        value = jnp.asarray(every).view(fmt.dtype)
        np.testing.assert_array_equal(value.astype(jnp.bfloat16).astype(jnp.float32), value.astype(jnp.float32))


def test_both_ways_give_the_same_numbers():
    a, b = (jax.random.normal(key, (32, 64)).astype(jnp.float8_e4m3fn) for key in jax.random.split(jax.random.key(0)))
    widened = fp8._dot(a, b, (1, 1), jnp.float32, fp8.FULL)
    of_codes = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    assert sqnr(widened, of_codes) > 120


@pytest.mark.parametrize(("level", "each"), (("O1", 7), ("O2", 7), ("O3", 7), ("none", 0)))
@pytest.mark.parametrize("platform", ("cuda", "tpu"))
def test_the_whole_model_multiplies_codes(platform, level, each):
    """Seven products a layer, each three times."""
    run = run_of(level, precision="bf16", scan_layers=True)
    with sharding.use(run.mesh, run.parts.rules):
        text = run.parts.step.trace(run.parts.state, run.batch()).lower(lowering_platforms=(platform,)).as_text()
    found = [operands for operands, *_ in products(text)]
    kinds = (("f8E4M3FN", "f8E4M3FN"), ("f8E5M2", "f8E4M3FN"), ("f8E4M3FN", "f8E5M2"))
    assert [found.count(kind) for kind in kinds] == [each] * 3
    assert sum("f8" in "".join(operands) for operands in found) == 3 * each


# --- under scans and with recomputation ---

WAYS = [("none", True), ("dots", True), ("full", True), ("none", False)]


@pytest.fixture(scope="module")
def gradient_codes():
    """{(remat, scanned): {name: gradient}} of one model."""
    ways = {way: run_of("O3", remat=way[0], scan_layers=way[1]) for way in WAYS}
    return {way: run.start().gradients()[1] for way, run in ways.items()}


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
def test_gradients_do_not_depend_on_how_layers_run(gradient_codes, way):
    first, other = gradient_codes[WAYS[0]], gradient_codes[way]
    assert sum(hasattr(g, "code") for g in first.values()) == 7
    for name, expected in first.items():
        if hasattr(expected, "code"):
            np.testing.assert_array_equal(codes(other[name].code), codes(expected.code))
            np.testing.assert_array_equal(other[name].scale_inv, expected.scale_inv)
        else:
            assert sqnr(other[name], expected) > 100


@pytest.mark.parametrize(
    ("remat", "kept"),
    (
        # the bytes of the codes of each product's input. q, k and v have the same, gate and up too: compiled for an
        # H100, one of them is kept
        ("none", {"u8[2,16,32,32]": 6, "u8[2,16,32,64]": 1}),
        # the outputs, in the compute dtype, but that of the last, which no gradient needs
        ("dots", {"bf16[2,512,32]": 2, "bf16[2,512,16]": 2, "bf16[2,512,64]": 2}),
        ("full", {}),
    ),
)
def test_what_is_kept_for_the_backward_pass(capsys, remat, kept):
    """Of a product's own: codes of one byte, or its output. (Of the rest of the block, see models.)"""
    run = run_of("O3", precision="bf16", remat=remat, scan_layers=True)
    with sharding.use(run.mesh, run.parts.rules):
        view = jax.eval_shape(run.parts.numerics.view, run.parts.state.params, {})
        loss = lambda handle, view, batch: run.parts.objective(
            handles.held(view, handle), batch, run.parts.objective.denominators(batch)
        )[0]
        jax.ad_checkpoint.print_saved_residuals(loss, jax.eval_shape(handles.handles, view), view, run.batch())
    layers = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " output of scan " in line]
    assert len(layers) > 0
    own = [kind for kind in layers if kind.startswith(("f8", "u8", "bf16[2,512"))]
    assert {kind: own.count(kind) for kind in own} == kept


# --- what it tells ---


def test_taps_tell_the_largest_value_and_what_was_lost():
    """A tensor of which some values are far below the largest: in E4M3 what is under 2^-10 / 448 of it is 0."""
    key = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(key[0], (32, 16))
    x = jax.random.normal(key[1], (64, 32)).at[:8].multiply(1e-6)
    dy = jax.random.normal(key[2], (64, 16)).at[:4].multiply(1e-12)
    _, _, handle = forward_and_backward(leaf(w), x, dy)
    dw = np.asarray(decode(handles.gradient_of(handle)))
    np.testing.assert_array_equal(handle.tap[:2, 0], [jnp.abs(x).max(), jnp.abs(dy).max()])
    np.testing.assert_allclose(handle.tap[2, 0], np.abs(dw).max(), rtol=2.0**-4)
    np.testing.assert_allclose(handle.tap[:, 2], [8 / 64, 4 / 64, (dw == 0).mean()], atol=2e-3)
    np.testing.assert_array_equal(handle.tap[:, 1], 0)  # nothing overflows a scale of its own


def delayed(scale, size=16):
    """A window that has seen enough steps, with this scale."""
    return new_window((), size).replace(scale=jnp.float32(scale), count=jnp.int32(size))


@pytest.mark.parametrize("clipped", (True, False))
def test_a_delayed_scale_that_is_too_large_saturates(monkeypatch, clipped):
    """And says what share; a cast without the clip would make NaN of it."""
    if not clipped:
        monkeypatch.setattr(fp8, "cast", lambda x, scale, fmt: (x.astype(jnp.float32) * scale).astype(fmt.dtype))
    x, dy = (jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    w = leaf(golden_weight(), input=delayed(64.0), output_grad=delayed(2.0**30))
    y, dx, handle = forward_and_backward(w, x, dy, lambda f: f)
    over = [(np.abs(x) * 64 > 448).mean(), (np.abs(dy) * 2.0**30 > 57344).mean()]
    assert min(over) > 0
    assert jnp.isfinite(y).all() == clipped
    assert jnp.isfinite(dx).all() == clipped
    np.testing.assert_allclose(handle.tap[:2, 1], over, rtol=1e-5)
    np.testing.assert_array_equal(handle.tap[:2, 0], [np.abs(x).max(), np.abs(dy).max()])
    if clipped:
        saturated = np.clip(x, -7, 7)
        assert sqnr(y, saturated @ decode(golden_weight())) > 27


def test_a_window_of_one_tensor_is_used_for_that_one():
    """The input's window for x, the output gradient's for dy: with powers of two that fit, products are the same."""
    x, dy = (jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    scales = {"input": 1 / GOLDEN["x_scale_inv"], "output_grad": 1 / GOLDEN["dy_scale_inv"]}
    windows = {name: delayed(scale) for name, scale in scales.items()}
    expected = forward_and_backward(leaf(golden_weight()), x, dy)
    jax.tree.map(np.testing.assert_array_equal, forward_and_backward(leaf(golden_weight(), **windows), x, dy), expected)
    swapped = {"input": windows["output_grad"], "output_grad": windows["input"]}
    assert sqnr(forward_and_backward(leaf(golden_weight(), **swapped), x, dy)[0], expected[0]) < 3


@pytest.mark.parametrize("value", (np.inf, -np.inf, np.nan))
@pytest.mark.parametrize("where", ("x", "dy"))
def test_one_number_that_is_none_spoils_the_product(value, where):
    """A cast would saturate infinity to 448, and the step would count."""
    arrays = {name: jnp.asarray(GOLDEN[name]) for name in ("x", "dy")}
    arrays[where] = arrays[where].at[3, 5].set(value)
    for windows in ({}, {"input": delayed(8.0), "output_grad": delayed(2.0**27)}):
        y, dx, handle = forward_and_backward(leaf(golden_weight(), **windows), **arrays)
        assert jnp.isnan(y).all() == (where == "x")
        assert jnp.isnan(dx).all() == (where == "dy")
        assert jnp.isnan(decode(handles.gradient_of(handle))).all()
        assert handle.tap[("x", "dy").index(where), 0] == jnp.inf and handle.tap[2, 0] == jnp.inf


def test_zeros_have_zeros_for_gradients():
    x, dy = jnp.zeros((32, 48)), jnp.asarray(GOLDEN["dy"])
    y, dx, handle = forward_and_backward(leaf(golden_weight()), x, dy)
    assert (y == 0).all() and jnp.isfinite(dx).all() and (decode(handles.gradient_of(handle)) == 0).all()
    _, dx, handle = forward_and_backward(leaf(golden_weight()), jnp.asarray(GOLDEN["x"]), 0 * dy)
    assert (dx == 0).all() and (decode(handles.gradient_of(handle)) == 0).all()


# --- what is learned ---


def test_a_weight_without_a_handle_is_not_learned():
    x, dy = (jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    w = leaf(golden_weight())
    y, backward = jax.vjp(lambda x: project(x, w), x)
    expected = forward_and_backward(w, x, dy)
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(backward(dy)[0], expected[1])


def in_two_places(w, x, dy):
    return (project(x, w) * dy).sum() + (project(2 * x, w) * dy).sum()


def in_a_loop(w, x, dy):
    return jax.lax.scan(lambda total, _: (total + (project(x, w) * dy).sum(), None), 0.0, None, length=3)[0]


def once(w, x, dy):
    return (project(x, w) * dy).sum()


@pytest.mark.parametrize("used", (once, in_two_places, in_a_loop), ids=lambda f: f.__name__)
@EAGER
def test_two_uses_of_one_weight_are_no_gradient(jit, used):
    """Cotangents add up, and sums of codes mean nothing: the gradient is NaN, and such a run stops at once."""
    x, dy = (1e-3 * jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    w = leaf(golden_weight())
    cotangent = jit(jax.grad(lambda handle: used(handles.hold(w, handle), x, dy)))(handles.handle_of(w))
    gradient = handles.gradient_of(cotangent)
    assert jnp.isnan(decode(gradient)).all() == (used is not once)
    assert cotangent.uses == {once: 1, in_two_places: 2, in_a_loop: 3}[used]


def test_the_codes_of_two_uses_do_not_add():
    """What the NaN is for: two gradients of which one is 2^20 times the other come out as neither."""
    x, dy = (jnp.asarray(GOLDEN[name]) for name in ("x", "dy"))
    w = leaf(golden_weight())
    gradient = lambda factor: forward_and_backward(w, x, factor * dy)[2]
    small, large = gradient(2.0**-20), gradient(0.25)
    summed = (small.code.astype(jnp.float32) + large.code.astype(jnp.float32)) * (small.scale_inv + large.scale_inv)
    right = decode(handles.gradient_of(small)) + decode(handles.gradient_of(large))
    assert sqnr(summed, right) < 1
