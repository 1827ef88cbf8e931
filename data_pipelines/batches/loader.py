"""Batches of packed rows, in an order that is a function of the seed alone.

S shards share the draws of the mixture, and each packs pools of P of its own draws (order.py); the rows of a pool are
shuffled, since packing sorts by length. Row r of step n is the next row of shard (n·B + r) mod S, B being the batch
size. Which examples are in a row follows from their lengths alone, so with a store of tokens (tokens.py) a pool costs
next to nothing, and `seek` goes to any step of a run; without one, examples are tokenised as pools are made.

A process that makes the rows `rows` of each batch follows only the shards they come from: its own share, if S is a
multiple of B, as it is by default. The state has a (pool, row) for each shard it follows; `merge_states` joins those
of all processes, and the result continues on any number of processes.

With `draws`, or where the mixture ends, the data end. The last batches are filled up with empty rows, so nothing is
lost. A loader of whole batches then raises StopIteration; a loader of a part of the rows cannot know whether others
still have some: it sets `exhausted` and goes on with empty batches, and the run is over when the global sum of loss
weights has been 0 for S/B steps in a row (one, by default).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.batches.batch_stats import Batch, Item, Statistics, make_batch
from data_pipelines.batches.examples import Encode, Examples, Handle, Source
from data_pipelines.batches.packing import Packing, Piece, count_rows, pack
from data_pipelines.errors import InputError
from data_pipelines.mixing.mixture import Draws, Mixture
from data_pipelines.mixing.order import Order
from data_pipelines.mixing.permutation import permutation_key, permute

State = dict[str, Any]
POOL = 1024
_VERSION = 1
_FRUITLESS_DRAWS = 100_000
_SEEK = 1 << 15  # draws of a shard looked at together


@dataclasses.dataclass(slots=True)
class _Shard:
    """Where a shard stands: the next row is rows[row] of the pool, pieces of `handles`; rows is None until needed."""

    pool: int = 0
    row: int = 0
    rows: list[list[Piece]] | None = None
    handles: Sequence[Handle] = ()


class Loader:
    """An iterator of batches; see above for their order.

    sources, encode, cache_bytes: see Examples; the order of sources gives the source ids. mixture: a Mixture of the
    sources, or the weights (or None) of one with this seed. batch_size: rows of a whole batch. rows: those that this
    process makes. shards: S, by default the batch size. pool: P, draws packed together. manifest_hash: names the data,
    the tokenizer and the template; it is compared on resuming. draws: the data ends after so many.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixture: Mixture | Mapping[str, float] | None,
        encode: Encode,
        *,
        batch_size: int,
        length: int,
        packing: Packing = "best_fit",
        shards: int | None = None,
        pool: int = POOL,
        seed: int = 0,
        rows: range | None = None,
        manifest_hash: str = "",
        draws: int | None = None,
        cache_bytes: int = 1 << 29,
    ):
        sizes = {name: len(source) for name, source in sources.items()}
        self.mixture = mixture if isinstance(mixture, Mixture) else Mixture(sizes, mixture, seed)
        if dict(zip(self.mixture.names, self.mixture.sizes)) != sizes or self.mixture.names != list(sizes):
            raise InputError(f"the mixture: found one of other sources; expected one of {sizes}")
        self.batch_size, self.length = batch_size, length
        self.rows = range(batch_size) if rows is None else rows
        self.shards = shards or batch_size
        if min(batch_size, length, pool, self.shards) < 1:
            raise InputError("batch_size, length, pool and shards: expected 1 or more of each")
        if not self.rows or not set(self.rows) <= set(range(batch_size)):
            raise InputError(f"rows: found {self.rows}; expected a part of range({batch_size})")
        self._packing, self._seed = packing, seed
        self._examples = Examples(sources, encode, seed, cache_bytes)
        ends = [end for end in (draws, self.mixture.end) if end is not None]
        starts = [phase.start for phase in self.mixture.phases]
        self._order = Order(seed, self.shards, pool, starts, min(ends, default=None))
        common = math.gcd(batch_size, self.shards)
        mine = {row % common for row in self.rows}
        self._local = {s: _Shard() for s in range(self.shards) if s % common in mine}
        self._identity = {
            "version": _VERSION,
            "manifest_hash": manifest_hash,
            "batch_size": batch_size,
            "length": length,
            "shards": self.shards,
            "pool": pool,
            "packing": packing,
            "seed": seed,
            "weights": [[n, w] for n, w in zip(self.mixture.names, self.mixture.cycle_weights)],
            "draws": draws,
        }
        if changes := _changes(self.mixture):
            self._identity["changes"] = changes
        self.step = 0
        self.exhausted = False
        self._statistics = Statistics(self.mixture.names)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return make_batch(self.next_rows(), self.length, self.mixture.names)

    def next_rows(self) -> list[list[Item]]:
        """What the next batch is made of: the segments of each of this process's rows. Raises StopIteration."""
        self.exhausted = not any(self._has_row(shard) for shard in self._local)
        if self.exhausted and len(self.rows) == self.batch_size:
            raise StopIteration
        own: list[list[tuple[Handle, Piece]]] = [[] for _ in self.rows]
        for row in range(self.batch_size):
            shard = (self.step * self.batch_size + row) % self.shards
            if shard in self._local and self._has_row(shard):
                pieces = self._take_row(shard)
                if row in self.rows:
                    own[self.rows.index(row)] = pieces
        items = iter(self._examples.fetch([handle for pieces in own for handle, _ in pieces]))
        made = [[next(items).piece(piece) for _, piece in pieces] for pieces in own]
        self._statistics.add(made, self.length)
        self.step += 1
        return made

    def stats(self) -> dict[str, Any]:
        """Counts of what this loader has handed out; see Statistics.summary. Dropped examples count as their pool
        is made, so those of a pool that is made again after `set_state` count again."""
        return self._statistics.summary()

    def get_state(self) -> State:
        """What `set_state` needs to continue with the next batch, as JSON; positions of shards that other processes
        follow are null."""
        positions = [[s.pool, s.row] if (s := self._local.get(i)) else None for i in range(self.shards)]
        return {**self._identity, "step": self.step, "positions": positions}

    def set_state(self, state: State) -> None:
        """Continues exactly where the state was taken. Raises InputError naming every field that differs."""
        expected, found = self._identity, {k: v for k, v in state.items() if k not in ("step", "positions")}
        show = lambda of, key: of.get(key, "nothing")
        if differing := [key for key in {**expected, **found} if show(found, key) != show(expected, key)]:
            told = "; ".join(f"{key}: found {show(found, key)}, expected {show(expected, key)}" for key in differing)
            raise InputError(f"the state is of another data order: {told}")
        if missing := [shard for shard in self._local if state["positions"][shard] is None]:
            raise InputError(f"the state has no positions for shards {missing}; merge the states of all processes")
        self.step = state["step"]
        for shard in self._local:
            pool, row = state["positions"][shard]
            self._local[shard] = _Shard(pool, row)

    def seek(self, step: int, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Continues with the batch after `step` batches, from here if that is ahead, else from the beginning.

        Packs all pools on the way by the lengths of their examples; without a store of tokens these are tokenised for
        it. progress: told how many of all rows on the way are found.
        """
        if step < self.step:
            self.step, self._local = 0, {shard: _Shard() for shard in self._local}
        taken = lambda shard, step: (step * self.batch_size - shard + self.shards - 1) // self.shards
        ahead = {shard: taken(shard, step) - taken(shard, self.step) for shard in self._local}
        done, total = 0, sum(ahead.values())
        for shard, count in ahead.items():
            at = self._local[shard]
            pool, row = at.pool, at.row + count
            for rows in self._rows_of_pools(shard, pool):
                if row < rows:
                    break
                pool, row = pool + 1, row - rows
                progress(max(0, done + count - row), total)
            else:
                row = 0  # the data end before
            self._local[shard] = _Shard(pool, row)
            done += count
        self.step = step

    def _rows_of_pools(self, shard: int, pool: int) -> Iterator[int]:
        """How many rows this pool of a shard and the ones after it have."""
        together, fruitless = 1, 0
        while pools := list(itertools.takewhile(len, (self._order.blocks(shard, pool + i) for i in range(together)))):
            sizes = self._examples.positions(self._draws(shard, range(pools[0].start, pools[-1].stop)))
            fruitless = 0 if sizes.any() else _fruitless(fruitless + len(sizes))
            for own in np.split(sizes, np.cumsum([len(blocks) for blocks in pools])[:-1]):
                yield count_rows(own[own > 0].tolist(), self.length, self._packing)
            pool += len(pools)
            together = min(2 * together, 1 + _SEEK // len(pools[-1]))  # arrays are the faster the longer they are

    def _has_row(self, shard: int) -> bool:
        """Makes the shard's current pool if need be, going on past pools without a row; False at its end."""
        at = self._local[shard]
        fruitless = 0
        while at.rows is None:
            blocks = self._order.blocks(shard, at.pool)
            if not blocks:
                return False
            at.rows, at.handles = self._make_rows(shard, at.pool, blocks)
            if at.row > 0 and at.row >= len(at.rows):
                raise InputError(f"shard {shard}: the state is at row {at.row} of a pool of {len(at.rows)}")
            if not at.rows:
                at.pool, at.rows, fruitless = at.pool + 1, None, _fruitless(fruitless + len(blocks))
        return True

    def _take_row(self, shard: int) -> list[tuple[Handle, Piece]]:
        at = self._local[shard]
        assert at.rows is not None
        pieces = [(at.handles[piece.example], piece) for piece in at.rows[at.row]]
        at.row += 1
        if at.row == len(at.rows):
            self._local[shard] = _Shard(at.pool + 1)
        return pieces

    def _make_rows(self, shard: int, pool: int, blocks: range) -> tuple[list[list[Piece]], list[Handle]]:
        draws = self._draws(shard, blocks)
        sizes, handles = self._examples.open(draws)
        for source in draws.source[sizes == 0].tolist():
            self._statistics.drop("no loss tokens", source)
        kept = np.flatnonzero(sizes).tolist()
        rows = pack(sizes[kept].tolist(), self.length, self._packing)
        key = permutation_key(self._seed, f"rows of shard {shard}", pool)
        shuffled = [rows[permute(place, len(rows), key)] for place in range(len(rows))]
        return shuffled, [handles[i] for i in kept]

    def _draws(self, shard: int, blocks: range) -> Draws:
        return self.mixture.draw_many(self._order.draws(shard, blocks))


def _fruitless(draws: int) -> int:
    """So many draws in a row, unless there are too many of them."""
    if draws >= _FRUITLESS_DRAWS:
        raise InputError(f"{draws} draws in a row left nothing that carries loss")
    return draws


def _changes(mixture: Mixture) -> list[list[Any]]:
    """[first draw, weights] of the mixture's phases after the first, and [end, []], as JSON has them."""
    later: list[list[Any]] = [[phase.start, list(phase.weights.values())] for phase in mixture.phases[1:]]
    return later if mixture.end is None else [*later, [mixture.end, []]]


def merge_states(states: Sequence[State]) -> State:
    """The states that all processes took after the same step, as one that any number of processes can continue."""
    merged = {**states[0], "positions": list(states[0]["positions"])}
    for state in states[1:]:
        if differing := [key for key in merged if key != "positions" and state.get(key) != merged[key]]:
            raise InputError(f"states of different runs or steps: they differ in {differing}")
        for shard, position in enumerate(state["positions"]):
            known = merged["positions"][shard]
            if None not in (known, position) and known != position:
                raise InputError(f"states of different runs: shard {shard} stands at {known} and at {position}")
            merged["positions"][shard] = position if known is None else known
    return merged


def evaluation_batches(
    sources: Mapping[str, Source],
    encode: Encode,
    *,
    batch_size: int,
    length: int,
    packing: Packing = "best_fit",
    limit_per_source: int | None = None,
    rows: range | None = None,
    pool: int = 256,
) -> Iterator[Batch]:
    """The first `limit_per_source` examples of every source, each once and in order, packed by pools; the last
    batch is filled up with empty rows. Of each batch the rows `rows` are made, so all processes see the same
    number of batches (each tokenises everything). Examples in which nothing carries loss are left out."""
    rows = range(batch_size) if rows is None else rows
    examples = Examples(sources, encode)
    todo = [(s, i) for s, source in enumerate(sources.values()) for i in range(len(source))[:limit_per_source]]
    waiting: list[list[Item]] = []
    for start in range(0, len(todo), pool):
        source, example = np.array(todo[start : start + pool], np.int64).T
        sizes, handles = examples.open(Draws(source, np.zeros_like(source), example))
        kept = np.flatnonzero(sizes).tolist()
        items = examples.fetch([handles[i] for i in kept])
        packed = pack(sizes[kept].tolist(), length, packing)
        waiting += [[items[piece.example].piece(piece) for piece in row] for row in packed]
        while len(waiting) >= batch_size or (waiting and start + pool >= len(todo)):
            whole = waiting[:batch_size] + [[] for _ in range(batch_size - len(waiting))]
            yield make_batch([whole[row] for row in rows], length, list(sources))
            del waiting[:batch_size]
