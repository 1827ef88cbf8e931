"""Which draws make up the pools that shards pack: the order of a run's data, before packing.

S shards share the draws of the mixture: of each block of S consecutive draws every shard takes one. Which one rotates
by a hash of the block: with "shard s takes the draws k = s (mod S)" and a cycle length that has a divisor in common
with S, a shard would see some sources only, and since sources fill rows at different speeds their proportions in
the batches would go wrong. A shard packs pools of P of its own draws; its first is short by s/S of a pool, so that
shards do not all make one in the same step.

A pool never holds draws of two phases of the mixture: its rows are shuffled, so some of a new phase would come before
the last of the old one. After a change of weights each shard begins with a short pool again.
"""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipelines.mixing.permutation import permutation_key

_CHUNK = 1024  # blocks whose rotation is kept together


class Order:
    """The pools of S shards. starts: first draws of the phases, ascending from 0; end: how many draws there are in
    all, None for no end."""

    def __init__(self, seed: int, shards: int, pool: int, starts: Sequence[int] = (0,), end: int | None = None):
        self._seed, self._shards, self._pool = seed, shards, pool
        self._starts = [start for start in starts if end is None or start < end]
        self._end = end
        self._rotation = functools.lru_cache(maxsize=1024)(self._rotations)
        self._regions = functools.lru_cache(maxsize=None)(self._find_regions)

    def blocks(self, shard: int, pool: int) -> range:
        """The blocks of draws from which a pool of the shard is, which are numbers of its own draws; empty past the
        end."""
        for first, last, count in self._regions(shard):
            if count is None or pool < count:
                start = first + max(0, pool * self._pool - self._short(shard))
                stop = first + (pool + 1) * self._pool - self._short(shard)
                return range(start, stop if last is None else min(stop, last))
            pool -= count
        return range(0)

    def draws(self, shard: int, blocks: range) -> npt.NDArray[np.int64]:
        """int64[n]: the number of the draw that the shard takes of each block."""
        if not blocks:
            return np.empty(0, np.int64)
        chunks = range(blocks.start // _CHUNK, (blocks.stop - 1) // _CHUNK + 1)
        rotation = np.concatenate([self._rotation(chunk) for chunk in chunks])[blocks.start - chunks.start * _CHUNK :]
        return np.arange(blocks.start, blocks.stop) * self._shards + (shard + rotation[: len(blocks)]) % self._shards

    def _short(self, shard: int) -> int:
        return shard * self._pool // self._shards

    def _find_regions(self, shard: int) -> list[tuple[int, int | None, int | None]]:
        """(first own draw, last + 1, number of pools) of each phase; None: no end."""
        firsts = [self._own(shard, start) for start in self._starts]
        lasts = [*firsts[1:], None if self._end is None else self._own(shard, self._end)]
        first_pool = self._pool - self._short(shard)
        count = lambda size: 0 if size <= 0 else 1 + max(0, -(-(size - first_pool) // self._pool))
        return [(a, b, None if b is None else count(b - a)) for a, b in zip(firsts, lasts)]

    def _own(self, shard: int, draws: int) -> int:
        """How many of the first `draws` draws are the shard's."""
        blocks, rest = divmod(draws, self._shards)
        return blocks + int(self.draws(shard, range(blocks, blocks + 1))[0] % self._shards < rest)

    def _rotations(self, chunk: int) -> npt.NDArray[np.int32]:
        keys = [permutation_key(self._seed, "rotation", i) for i in range(chunk * _CHUNK, (chunk + 1) * _CHUNK)]
        return np.array([key % self._shards for key in keys], np.int32)
