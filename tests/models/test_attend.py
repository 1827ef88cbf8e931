"""Every implementation of attention computes the same softmax(QK'/sqrt(K))V over the keys a query may see.

The judge is a float64 derivation in plain loops, written from the definition: no later key, same document, inside
the window. The judge itself is shown to notice a wrong window, missing segments, a wrong grouping of heads and a
wrong scale. The TPU kernel runs in Pallas' interpreter.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.models import attend
from easylm_plus.models.families import preset
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

K = 8
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
LAYOUTS = {
    "plain": (False, 0),
    "window": (False, 3),
    "packed": (True, 0),
    "packed window": (True, 4),
    "both ways": (False, None),
    "packed both ways": (True, None),
}  # no window: later keys are seen too


def inputs(B, T, H, G, head_dim=K, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, heads, head_dim)).astype(np.float32) for heads in (H, G, G)]


def documents(B, T):
    """Two documents and padding in even rows; one document, shifted, in odd ones."""
    rows = [np.searchsorted([T // 3, T - T // 4], np.arange(T), side="right") + 1 for _ in range(B)]
    rows = [np.where(row == 3, 0, row) if b % 2 == 0 else np.minimum(row, 2) for b, row in enumerate(rows)]
    return np.asarray(rows, np.int32)


def derive(q, k, v, segments, window, *, grouping=lambda h, H, G: h // (H // G), scale=None):
    """Attention from its definition, in float64."""
    (B, T, H, K), G = q.shape, k.shape[2]
    y = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        g, first = grouping(h, H, G), max(0, t - window + 1) if window else 0
        last = T - 1 if window is None else t
        seen = [s for s in range(first, last + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = k[b, seen, g].astype(np.float64) @ q[b, t, h].astype(np.float64) * (scale or K**-0.5)
        weights = np.exp(scores - scores.max())
        y[b, t, h] = weights / weights.sum() @ v[b, seen, g].astype(np.float64)
    return y


def differentiate(q, k, v, segments, window, cotangent):
    """Gradients of (attention * cotangent).sum() in q, k and v from the softmax's derivative, in float64."""
    (B, T, H, K), R = q.shape, q.shape[2] // k.shape[2]
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for b, t, h in np.ndindex(B, T, H):
        g, first = h // R, max(0, t - window + 1) if window else 0
        last = T - 1 if window is None else t
        seen = [s for s in range(first, last + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = k[b, seen, g].astype(np.float64) @ q[b, t, h] * K**-0.5
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        dy = cotangent[b, t, h].astype(np.float64)
        d_weights = v[b, seen, g] @ dy
        d_scores = weights * (d_weights - weights @ d_weights) * K**-0.5
        dq[b, t, h] = d_scores @ k[b, seen, g]
        dk[b, seen, g] += np.outer(d_scores, q[b, t, h])
        dv[b, seen, g] += np.outer(weights, dy)
    return dq, dk, dv


def gradients(name, q, k, v, segments, window, cotangent):
    return jax.jit(jax.grad(lambda *args: (run(name, *args, segments, window) * cotangent).sum(), (0, 1, 2)))(q, k, v)


def check_gradients(actual, expected):
    for ours, theirs in zip(actual, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


def run(name, q, k, v, segments, window):
    if name == "splash":
        sight = attend.Sight(window is not None, window or 0)
        return jax.jit(lambda *args: attend._splash(*args, sight, interpret=True))(q, k, v, segments)
    config = preset("debug", attention=name, sliding_window=window or 0, causal=window is not None)
    return jax.jit(lambda *args: attend.attend(*args, config))(q, k, v, segments)


def check(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=2e-6)


def case(T, heads, layout, B=2, **more):
    packed, window = LAYOUTS[layout]
    return *inputs(B, T, *HEADS[heads], **more), documents(B, T) if packed else None, window


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocked_and_xla_equal_the_definition(heads, layout, monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    args = case(13, heads, layout)
    expected = derive(*args)
    check(run("blocked", *args), expected)
    check(run("xla", *args), expected)


@pytest.mark.parametrize("T", (1, 4, 5, 8))
def test_blocked_at_any_length(T, monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    args = case(T, "GQA", "packed window")
    check(run("blocked", *args), derive(*args))


def test_blocked_with_blocks_of_the_real_size():
    T = attend.BLOCK + 9
    args = *case(T, "MQA", "packed", B=1)[:4], 50
    check(run("blocked", *args), derive(*args))


@pytest.mark.parametrize("mesh", (None, {"fsdp": 4, "tensor": 2}), ids=("one device", "mesh"))
@pytest.mark.parametrize(
    ("heads", "layout"),
    (("MHA", "plain"), ("GQA", "packed"), ("GQA", "packed window"), ("MQA", "window"), ("GQA", "packed both ways")),
)
def test_gradients_of_blocked_equal_the_definition(heads, layout, mesh, monkeypatch):
    """Their backward pass is our own: on one device a row at a time, on a mesh all rows together."""
    monkeypatch.setattr(attend, "BLOCK", 4)
    args = case(10, heads, layout, B=4)
    cotangent = inputs(4, 10, 4, 4, seed=1)[0]
    with sharding.use(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        actual = gradients("blocked", *args, cotangent)
    check_gradients(actual, differentiate(*args, cotangent))


def test_gradients_of_xla_equal_the_definition():
    """So that the derivation is confirmed by another than ours; and it notices a window that is off by one."""
    args = case(10, "GQA", "packed window")
    cotangent = inputs(2, 10, 4, 4, seed=1)[0]
    actual = gradients("xla", *args, cotangent)
    check_gradients(actual, differentiate(*args, cotangent))
    for expected in (differentiate(*args[:4], args[4] + 1, cotangent), differentiate(*args, cotangent[:, ::-1])):
        with pytest.raises(AssertionError):
            check_gradients(actual, expected)


def test_gradients_in_bfloat16_are_near_the_definition(monkeypatch):
    monkeypatch.setattr(attend, "BLOCK", 4)
    args = case(10, "GQA", "packed")
    cotangent = inputs(2, 10, 4, 4, seed=1)[0]
    half = [jnp.asarray(x, jnp.bfloat16) for x in args[:3]]
    for actual, expected in zip(gradients("blocked", *half, *args[3:], cotangent), differentiate(*args, cotangent)):
        assert actual.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(actual, np.float32) - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("name", ("blocked", "xla"))
def test_a_row_of_padding_gives_numbers(name):
    q, k, v = inputs(1, 6, 2, 2)
    total = lambda q: run(name, q, k, v, np.zeros((1, 6), np.int32), 2).sum()
    value, gradient = jax.value_and_grad(total)(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bfloat16_is_near_and_not_equal():
    args = case(13, "GQA", "packed window")
    half = [jnp.asarray(x, jnp.bfloat16) for x in args[:3]]
    for name in ("blocked", "xla"):
        actual = run(name, *half, *args[3:])
        assert actual.dtype == jnp.bfloat16
        error = np.abs(np.asarray(actual, np.float32) - derive(*args)).max()
        assert 1e-4 < error < 4e-2


def test_no_later_token_has_any_influence():
    q, k, v, segments, window = case(13, "GQA", "packed window")
    later = [np.concatenate([x[:, :9], 1e3 * x[:, 9:]], axis=1) for x in (q, k, v)]
    for name in ("blocked", "xla"):
        before, after = run(name, q, k, v, segments, window), run(name, *later, segments, window)
        np.testing.assert_array_equal(before[:, :9], after[:, :9])
        assert np.abs(before[:, 9:] - after[:, 9:]).max() > 1


@pytest.mark.parametrize(
    ("layout", "wrong"),
    (
        ("window", {"window": 4}),
        ("window", {"window": 2}),
        ("packed", {"segments": None}),
        ("plain", {"grouping": lambda h, H, G: h % G}),
        ("plain", {"scale": 1 / K}),
    ),
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_the_derivation_notices_what_is_wrong(layout, wrong):
    q, k, v, segments, window = case(13, "GQA", layout)
    expected = derive(q, k, v, **{"segments": segments, "window": window, **wrong})
    with pytest.raises(AssertionError):
        check(run("blocked", q, k, v, segments, window), expected)


# --- the TPU kernel ---


@pytest.mark.parametrize(
    ("T", "heads", "packed", "window", "head_dim"),
    (
        (256, "GQA", True, 0, 64),
        (256, "MQA", True, 100, 16),
        (128, "MHA", False, 0, 128),
        (256, "GQA", True, None, 16),
        (200, "GQA", False, None, 16),
        (200, "GQA", True, 0, 16),  # the kernel itself takes multiples of 128 only
        (8, "GQA", False, 0, 16),  # parameters are initialised with a row of 8
    ),
)
def test_splash_equals_xla(T, heads, packed, window, head_dim):
    q, k, v = inputs(2, T, *HEADS[heads], head_dim)
    segments = documents(2, T) if packed else None
    expected = run("xla", q, k, v, segments, window)
    np.testing.assert_allclose(run("splash", q, k, v, segments, window), expected, rtol=0, atol=5e-6)


def test_splash_is_given_the_exact_window():
    q, k, v = inputs(1, 128, 2, 1, 16)
    wrong = run("xla", q, k, v, None, 51)
    assert np.abs(run("splash", q, k, v, None, 50) - wrong).max() > 1e-2


def test_gradients_of_splash_over_a_mesh():
    """Cut over batch and heads; within a loop and under remat, as the model calls it."""
    q, k, v = inputs(4, 128, 4, 2, 16)
    segments, cotangent = documents(4, 128), inputs(4, 128, 4, 2, 16, seed=1)[0]
    kernel = lambda q, k, v: attend._splash(q, k, v, jnp.asarray(segments), attend.Sight(), interpret=True)
    body = jax.checkpoint(lambda q, k, v: kernel(q, k, v))
    twice = lambda f: lambda q, k, v: (jax.lax.scan(lambda x, _: (f(x, k, v), None), q, None, 2)[0] * cotangent).sum()
    xla = lambda q, k, v: attend.masked(q, k, v, attend.visible_mask(128, jnp.asarray(segments), attend.Sight()))
    expected = jax.jit(jax.grad(twice(xla), argnums=(0, 1, 2)))(q, k, v)
    with sharding.use(make_mesh({"fsdp": 4, "tensor": 2})):
        actual = jax.jit(jax.grad(twice(body), argnums=(0, 1, 2)))(q, k, v)
    for ours, theirs in zip(actual, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", ((8, 2), (4, 2), (4, 1)), ids=str)
@pytest.mark.parametrize("name", ("splash", "blocked"))
def test_more_devices_than_key_heads(name, heads):
    """Query heads are cut over `tensor`, key heads stay whole: each device's queries still find their own."""
    q, k, v = inputs(2, 128, *heads, 16)
    with sharding.use(make_mesh({"fsdp": 2, "tensor": 4})):
        actual = run(name, q, k, v, None, 0)
    np.testing.assert_allclose(actual, run("xla", q, k, v, None, 0), rtol=0, atol=5e-6)


@pytest.mark.parametrize("heads", ((4, 2), (4, 1), (3, 3)), ids=str)
@pytest.mark.parametrize("layout", ("plain", "packed window"))
@pytest.mark.parametrize("mesh", ({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2}), ids=str)
def test_a_fused_kernel_finds_its_rows_and_heads(mesh, layout, heads):
    """What runs on each device's share is any function of whole rows; cuDNN's cannot run here, jax.nn's can."""
    q, k, v = inputs(4, 16, *heads)
    segments, window = documents(4, 16) if layout == "packed window" else None, LAYOUTS[layout][1]
    kernel = lambda *args: attend._whole(*args, attend.Sight(window=window))
    with sharding.use(make_mesh(mesh)):
        actual = jax.jit(lambda *args: attend._on_shards(kernel, *args))(q, k, v, segments)
    check(actual, run("xla", q, k, v, segments, window))


# --- choosing one ---


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "head_dim", "hopper", "chosen"),
    (
        ("auto", "cpu", "float32", 64, False, "blocked"),
        ("auto", "tpu", "bfloat16", 256, False, "splash"),
        ("auto", "gpu", "bfloat16", 128, False, "cudnn"),
        ("auto", "gpu", "bfloat16", 100, True, "xla"),
        ("auto", "gpu", "bfloat16", 256, False, "xla"),
        ("auto", "gpu", "bfloat16", 256, True, "cudnn"),
        ("auto", "gpu", "float32", 64, True, "xla"),
        ("xla", "tpu", "bfloat16", 64, False, "xla"),
        ("blocked", "gpu", "bfloat16", 64, False, "blocked"),
        ("cudnn", "gpu", "float16", 64, False, "cudnn"),
    ),
)
def test_resolve(name, platform, dtype, head_dim, hopper, chosen, monkeypatch):
    monkeypatch.setattr(attend, "_is_hopper", lambda: hopper)
    assert attend.resolve(name, platform, jnp.dtype(dtype), head_dim) == chosen


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "head_dim", "message"),
    (
        ("cudnn", "cpu", "bfloat16", 64, "'cudnn' needs a GPU, this is a CPU"),
        ("splash", "cpu", "bfloat16", 64, "'splash' needs a TPU, this is a CPU"),
        ("splash", "gpu", "bfloat16", 64, "'splash' needs a TPU, this is a GPU"),
        ("cudnn", "gpu", "float32", 64, "16 bit only"),
        ("cudnn", "gpu", "bfloat16", 100, "model.head_dim = 100; the kernel takes multiples of 8 up to 128"),
    ),
)
def test_what_cannot_be_had_is_an_error(name, platform, dtype, head_dim, message):
    with pytest.raises(UserError, match=message):
        attend.resolve(name, platform, jnp.dtype(dtype), head_dim)


def test_an_unknown_name_is_an_error_of_the_config():
    with pytest.raises(UserError, match=r"model\.attention = 'flash': expected one of auto, xla"):
        dataclasses.replace(preset("debug"), attention="flash")
