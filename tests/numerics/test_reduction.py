"""Sums of FP8 gradients over devices: what each device is left with, how exact it is, and what travels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easylm_plus.numerics.formats import E4M3, Scaled, amax, cast, decode, per_matrix, scale_of
from easylm_plus.numerics.reduction import encode_shared, owned_sum, ring, two_shot
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning import wire

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8" / "e_grad_allreduce.npz")
AXES = ("fsdp", "sequence", "expert")  # two devices each, in the order of the mesh


def mesh_of(ranks=8):
    sizes = {axis: min(2, max(1, ranks >> i)) for i, axis in enumerate(AXES)}
    return make_mesh(sizes, jax.devices()[:ranks])


def each(f, x, ranks=8):
    """f on every device's own x[i], with what every device got, stacked."""
    local = lambda row: jax.tree.map(lambda y: y[None], f(row[0]))
    return jax.jit(
        jax.shard_map(local, mesh=mesh_of(ranks), in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    )(x)  # fmt: skip


def in_one_process(f, x):
    """The same without devices: a vmap over ranks, whose axis is called `ranks`."""
    return jax.jit(jax.vmap(f, axis_name="ranks"))(x)


def gradients(*shape, ranks=8, alike=0.0, seed=0):
    """Gradients of ranks, N(0, 1e-3) and equal by a share `alike` of their variance: float32[ranks, *shape]."""
    common, own = jax.random.normal(jax.random.key(seed), shape), jax.random.key(seed + 1)
    return 1e-3 * (alike**0.5 * common + (1 - alike) ** 0.5 * jax.random.normal(own, (ranks, *shape)))


def sqnr(got, expected):
    """Signal to error, in dB."""
    return 10 * np.log10(np.mean(np.square(expected)) / np.mean(np.square(np.asarray(got) - expected)))


def blocks(x, cut, dim):
    """What a sharding over the axes `cut` of side `dim` gives to each of the eight devices, stacked."""
    spec = [None] * x.ndim
    spec[dim] = cut
    where = NamedSharding(mesh_of(), P(*spec)).devices_indices_map(x.shape)
    return jnp.stack([x[where[device]] for device in mesh_of().devices.flat])


def shared(x, mu=1.0):
    return encode_shared(x, AXES, mu)


CUTS = [(), ("fsdp",), ("expert",), ("expert", "fsdp"), AXES]


# --- every device is left with its block ---


@pytest.mark.parametrize("dim", (-2, -1))
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_device_has_the_block_that_its_sharding_says(cut, dim):
    g = gradients(3, 16, 24)

    def all_three(x):
        local = shared(x, 0.25)
        return two_shot(shared(x), AXES, cut, dim), ring(local, AXES, cut, dim)[0], two_shot(shared(x), AXES)

    by_two_shot, by_ring, whole = each(all_three, g)
    expected = blocks(g.sum(0), cut, dim)
    for total, least in ((by_two_shot, 27), (by_ring, 18)):
        assert total.code.dtype == E4M3.dtype and total.scale_inv.dtype == jnp.float32
        assert (total.scale_inv == total.scale_inv[0]).all()
        assert sqnr(decode(total), expected) > least
    # the same numbers wherever they end up
    assert (decode(by_two_shot) == blocks(decode(whole)[0], cut, dim)).all()


def test_another_order_of_chunks_gives_other_blocks():
    g, cut = gradients(16, 24), ("expert", "fsdp")
    wrong = each(lambda x: two_shot(shared(x), AXES, cut[::-1]), g)
    assert sqnr(decode(wrong), blocks(g.sum(0), cut, -2)) < 5


@pytest.mark.parametrize("shape", ((6, 10), (3, 5, 7)), ids=str)
@pytest.mark.parametrize("method", (two_shot, lambda *args: ring(*args)[0]), ids=("two_shot", "ring"))
def test_sizes_that_ranks_do_not_divide_are_padded(method, shape):
    g = gradients(*shape)
    total = each(lambda x: method(shared(x, 0.25), AXES), g)
    assert sqnr(decode(total), g.sum(0)) > 18
    assert (decode(total) == decode(total)[0]).all()


def test_where_the_cut_does_not_divide_it_is_an_error():
    with pytest.raises(AssertionError, match="2 blocks do not divide axis -2"):
        each(lambda x: two_shot(shared(x), AXES, ("fsdp",)), gradients(7, 8))
    with pytest.raises(AssertionError, match=r"over \('fsdp',\) cannot be cut over \('expert',\)"):
        each(lambda x: two_shot(shared(x), ("fsdp",), ("expert",)), gradients(8, 8))


@pytest.mark.parametrize("method", (two_shot, lambda *args: ring(*args)[0]), ids=("two_shot", "ring"))
def test_a_stack_is_as_each_of_its_matrices_alone(method):
    """One of the three has gradients a million times larger; under a common scale the others would be zero."""
    g = gradients(3, 16, 24) * jnp.array([1, 1e6, 1])[:, None, None]
    reduced = lambda x: method(shared(x, 0.25), AXES, ("fsdp",))
    together = each(reduced, g)
    for layer in range(3):
        alone = each(reduced, g[:, layer])
        assert (decode(together)[:, layer] == decode(alone)).all()
    flat = decode(each(reduced, g.reshape(8, 48, 24)))  # one matrix of all
    assert sqnr(flat[0, :8], np.asarray(g.sum(0)[0, :8])) < 1


def test_parts_of_one_matrix_share_a_scale():
    """`sequence` stands for an axis that cuts the columns: one device's are a thousand times larger."""
    axes, other = ("fsdp", "expert"), ("sequence",)
    larger = jnp.array([1, 1, 1e3, 1e3] * 2)[:, None, None]
    g = gradients(16, 12) * larger
    reduced = lambda x, others: two_shot(encode_shared(x, (*axes, *others)), axes, ("fsdp",), -2, others)
    together, apart = each(lambda x: reduced(x, other), g), each(lambda x: reduced(x, ()), g)
    assert len(np.unique(together.scale_inv)) == 1
    assert len(np.unique(apart.scale_inv)) == 2
    large = np.asarray(larger[:, 0, 0] > 1)
    assert (decode(together)[large] == decode(apart)[large]).all()
    assert sqnr(decode(apart), np.asarray(decode(together))) > 27  # the smaller part has only lost precision


def test_nothing_to_sum_over_leaves_the_codes():
    """Two roundings in the format of the first: the second has nothing to round."""
    x = gradients(16, 24)[0]
    local = encode_shared(x, ())
    assert (decode(two_shot(local, ())) == decode(local)).all()
    alone, saturated = ring(local, ())
    assert (alone.code == local.code).all() and saturated == (jnp.abs(local.code.astype(jnp.float32)) == 448).mean()


# --- exactness ---


def parameter(i):
    """Gradients [8, D, F] of a golden parameter; the third one is a vector."""
    g = jnp.asarray(GOLDEN[f"g{i}"])
    return g if g.ndim == 3 else g.reshape(8, 8, 8)


def golden_codes(i):
    """The released code's, from its flat bucket: uint8[8, D, F]."""
    order = GOLDEN["order_in_bucket"].tolist()
    ends = np.cumsum([parameter(j)[0].size for j in order])
    end = ends[order.index(i)]
    return GOLDEN["flat_codes"][:, end - parameter(i)[0].size : end].reshape(parameter(i).shape)


@pytest.mark.parametrize("i", range(3))
def test_codes_are_those_of_the_released_code(i):
    """Cast once, by the largest amax of all ranks, at 1 / sqrt(8) of a power of two; its factor is that of the mean."""
    g = parameter(i)
    local = each(lambda x: shared(x, np.float32(8**-0.5)), g)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(local.code, jnp.uint8), golden_codes(i))
    np.testing.assert_allclose(local.scale_inv / 8, GOLDEN["scale_inv"][i], rtol=1.2e-7)
    unshared = in_one_process(lambda x: encode_shared(x, (), np.float32(8**-0.5)), g)
    assert (jax.lax.bitcast_convert_type(unshared.code, jnp.uint8) != golden_codes(i)).mean() > 0.1


@pytest.mark.parametrize("i", range(3))
def test_the_owner_has_the_exact_sum(i):
    codes = jax.lax.bitcast_convert_type(jnp.asarray(golden_codes(i)), E4M3.dtype)
    total = each(lambda code: owned_sum(Scaled(code, jnp.float32(1)), AXES, AXES), codes).reshape(-1)
    expected = GOLDEN[f"sum_wide{i}"]
    np.testing.assert_array_equal(total, expected)
    rounded = jax.lax.bitcast_convert_type(cast(total, jnp.float32(1), E4M3), jnp.uint8)
    np.testing.assert_array_equal(rounded, GOLDEN[f"sum_wide_e4m3_codes{i}"])
    assert (GOLDEN[f"sum_seq_fp8_{i}"] != expected).mean() > 0.3  # what a rounding a hop makes of it


@pytest.mark.parametrize("i", range(3))
def test_the_ring_rounds_at_every_hop(i):
    """The reference adds rank 0, 1, ..., 7; a ring adds chunk c from rank c + 1 on, so ranks are turned round."""
    expected = GOLDEN[f"sum_seq_fp8_{i}"].reshape(8, -1)
    saturated = np.zeros(8)
    for c in range(8):
        turned = jnp.asarray(np.roll(golden_codes(i), c + 1, 0))
        codes = jax.lax.bitcast_convert_type(turned, E4M3.dtype)
        total, share = in_one_process(lambda code: ring(Scaled(code, jnp.float32(1)), ("ranks",)), codes)
        assert (share == share[0]).all()
        saturated[c] = share[0] - (np.abs(total.code[0].astype(np.float32)) == 448).mean()
        np.testing.assert_array_equal(total.code[0].astype(np.float32).reshape(8, -1)[c], expected[c])
    assert (np.abs(saturated) < 1e-7).all()


def test_devices_and_one_process_agree():
    g = gradients(3, 16, 24)

    def both(axes):
        return lambda x: (two_shot(encode_shared(x, axes), axes), ring(encode_shared(x, axes), axes)[0])

    on_devices, simulated = each(both(AXES), g), in_one_process(both(("ranks",)), g)
    for ours, theirs in zip(on_devices, simulated):
        assert (decode(ours) == decode(theirs)).all()


@pytest.mark.parametrize("alike", (0.0, 0.8))
def test_more_ranks_cost_no_exactness(alike):
    """The gradients of 8 micro-batches, summed beforehand on 1, 2, 4 or 8 devices."""
    g = gradients(64, 48, alike=alike)
    expected = np.asarray(g.sum(0))
    for ranks in (1, 2, 4, 8):
        local = g.reshape(ranks, 8 // ranks, 64, 48).sum(1)
        total = each(lambda x: two_shot(shared(x), AXES), local, ranks)
        assert sqnr(decode(total)[0], expected) > 27
    by_ring, _ = each(lambda x: ring(shared(x), AXES), g)
    assert sqnr(decode(by_ring)[0], expected) < 24


# --- what must not be done instead ---


def test_a_sum_in_fp8_is_worse_or_no_number():
    g = gradients(64, 48, alike=0.8)

    def summed_by_psum(x):
        local = shared(x)
        return jax.lax.psum(local.code, AXES).astype(jnp.float32) * local.scale_inv

    got = np.asarray(each(summed_by_psum, g)[0])
    assert np.isnan(got).any() or sqnr(got, np.asarray(g.sum(0))) < 20


def test_codes_of_different_scales_cannot_be_added():
    g = gradients(64, 48) * jnp.array([1, 8] * 4)[:, None, None]
    reduced = lambda axes: each(lambda x: two_shot(encode_shared(x, axes), AXES), g)
    expected = np.asarray(g.sum(0))
    assert sqnr(decode(reduced(AXES))[0], expected) > 27
    assert sqnr(decode(reduced(()))[0], expected) < 5


def test_the_shared_scale_is_a_power_of_two():
    """exp2(floor(log2(x))) is not, on XLA:CPU."""
    x = jnp.exp2(jax.random.uniform(jax.random.key(0), (2000, 1, 1), minval=-30, maxval=30))
    fraction = lambda scale: np.asarray(jax.lax.bitcast_convert_type(scale, jnp.int32)) & 0x7FFFFF
    assert (fraction(encode_shared(x, ()).scale_inv) == 0).all()
    assert (fraction(scale_of(amax(x), E4M3)) == 0).all()
    wrong = jax.jit(lambda largest: jnp.exp2(jnp.floor(jnp.log2(448 / largest))))(amax(x))
    if jax.default_backend() == "cpu":
        assert (fraction(wrong) != 0).mean() > 0.1


# --- no number ---


@pytest.mark.parametrize("method", (two_shot, lambda *args: ring(*args)[0]), ids=("two_shot", "ring"))
@pytest.mark.parametrize("value", (jnp.nan, jnp.inf, -jnp.inf))
def test_one_device_without_a_number_tells_all(value, method):
    g = gradients(3, 16, 24).at[5, 1, 3, 4].set(value)
    total = each(lambda x: method(shared(x), AXES, ("fsdp",)), g)
    assert jnp.isnan(total.scale_inv[:, 1]).all()
    assert jnp.isnan(decode(total)[:, 1]).all()
    assert jnp.isfinite(decode(total)[:, (0, 2)]).all()
    if not jnp.isnan(value):  # codes alone do not tell
        assert jnp.isfinite(each(lambda x: shared(x).code, g).astype(jnp.float32)).all()


def test_a_gradient_of_zeros_stays_so():
    total = each(lambda x: two_shot(shared(x), AXES), jnp.zeros((8, 16, 24)))
    assert (decode(total) == 0).all() and (total.scale_inv == 1).all()


# --- mu ---


def test_mu_comes_after_the_power_of_two():
    x = gradients(3, 16, 24)[0] * jnp.array([1, 1e4, 1e7])[:, None, None]  # the last amax is above 448
    mu = jnp.array([0.3, 1.0, 1.7])
    scale = scale_of(amax(x), E4M3)
    local = encode_shared(x, (), mu)
    np.testing.assert_allclose(local.scale_inv * scale * mu, 1, rtol=1e-6)
    assert (local.code == cast(x, per_matrix(scale * mu), E4M3)).all()
    assert (jnp.abs(local.code[0].astype(jnp.float32)).max() < 448 * 0.31).all()


def test_the_ring_counts_what_saturates():
    g = gradients(16, 24, alike=1.0)  # eight times the same: whatever is above 448 / 8 saturates
    total, share = each(lambda x: ring(shared(x), AXES, ("fsdp",), -2), g)
    whole = np.concatenate([np.asarray(total.code[0]), np.asarray(total.code[4])]).astype(np.float32)
    assert (share == np.float32((np.abs(whole) == 448).mean())).all()
    assert share[0] > 0.1
    _, share = each(lambda x: ring(shared(x, 1 / 8), AXES, ("fsdp",), -2), g)
    assert (share == share[0]).all() and share[0] < 0.01


# --- what travels ---


def traffic(f, x):
    local = lambda row: jax.tree.map(lambda y: y[None], f(row[0]))
    region = jax.shard_map(local, mesh=mesh_of(), in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
    text = jax.jit(region).lower(x).compile().as_text()
    return {key: sent.wire for key, sent in wire.wire_bytes(text).items()}, wire.float_collectives(text)


@pytest.mark.parametrize("cut, copies", (((), 8), (("fsdp",), 4), (AXES, 1)), ids=str)
def test_bytes_on_the_wire(cut, copies):
    """n (N - 1) / N there and n (R - 1) / N back, and two amaxes a matrix."""
    g = gradients(3, 16, 24)
    n = g[0].size
    sent, floats = traffic(lambda x: two_shot(shared(x), AXES, cut), g)
    back = {("all-gather", "u8"): n * (copies - 1) / 8} if copies > 1 else {}
    assert {key: nbytes for key, nbytes in sent.items() if key[1] == "u8"} == {("all-to-all", "u8"): n * 7 / 8} | back
    assert all(dims == (3,) and kind == "all-reduce" for _, dims, kind, _ in floats) and 1 <= len(floats) <= 2
    sent, floats = traffic(lambda x: ring(shared(x), AXES, cut), g)
    assert {key: nbytes for key, nbytes in sent.items() if key[1] == "u8"} == {
        ("collective-permute", "u8"): n * 7 / 8
    } | back
    assert all(dims == (3,) and kind == "all-reduce" for _, dims, kind, _ in floats)


def test_a_sum_in_float_is_seen():
    _, floats = traffic(lambda x: jax.lax.psum(x, AXES), gradients(3, 16, 24))
    assert [dims for _, dims, _, _ in floats] == [(3, 16, 24)]
