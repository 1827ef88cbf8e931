"""The kernels for GPUs and TPUs give the exact sums in the interpreter, and are accepted by the compilers.

The tests marked `aot` compile for machines that are not here (tests/planning/test_topology.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.kernels import choice, pallas
from easylm_plus.numerics.packed_ternary import KERNELS, PackedTernary, pack
from easylm_plus.numerics.verbs import project
from easylm_plus.planning.topology import machine

SHAPES = ((256, 64), (1, 1), (300, 5), (700, 130), (1536, 192))
WAYS = {
    "triton": pallas.triton,
    "mosaic": functools.partial(pallas.mosaic, bfloat16=False),
    "mosaic, bfloat16": functools.partial(pallas.mosaic, bfloat16=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(shape, way):
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, shape)
    for N in (1, 5, 16):
        x = rng.integers(-128, 128, (N, shape[0])).astype(np.int8)
        x[0] = -128  # the largest sums there are
        expected = x.astype(np.int64) @ codes
        found = WAYS[way](jnp.asarray(x), jnp.asarray(pack(codes)), interpret=True)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)
    wrong = WAYS[way](jnp.asarray(x[:, ::-1]), jnp.asarray(pack(codes)), interpret=True)
    assert shape == (1, 1) or (np.asarray(wrong) != expected).any()


def test_many_rows_of_weights_at_a_time(monkeypatch):
    """More than one block of out-features, the last not full."""
    monkeypatch.setattr(pallas, "TPU_BYTES", 128 * 64)
    test_sums_are_exact((256, 300), "mosaic")


@pytest.mark.parametrize("way", ("triton", "mosaic"))
def test_a_layer_goes_there_by_name(way, monkeypatch):
    """project with few tokens calls the kernel, with many it does not."""
    rng = np.random.default_rng(1)
    w = PackedTernary(jnp.asarray(pack(rng.integers(-1, 2, (300, 20)))), jnp.float32(0.3), 300)
    x = jnp.asarray(rng.normal(size=(17, 300)), jnp.float32)
    calls = []

    def kernel(x, codes):
        calls.append(x.shape)
        return WAYS[way](x, codes, interpret=True)

    monkeypatch.setitem(KERNELS, way, kernel)
    monkeypatch.setattr(choice, "path", lambda: way)
    few, many = jax.jit(lambda x: project(x, w))(x[:3]), jax.jit(lambda x: project(x, w))(x)
    assert calls == [(3, 300)]
    np.testing.assert_array_equal(few, many[:3])


# --- with the compilers ---


def compiled(way, device, N, shape):
    """The program that a device of this kind would run."""
    put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
    P = -(-shape[0] // 256) * 256
    # Triton asks the mesh in context what it compiles for
    mesh = jax.sharding.Mesh(np.asarray([device]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(WAYS[way]).lower(put((N, shape[0]), jnp.int8), put((shape[1], P // 4), jnp.uint8)).compile()


@pytest.mark.aot("tpu")
@pytest.mark.parametrize("name, way", (("v5e:2x2", "mosaic"), ("v6e:2x2", "mosaic"), ("v4:2x2x1", "mosaic, bfloat16")))
def test_a_tpu_takes_it(name, way):
    for shape in ((1536, 4096), (4096, 1536), (5460, 2048)):
        assert "tpu_custom_call" in compiled(way, machine(name).devices[0], 1, shape).as_text()


@pytest.mark.aot("tpu")
def test_why_there_is_a_way_in_bfloat16():
    with pytest.raises(Exception, match=r"(?i)i8|int8"):
        compiled("mosaic", machine("v4:2x2x1").devices[0], 1, (1536, 4096))


@pytest.mark.aot("gpu")
def test_a_gpu_takes_it():
    for shape in ((1536, 4096), (4096, 1536)):
        assert "triton" in compiled("triton", machine("h100:1x1x1").devices[0], 1, shape).as_text()
