"""Algorithm 1 as released, and whole tensors packed so that every rank runs the same program on its own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from easylm_plus.numerics.formats import E4M3, Scaled, cast, decode, scale_of
from easylm_plus.numerics.reduction import encode_shared, owned_sum
from easylm_plus.parallel import zero
from easylm_plus.parallel.collectives import all_gather_codes
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning import wire

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8" / "d_zero_greedy.npz")
SETS = [key.removesuffix("_sizes") for key in GOLDEN.files if key.endswith("_sizes") and not key.startswith("ds_")]
SHAPES = [(16, 16), (32, 48), (16, 16), (48, 32), (16, 64), (32, 16), (16, 16), (16, 48), (64, 16), (32, 32)]


def golden_plan(name):
    return zero.plan(GOLDEN[f"{name}_sizes"].tolist(), int(GOLDEN[f"{name}_n"]))


def tensors(seed=0, shapes=SHAPES):
    """Each of another magnitude, over twelve orders."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [10.0 ** (i - 6) * jax.random.normal(key, shape) for i, (key, shape) in enumerate(zip(keys, shapes))]


# --- who owns what ---


@pytest.mark.parametrize("name", SETS)
def test_owners_and_places_are_those_of_the_released_code(name):
    plan = golden_plan(name)
    np.testing.assert_array_equal(plan.owner, GOLDEN[f"{name}_rank"])
    np.testing.assert_array_equal(plan.load, GOLDEN[f"{name}_load"])
    np.testing.assert_array_equal(np.bincount(plan.owner, minlength=plan.ranks), GOLDEN[f"{name}_count"])
    assert plan.width == GOLDEN[f"{name}_shard"]
    np.testing.assert_array_equal(np.multiply(plan.owner, plan.width) + plan.start, GOLDEN[f"{name}_start"])


def test_a_second_group_is_dealt_to_those_with_least_of_the_first():
    sizes = [GOLDEN[f"ds_group{i}_sizes"].tolist() for i in (0, 1)]
    first = zero.plan(sizes[0], int(GOLDEN["ds_n"]))
    second = zero.plan(sizes[1], int(GOLDEN["ds_n"]), before=first.load)
    np.testing.assert_array_equal(first.owner, GOLDEN["ds_group0_rank"])
    np.testing.assert_array_equal(second.owner, GOLDEN["ds_group1_rank"])
    assert zero.plan(sizes[1], int(GOLDEN["ds_n"])).owner != second.owner
    assert sum(second.load) == sum(sizes[1])  # its own row holds its own tensors only


@pytest.mark.parametrize(
    "name, imbalance, blocks",
    (("llama7b_n32", 1.0, 193), ("gpt13b_tp2_n16", 1.0, 30), ("gpt125m_n32", 4 / 3, 6), ("lpt_worst_n3", 11 / 9, 11)),
)
def test_loads_are_even_where_there_are_tensors_enough(name, imbalance, blocks):
    plan = golden_plan(name)
    assert plan.imbalance == pytest.approx(imbalance, abs=1e-9)
    assert zero.segments(plan).shape == (plan.ranks, blocks)
    dealt_in_turn = np.bincount(np.arange(len(plan.sizes)) % plan.ranks, plan.sizes)
    assert dealt_in_turn.max() / dealt_in_turn.mean() >= plan.imbalance


# --- the packed rows ---


@pytest.mark.parametrize("ranks", (1, 3, 8, 16))
def test_packing_and_unpacking_are_inverse(ranks):
    x = tensors()
    plan = zero.plan([a.size for a in x], ranks)
    packed = jax.jit(lambda x: zero.pack(plan, x))(x)
    assert packed.shape == (ranks, max(plan.load))
    for back, a in zip(jax.jit(lambda packed: zero.unpack(plan, packed))(packed), x, strict=True):
        assert (back == a.ravel()).all()
    assert (packed != 0).sum() == sum(plan.sizes)
    with pytest.raises(TypeError):  # a tensor of another size
        zero.pack(plan, x[::-1])


@pytest.mark.parametrize("name", ("random200_n7", "fewer_than_ranks", "powers_n5", "equal10_n4"))
def test_every_block_belongs_to_one_tensor(name):
    plan = golden_plan(name)
    ids = np.repeat(zero.segments(plan), plan.block, axis=1)
    assert ids.shape == (plan.ranks, plan.width)
    for owner, start, size, number in zip(plan.owner, plan.start, plan.sizes, plan.number):
        assert (ids[owner, start : start + size] == number).all()
        assert (ids[owner] == number).sum() == size
    assert (ids == plan.most).sum() == plan.ranks * plan.width - sum(plan.sizes)


@pytest.mark.parametrize("ranks", (1, 3, 16))
def test_a_row_knows_the_amax_of_each_of_its_tensors(ranks):
    """With 16 ranks six have nothing."""
    x = tensors()
    plan = zero.plan([a.size for a in x], ranks)
    ids = zero.segments(plan)
    rows = zero.pack(plan, x)
    amaxes = jax.jit(jax.vmap(lambda row, ids: zero.amax_of_segments(row, ids, plan.most)))(rows, ids)
    assert amaxes.shape == (ranks, plan.most)
    expected = np.array([jnp.abs(a).max() for a in x])
    np.testing.assert_array_equal(zero.of_tensors(plan, amaxes), expected)
    assert (amaxes > 0).sum() == len(x)
    wide = jax.vmap(lambda values, ids: zero.spread(values, ids, plan.width))(amaxes, ids)
    for one, value in zip(zero.unpack(plan, wide), expected):
        assert (one == value).all()
    assert (wide != 0).sum() == sum(plan.sizes)
    shifted = jax.vmap(lambda row, ids: zero.amax_of_segments(row, ids, plan.most))(rows, np.roll(ids, 1, 1))
    assert (zero.of_tensors(plan, shifted) != expected).any()


# --- one program on all ranks ---


def reduced_to_owners_and_back(plan, ids, gradients):
    """On one of eight devices: its gradients -> every tensor's sum in E4M3, as [N, W] codes and factors [N, C].

    Codes go to the owners, who add them and cast the sum, each tensor with its own scale; then to all.
    """
    axis = ("replica",)
    local = [encode_shared(g, axis) for g in gradients]
    code = zero.pack(plan, [tensor.code for tensor in local])
    total = owned_sum(Scaled(code, jnp.float32(1)), axis, axis)
    factors = (
        jnp.zeros((plan.ranks, plan.most))
        .at[plan.owner, plan.number]
        .set(jnp.stack([tensor.scale_inv for tensor in local]))
    )
    mine = ids[jax.lax.axis_index(axis)]
    total = total * zero.spread(factors[jax.lax.axis_index(axis)], mine, plan.width)
    scale = scale_of(zero.amax_of_segments(total, mine, plan.most), E4M3)
    stored = cast(total, zero.spread(scale, mine, plan.width), E4M3)
    return all_gather_codes(stored[None], axis, 0), all_gather_codes(1 / scale[None], axis, 0)


def test_gradients_are_summed_by_their_owners():
    """Each tensor with a scale of its own, 10^-6 to 10^3; all devices end alike; a byte an element travels each way."""
    per_rank = [tensors(seed) for seed in range(8)]
    stacked = [jnp.stack(g) for g in zip(*per_rank)]
    plan = zero.plan([g[0].size for g in stacked], 8)
    ids = jnp.asarray(zero.segments(plan))
    run = lambda g: jax.tree.map(lambda y: y[None], reduced_to_owners_and_back(plan, ids, [x[0] for x in g]))
    region = jax.jit(
        jax.shard_map(
            run, mesh=make_mesh({"replica": 8}), in_specs=P("replica"), out_specs=P("replica"), check_vma=False
        )
    )
    code, scale_inv = region(stacked)
    for device in (0, 7):
        factors = zero.of_tensors(plan, scale_inv[device])
        for one, factor, g in zip(zero.unpack(plan, code[device]), factors, stacked):
            expected = np.asarray(g.sum(0)).ravel()
            got = np.asarray(decode(Scaled(one[None], factor)))[0]
            assert 10 * np.log10((expected**2).sum() / ((got - expected) ** 2).sum()) > 27
    text = region.lower(stacked).compile().as_text()
    sent = {key: traffic.wire for key, traffic in wire.wire_bytes(text).items() if key[1] == "u8"}
    assert sent == {("all-to-all", "u8"): 7 * plan.width, ("all-gather", "u8"): 7 * plan.width}
    assert all(np.prod(dims) <= len(plan.sizes) * plan.most for _, dims, _, _ in wire.float_collectives(text))
