"""Both ways to multiply rows by the matrix of their group, against a loop over rows; a CPU runs one, GPUs the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.models.transformer import Transformer
from easylm_plus.numerics.grouped import (
    TILE,
    Groups,
    grouped_matmul,
    padded_rows,
    resolve_grouped,
    tile_of,
)  # fmt: skip
from easylm_plus.numerics.precision import POLICIES

M, D, F, TILE_ROWS = 28, 5, 6, 4
SIZES = {"some": [8, 0, 12, 4], "all in one": [0, 0, 24, 0], "none": [0, 0, 0, 0], "full": [8, 8, 8, 4]}


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((M, D), (4, D, F), (M, F))]


def by_row(sizes):
    """The group of each row, -1 after the last."""
    groups = np.repeat(np.arange(4), sizes)
    return np.pad(groups, (0, M - len(groups)), constant_values=-1)


def derived(x, w, dy, groups):
    """(y, dx, dw) in float64, a row at a time."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((M, F)), np.zeros((M, D)), np.zeros(w.shape)
    for row, group in enumerate(groups):
        if group >= 0:
            y[row], dx[row] = x[row] @ w[group], w[group] @ dy[row]
            dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


def computed(implementation, sizes, x, w, dy):
    groups = Groups(jnp.asarray(sizes, jnp.int32), TILE_ROWS, implementation)
    y, pull = jax.vjp(jax.jit(lambda x, w: grouped_matmul(x, w, groups)), x, w)
    return y, *pull(dy)


@pytest.mark.parametrize("implementation", ("ragged", "tiled"))
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_and_gradients(implementation, sizes):
    found = computed(implementation, sizes, *arrays())
    for ours, theirs in zip(found, derived(*arrays(), by_row(sizes)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ("ragged", "tiled"))
def test_a_row_of_another_group_is_noticed(implementation):
    wrong = by_row(SIZES["some"])
    wrong[7] = 2  # the last row of the first group
    for ours, theirs in zip(computed(implementation, SIZES["some"], *arrays()), derived(*arrays(), wrong), strict=True):
        assert np.abs(ours - theirs).max() > 0.1


def test_gradients_of_16_bit_weights_are_summed_in_float32():
    """4,096 ones in tiles; a running sum in bfloat16 would stop at 256 times a tile's rows at most."""
    x, w = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    groups = Groups(jnp.asarray([4096]), 1, "tiled")
    dw = jax.jit(jax.grad(lambda w: grouped_matmul(x, w, groups).astype(jnp.float32).sum()))(w)
    assert float(dw[0, 0, 0]) == 4096
    stuck = jax.lax.fori_loop(0, 4096, lambda _, total: total + jnp.bfloat16(1), jnp.bfloat16(0))
    assert float(stuck) == 256


@pytest.mark.parametrize("choices", (1, 2, 7, 96, 5000))
@pytest.mark.parametrize("groups", (1, 4, 32))
def test_there_is_room_however_choices_fall(choices, groups):
    tile = tile_of(choices, groups, "tiled")
    assert 1 <= tile <= TILE and tile & (tile - 1) == 0 and tile_of(choices, groups, "ragged") == 1
    rng, most = np.random.default_rng(0), 0
    for _ in range(50):
        counts = np.bincount(rng.integers(0, groups, choices), minlength=groups)
        most = max(most, (-(-counts // tile) * tile).sum())
    spread = np.bincount(np.arange(choices) % groups, minlength=groups)  # one more than a tile in as many as can be
    most = max(most, (-(-spread // tile) * tile).sum())
    assert most <= padded_rows(choices, groups, tile) < choices + groups * tile


def test_a_model_computes_the_same_either_way():
    model, params = tiny.model(num_experts=4)
    assert resolve_grouped("auto", "cpu") == "tiled" and resolve_grouped("auto", "gpu") == "ragged"
    ids = np.random.default_rng(0).integers(0, 50, (2, 12))
    run = lambda **keys: jax.jit(Transformer(dataclasses.replace(model.config, **keys)).apply)({"params": params}, ids)
    np.testing.assert_allclose(run(grouped="ragged"), run(grouped="tiled"), rtol=0, atol=1e-5)
    assert np.abs(run(norm_topk=False) - run()).max() > 1e-3


def test_routers_multiply_in_full_precision_under_bf16():
    """Where hardware has faster modes, as TPUs do; the other products may use them."""
    for router in ("softmax", "attention"):
        model, params = tiny.model(num_experts=4, router=router)
        model = model.clone(precision=POLICIES["bf16"])
        text = jax.jit(lambda p, m=model: m.apply({"params": p}, np.zeros((1, 8), np.int32))).lower(params).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        to_experts = [line for line in products if "x4xf32>" in line.rpartition("->")[2]]
        assert to_experts and all("[HIGHEST, HIGHEST]" in line for line in to_experts)
        assert any("HIGHEST" not in line for line in products)
