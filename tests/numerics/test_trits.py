"""Five ternary codes a byte: nothing is lost, and what is served of them is what was packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics.deploy import all_filed, all_served
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.packed_ternary import PackedTernary, packed
from easylm_plus.numerics.trits import Trits, filed, joined, separated, served
from easylm_plus.numerics.verbs import project, project_grouped

rng = np.random.default_rng(0)


@pytest.mark.parametrize("xp", (np, jnp), ids=("numpy", "jax"))
@pytest.mark.parametrize("shape", ((1,), (5,), (7,), (3, 243), (2, 3, 11)), ids=str)
def test_nothing_is_lost(shape, xp):
    codes = rng.integers(-1, 2, shape).astype(np.int8)
    bytes_ = joined(xp.asarray(codes))
    assert isinstance(bytes_, np.ndarray) == (xp is np) and bytes_.dtype == np.uint8
    assert bytes_.shape == (*shape[:-1], -(-shape[-1] // 5)) and bytes_.max() <= 242
    np.testing.assert_array_equal(separated(bytes_, shape[-1]), codes)
    flipped = separated(np.asarray(bytes_) ^ 1, shape[-1])
    assert (np.asarray(flipped) != codes).any()


def test_every_byte():
    codes = separated(np.arange(243, dtype=np.uint8), 5 * 243).reshape(243, 5)
    assert len({tuple(row) for row in codes.tolist()}) == 243
    np.testing.assert_array_equal(joined(codes).reshape(-1), np.arange(243))
    assert codes[1].tolist() == [0, -1, -1, -1, -1], "the first is the lowest digit"


@pytest.mark.parametrize("on_host", (False, True))
@pytest.mark.parametrize("shape", ((1, 1), (300, 7), (256, 64), (2, 3, 33, 5)), ids=str)
def test_a_file_and_what_is_served(shape, on_host):
    w = packed(jnp.asarray(rng.normal(size=shape), jnp.float32))
    w = jax.tree.map(np.asarray, w) if on_host else w
    kept = filed(w)
    assert isinstance(kept, Trits) and kept.shape == shape
    assert kept.codes.size == np.prod(shape[:-2], dtype=int) * -(-shape[-1] * shape[-2] // 5)
    again = served(kept)
    assert isinstance(again.codes, np.ndarray) == on_host
    jax.tree.map(np.testing.assert_array_equal, again, w)
    np.testing.assert_array_equal(decode(kept), decode(w))
    if len(shape) > 2:
        assert kept[1].shape == shape[1:] and served(kept[1]).shape == shape[1:]


def test_bits_a_weight():
    kept = filed(packed(jnp.asarray(rng.normal(size=(256, 512)), jnp.float32)))
    assert 1.6 <= 8 * kept.nbytes / kept.size < 1.601


def test_a_tree_and_its_products():
    w = packed(jnp.asarray(rng.normal(size=(2, 40, 8)), jnp.float32))
    tree = {"a": {"kernel": w}, "b": jnp.ones(3)}
    kept = all_filed(tree)
    assert isinstance(kept["a"]["kernel"], Trits) and kept["b"] is tree["b"]
    assert isinstance(all_served(kept)["a"]["kernel"], PackedTernary)
    x = jnp.asarray(rng.normal(size=(24, 40)), jnp.float32)
    np.testing.assert_array_equal(project(x, filed(w)[1]), project(x, w[1]))
    groups = Groups(jnp.asarray([8, 16]), tile=8, implementation="tiled")
    np.testing.assert_array_equal(project_grouped(x, filed(w), groups), project_grouped(x, w, groups))
