"""Every draw is in one pool of one shard, pools keep to their phase, and what was there before phases is unchanged."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixing.order import Order
from data_pipelines.mixing.permutation import permutation_key


def pools(order, shards, most=10_000):
    """[shard][pool] -> numbers of draws, up to the end."""
    made = [[] for _ in range(shards)]
    for shard in range(shards):
        while (blocks := order.blocks(shard, len(made[shard]))) and len(made[shard]) < most:
            made[shard].append(order.draws(shard, blocks).tolist())
    return made


@settings(max_examples=150, deadline=None)
@given(
    shards=st.integers(1, 9),
    pool=st.integers(1, 40),
    cuts=st.lists(st.integers(1, 600), max_size=5, unique=True),
    end=st.integers(1, 700),
)
def test_each_draw_is_in_one_pool_and_none_straddles_a_phase(shards, pool, cuts, end):
    starts = [0, *sorted(cuts)]
    made = pools(Order(3, shards, pool, starts, end), shards)
    assert sorted(draw for shard in made for some in shard for draw in some) == list(range(end))
    for shard in made:
        flat = [draw for some in shard for draw in some]
        assert flat == sorted(flat)
        for some in shard:
            phases = {sum(draw >= start for start in starts) for draw in some}
            assert 0 < len(some) <= pool and len(phases) == 1


def test_without_the_cut_a_pool_would_straddle():
    made = pools(Order(3, 4, 10, [0], 400), 4)
    assert any(some[0] < 100 <= some[-1] for shard in made for some in shard)


def test_blocks_share_a_step_and_pools_do_not_start_together():
    order = Order(0, 8, 64)
    for block in (0, 5, 1023, 1024, 99_999):
        taken = sorted(int(order.draws(shard, range(block, block + 1))[0]) for shard in range(8))
        assert taken == list(range(8 * block, 8 * block + 8))
    assert [len(order.blocks(shard, 0)) for shard in range(8)] == [64 - 8 * shard for shard in range(8)]
    assert order.blocks(3, 7) == range(7 * 64 - 24, 8 * 64 - 24)


@settings(max_examples=60, deadline=None)
@given(
    shards=st.integers(1, 9), pool=st.integers(1, 40), number=st.integers(0, 200), end=st.none() | st.integers(1, 3000)
)
def test_one_phase_is_as_it_always_was(shards, pool, number, end):
    """Runs are resumed and replayed by these formulas: they may never change."""
    order = Order(7, shards, pool, [0], end)
    place = lambda shard, block: (shard + permutation_key(7, "rotation", block)) % shards
    for shard in range(shards):
        short = shard * pool // shards
        first, last = max(0, number * pool - short), (number + 1) * pool - short
        if end is not None:
            own = end // shards + (place(shard, end // shards) < end % shards)
            first, last = min(first, own), min(last, own)
        blocks = order.blocks(shard, number)
        assert list(blocks) == list(range(first, last))
        assert order.draws(shard, blocks).tolist() == [block * shards + place(shard, block) for block in blocks]
