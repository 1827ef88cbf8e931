"""Codes arrive as they were sent, in the order in which shardings number blocks, and as bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easylm_plus.parallel import collectives
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning import wire

AXES = ("fsdp", "sequence", "expert")  # of two devices each; every device has a row of what is given to `on_devices`
E4M3 = jnp.float8_e4m3fn


def on_devices(f, x):
    """f on each of eight devices' own row x[i]; all devices' results, stacked."""
    mesh = make_mesh(dict.fromkeys(AXES, 2))
    local = lambda row: f(row[0])[None]
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)), x


def run(f, x):
    compiled, x = on_devices(f, x)
    return compiled(x)


def block_of_device(spec, shape):
    """For each of the eight devices, the slices of an array of this shape that a sharding gives to it."""
    mesh = make_mesh(dict.fromkeys(AXES, 2))
    where = NamedSharding(mesh, spec).devices_indices_map(shape)
    return [where[device] for device in mesh.devices.flat]


def codes(*shape):
    """All codes that are numbers, NaN and both zeros among them."""
    return jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(0), shape, jnp.uint8), E4M3)


def bits(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint8))


ORDERS = [(), ("fsdp",), ("expert",), ("fsdp", "expert"), ("expert", "fsdp"), ("sequence", "fsdp", "expert"), AXES]


@pytest.mark.parametrize("axes", ORDERS, ids=str)
@pytest.mark.parametrize("dim", (0, -1))
def test_a_gather_joins_blocks_as_a_sharding_cuts_them(axes, dim):
    x = codes(8, 24)
    spec = P(axes, None) if dim == 0 else P(None, axes)
    blocks = jnp.stack([x[where] for where in block_of_device(spec, x.shape)])
    gathered = run(lambda block: collectives.all_gather_codes(block, axes, dim), blocks)
    assert all((bits(copy) == bits(x)).all() for copy in gathered)
    if axes == ("expert", "fsdp"):  # in another order it is another matrix
        wrong = run(lambda block: collectives.all_gather_codes(block, axes[::-1], dim), blocks)
        assert not (bits(wrong[0]) == bits(x)).all()


def test_wider_dtypes_travel_as_they_are():
    x = jnp.arange(8 * 6, dtype=jnp.float32).reshape(8, 6) / 7
    assert (run(lambda row: collectives.all_gather_codes(row[None], AXES, 0), x)[5] == x).all()


def ranks_and_peers(axes):
    """Of each device: its number among those along `axes`, and which devices these are."""
    place = {axis: np.indices((2, 2, 2))[i].ravel() for i, axis in enumerate(AXES)}
    number = lambda names: sum(2**i * place[axis] for i, axis in enumerate(reversed(names))) + np.zeros(8, int)
    rank, group = number(axes), number([axis for axis in AXES if axis not in axes])
    peers = [sorted(np.flatnonzero(group == group[i]), key=lambda j: rank[j]) for i in range(8)]
    blocks = [where[0].start or 0 for where in block_of_device(P(axes), (2 ** len(axes),))]
    assert rank.tolist() == blocks  # as a sharding numbers its blocks
    return rank, peers


@pytest.mark.parametrize("axes", ORDERS, ids=str)
def test_exchange_brings_a_rank_its_chunk_of_every_rank(axes):
    rank, peers = ranks_and_peers(axes)
    sent = np.array([[[device, chunk] for chunk in range(2 ** len(axes))] for device in range(8)], np.uint8)
    received = run(lambda chunks: collectives.exchange(chunks, axes), jnp.asarray(sent))
    np.testing.assert_array_equal(received, [[[peer, rank[i]] for peer in peers[i]] for i in range(8)])


@pytest.mark.parametrize("axes", ORDERS, ids=str)
def test_passing_on_goes_round_all_ranks(axes):
    rank, peers = ranks_and_peers(axes)
    received = run(lambda x: collectives.pass_on(x, axes), jnp.arange(8, dtype=jnp.uint8)[:, None])
    np.testing.assert_array_equal(received[:, 0], [peers[i][rank[i] - 1] for i in range(8)])


@pytest.mark.parametrize("value", (jnp.nan, jnp.inf))
def test_the_largest_is_infinite_where_one_is_no_number(value):
    x = jnp.arange(8.0).at[3].set(value)
    assert (run(lambda one: collectives.largest(one, AXES), x) == jnp.inf).all()
    assert (run(lambda one: collectives.largest(one, AXES), jnp.arange(8.0)) == 7).all()


@pytest.mark.parametrize("stack", ((), (3,), (2, 3)), ids=str)
@pytest.mark.parametrize(
    "blocks, pieces, dim", ((1, 1, -2), (2, 1, -2), (2, 4, -2), (4, 2, -1), (1, 8, -1), (2, 7, -1))
)
def test_splitting_and_joining_are_inverse(stack, blocks, pieces, dim):
    """7 pieces do not divide the 48 elements of a block, which is padded."""
    x = jax.random.normal(jax.random.key(1), (*stack, 8, 12))
    chunks = collectives.split(x, blocks, pieces, dim)
    sides = tuple(np.array(x.shape[-2:]) // np.where(np.arange(-2, 0) == dim, blocks, 1))
    assert chunks.shape == (blocks * pieces, *stack, -(-sides[0] * sides[1] // pieces))
    for number, block in enumerate(jnp.split(x, blocks, dim)):
        flat = jnp.concatenate(list(chunks[number * pieces : (number + 1) * pieces]), -1)
        assert (collectives.join(flat, (), sides) == block).all()
    assert chunks.sum() == pytest.approx(float(x.sum()), abs=1e-3)  # padding adds nothing


def test_only_the_sides_of_a_matrix_are_cut_and_only_where_they_divide():
    with pytest.raises(AssertionError, match="3 blocks do not divide axis -2"):
        collectives.split(jnp.zeros((8, 12)), 3, 1, -2)
    with pytest.raises(AssertionError, match="not axis -3"):
        collectives.split(jnp.zeros((4, 8, 12)), 2, 1, 0)


@pytest.mark.parametrize(
    "kind, nbytes, ours, plain",
    (
        (
            "all-gather",
            7 * 32,
            lambda x: collectives.all_gather_codes(x, AXES, 0),
            lambda x: jax.lax.all_gather(x, AXES, tiled=True),
        ),
        (
            "all-to-all",
            28,
            lambda x: collectives.exchange(x, AXES),
            lambda x: jax.lax.all_to_all(x, AXES, 0, 0, tiled=True),
        ),
        (
            "collective-permute",
            32,
            lambda x: collectives.pass_on(x, AXES),
            lambda x: jax.lax.ppermute(x, AXES, [(i, (i + 1) % 8) for i in range(8)]),
        ),
    ),
    ids=("gather", "exchange", "pass_on"),
)
def test_codes_travel_as_bytes(kind, nbytes, ours, plain):
    """XLA:CPU sends FP8 as float16 where it is not told that these are bytes."""
    x = codes(8, 8, 4)

    def sent(f):
        compiled, _ = on_devices(f, x)
        table = wire.wire_bytes(compiled.lower(x).compile().as_text())
        return {kind: traffic.wire for kind, traffic in table.items()}

    assert sent(ours) == {(kind, "u8"): nbytes}
    assert set(sent(plain)) == {(kind, "f16")}
