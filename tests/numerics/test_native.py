"""The CPU kernels give the sums of the plain integer product, and whole products bit by bit as XLA does; they are
compiled once, and where they cannot be that is said."""

import functools
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from easylm_plus.errors import UserError
from easylm_plus.numerics.kernels import choice, native
from easylm_plus.numerics.packed_ternary import PackedTernary, pack, packed
from easylm_plus.numerics.ternary import int8_codes
from easylm_plus.numerics.verbs import project

SHAPES = ((256, 64), (1, 1), (300, 5), (700, 130), (1536, 67))
needs_kernels = pytest.mark.skipif(isinstance(native.found(), native.Missing), reason=f"no kernels: {native.found()}")
pytestmark = needs_kernels


def levels():
    """Those that this processor can run."""
    kernels = native.found()
    return range(kernels.level + 1) if isinstance(kernels, native.Native) else ()


@functools.cache
def weight(D, F, seed=0):
    return packed(jnp.asarray(np.random.default_rng(seed).normal(size=(D, F)), jnp.float32))


def tokens(N, D, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(N).normal(size=(N, D)) * 2.0 ** np.arange(-1, N - 1)[:, None], dtype)


def by_xla(x, w):
    with choice.use("xla"):
        return jax.jit(lambda x, w: project(x, w))(x, w)  # a function of its own: JAX remembers what it has traced


def same_bits(a, b):
    bits = {4: np.uint32, 2: np.uint16}[a.dtype.itemsize]
    return a.dtype == b.dtype and np.array_equal(np.asarray(a).view(bits), np.asarray(b).view(bits))


@pytest.mark.parametrize("level", levels(), ids=lambda level: native.LEVELS[level])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(shape, level):
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, shape)
    run = jax.jit(functools.partial(native.integer_product, level=level))
    for N in range(1, 9):
        x = rng.integers(-128, 128, (N, shape[0])).astype(np.int8)
        x[0] = -128  # the largest sums there are
        expected = x.astype(np.int64) @ codes
        np.testing.assert_array_equal(run(x, pack(codes)), expected)
    assert (run(x, pack(-codes)) != expected).any()


@pytest.mark.parametrize("level", levels(), ids=lambda level: native.LEVELS[level])
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16), ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_products_are_those_of_xla_bit_by_bit(shape, dtype, level):
    w = weight(*shape)
    for N in (1, 3, 8):
        x = tokens(N, shape[0], dtype)
        found = jax.jit(functools.partial(native.ternary_product, level=level))(x, w.codes, w.scale)
        assert same_bits(found, by_xla(x, w))
    if shape[0] > 1:
        assert not same_bits(found, by_xla(x * jnp.asarray(1.01, dtype), w)), "another rounding of x would be seen"


def test_ties_go_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes = np.eye(8, dtype=np.int8)
    w = PackedTernary(pack(jnp.asarray(codes)), jnp.ones(()), 8)
    assert native.ternary_product(x, w.codes, w.scale).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    np.testing.assert_array_equal(int8_codes(x)[0], [[127, 0, 2, 2, 0, -2, -2, 126]])


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_what_is_not_finite_stays_so_in_its_token(bad):
    w, x = weight(300, 5), tokens(2, 300).at[1, 7].set(bad)
    found = np.asarray(native.ternary_product(x, w.codes, w.scale))
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()
    assert not np.isfinite(np.asarray(by_xla(x, w))[1]).any()


# --- where it runs ---


def is_native(function, *args):
    """Whether the program calls a kernel."""
    return "TernaryProduct" in jax.jit(lambda *args: function(*args)).lower(*args).as_text()


def test_up_to_eight_tokens_go_to_the_kernel():
    w = weight(300, 5)
    few, many = tokens(8, 300).reshape(2, 4, 300), jnp.ones((9, 300))
    assert is_native(project, few, w) and not is_native(project, many, w)
    assert same_bits(jax.jit(project)(few, w), by_xla(few, w))


def test_under_scan_vmap_and_gradients():
    stack = packed(jnp.asarray(np.random.default_rng(5).normal(size=(3, 40, 40)), jnp.float32))
    x = tokens(2, 40)
    step = lambda x, w: (project(x, w), project(x, w))
    one_by_one = functools.reduce(lambda x, i: project(x, stack[i]), range(3), x)
    last, _ = jax.jit(lambda x: jax.lax.scan(step, x, stack))(x)
    assert same_bits(last, one_by_one)
    several = tokens(6, 40).reshape(3, 2, 40)
    each = jnp.stack([project(several[i], stack[i]) for i in range(3)])
    assert same_bits(jax.jit(jax.vmap(project))(several, stack), each), "a matrix each"
    assert same_bits(jax.jit(jax.vmap(project, (None, 0)))(x, stack)[1], project(x, stack[1]))
    mapped = jax.vmap(project, (0, None))
    assert is_native(mapped, several, stack[0]) and not is_native(mapped, jnp.ones((5, 2, 40)), stack[0])
    assert same_bits(jax.jit(mapped)(several, stack[0]), by_xla(several, stack[0]))
    gradient = jax.jit(jax.grad(lambda x, w: project(x, w).sum()))
    with choice.use("xla"):
        plain = jax.jit(jax.grad(lambda x, w: project(x, w).sum()))(x, stack[0])
    np.testing.assert_array_equal(gradient(x, stack[0]), plain)


@pytest.mark.parametrize("check_vma", (True, False))
def test_on_eight_devices(check_vma):
    """Rows over the devices of `tensor`, each with its part of the codes."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x = weight(300, 64), tokens(2, 300)
    rows, all_ = PartitionSpec("tensor"), PartitionSpec()
    local = lambda x, codes, scale: project(x, PackedTernary(codes, scale, 300))
    specs = {"in_specs": (all_, rows, all_), "out_specs": PartitionSpec(None, "tensor")}
    run = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs))
    assert "TernaryProduct" in run.lower(x, w.codes, w.scale).as_text()
    assert same_bits(run(x, w.codes, w.scale), by_xla(x, w))


# --- what is chosen ---


def test_a_path_that_cannot_be_had(monkeypatch):
    for name, message in (("triton", "needs a GPU, this is a CPU"), ("mosaic", "needs a TPU, this is a CPU"),
                          ("fast", "expected one of auto, xla, ffi, triton, mosaic")):  # fmt: skip
        monkeypatch.setenv(choice.VARIABLE, name)
        with pytest.raises(UserError, match=message):
            project(tokens(1, 300), weight(300, 5))
    monkeypatch.setenv(choice.VARIABLE, "xla")
    assert choice.told() == "XLA" and not is_native(project, tokens(1, 300), weight(300, 5))
    monkeypatch.delenv(choice.VARIABLE)
    assert choice.told() == f"{native.LEVELS[native.found().level]} kernel"


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """As in a process that has not looked for kernels yet, with an empty cache."""
    monkeypatch.setenv("EASYLM_PLUS_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "found", functools.cache(native.found.__wrapped__))
    choice._is_native.cache_clear()
    yield tmp_path / "native"
    choice._is_native.cache_clear()


def test_a_machine_without_a_compiler(afresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert [choice.path(), choice.path(), choice.told()] == ["xla", "xla", "XLA"]
    assert (err := capsys.readouterr().err).count("no CPU kernels") == 1 and "/no/such/compiler" in err
    monkeypatch.setenv(choice.VARIABLE, "ffi")
    with pytest.raises(UserError, match=r"EASYLM_PLUS_TERNARY = 'ffi': the kernels cannot be compiled.*No such file"):
        project(tokens(1, 300), weight(300, 5))
    monkeypatch.setenv("CXX", "'open")
    assert "quotation" in native.found.__wrapped__().reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler: expected one of c++, g++, clang++" in native.found.__wrapped__().reason


def test_a_compiler_that_fails(afresh, monkeypatch, tmp_path, capsys):
    fake = tmp_path / "compiler"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cpu.cc:1: error: too old" >&2\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert choice.path() == "xla"
    assert "ended with 3: cpu.cc:1: error: too old" in capsys.readouterr().err
    assert list(afresh.iterdir()) == [], "nothing half done is left"


def test_it_is_compiled_once(afresh):
    path = native._compiled()
    assert path.parent == afresh and [*afresh.iterdir()] == [path]
    before = path.stat().st_mtime_ns
    assert native._compiled() == path and path.stat().st_mtime_ns == before


def test_the_source_is_packaged():
    patterns = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["easylm_plus"] for path in (tiny.ROOT / "easylm_plus").glob(pattern)}
    assert tiny.ROOT / "easylm_plus/numerics/kernels/cpu.cc" in packaged
