"""Batches of packed rows, tokenised on the fly, in an order that is a function of the seed alone.

S shards share the draws of the mixture: of each block of S consecutive draws every shard takes one. Which one rotates
by a hash of the block: with "shard s takes the draws k = s (mod S)" and a cycle length that has a divisor in common
with S, a shard would see some sources only, and since sources fill rows at different speeds their proportions in
the batches would go wrong. A shard packs pools of P of its own draws, each on its own (the first pool of shard s
is short by s/S of a pool, so that shards do not all tokenise in the same step); the rows of a pool are shuffled,
since packing sorts by length. Row r of step n is the next row of shard (n·B + r) mod S, B being the batch size.

A process that makes the rows `rows` of each batch follows only the shards they come from: its own share, if S is a
multiple of B, as it is by default. The state has a (pool, row) for each shard it follows; `merge_states` joins those
of all processes, and the result continues on any number of processes.

With `draws` the data ends. The last batches are filled up with empty rows, so nothing is lost. A loader of whole
batches then raises StopIteration; a loader of a part of the rows cannot know whether others still have some: it
sets `exhausted` and goes on with empty batches, and the run is over when the global sum of loss weights has been 0
for S/B steps in a row (one, by default).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.batch_stats import Batch, Item, Statistics, make_batch
from data_pipelines.conversation import Conversation
from data_pipelines.errors import InputError
from data_pipelines.mixture import Draw, Mixture, draw_rng, permutation_key, permute
from data_pipelines.packing import Packing, pack_pool
from data_pipelines.prefetch import Prefetch as Prefetch
from data_pipelines.template import Example
from data_pipelines.text_objective import TextObjective

Encode = Callable[[Conversation], Example | None] | TextObjective
State = dict[str, Any]
_VERSION = 1
_FRUITLESS_DRAWS = 100_000


@dataclasses.dataclass(slots=True)
class _Shard:
    """Where a shard stands: the next row is rows[row] of the pool; rows is None until it is needed."""

    pool: int = 0
    row: int = 0
    rows: list[list[Item]] | None = None


class Loader:
    """An iterator of batches; see above for their order.

    sources: name -> conversations; its order gives the source ids. weights, seed: see Mixture. encode: usually a
    Template with max_length = length + 1, or a TextObjective of one, whose examples differ from epoch to epoch and are
    not cached. batch_size: rows of a whole batch. rows: those that this process makes.
    shards: S, by default the batch size. pool: P, draws packed together. manifest_hash: names the data, the
    tokenizer and the template; it is compared on resuming. draws: the data ends after so many. cache_bytes: encoded
    examples are kept up to this size (and not replaced: in shuffled epochs of more data than fits, an LRU cache
    would be hit less often than one that stays as it is).
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Conversation]],
        weights: Mapping[str, float] | None,
        encode: Encode,
        *,
        batch_size: int,
        length: int,
        packing: Packing = "best_fit",
        shards: int | None = None,
        pool: int = 256,
        seed: int = 0,
        rows: range | None = None,
        manifest_hash: str = "",
        draws: int | None = None,
        cache_bytes: int = 1 << 29,
    ):
        self._sources, self._encode = dict(sources), encode
        self.mixture = Mixture({name: len(source) for name, source in sources.items()}, weights, seed)
        self.batch_size, self.length = batch_size, length
        self.rows = range(batch_size) if rows is None else rows
        self._packing, self._pool, self._draws, self._seed = packing, pool, draws, seed
        self.shards = shards or batch_size
        if min(batch_size, length, pool, self.shards) < 1:
            raise InputError("batch_size, length, pool and shards: expected 1 or more of each")
        if not self.rows or not set(self.rows) <= set(range(batch_size)):
            raise InputError(f"rows: found {self.rows}; expected a part of range({batch_size})")
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
        self.step = 0
        self.exhausted = False
        self._cache: dict[tuple[int, int], Item | None] = {}
        self._cache_room = cache_bytes
        self._statistics = Statistics(self.mixture.names)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.exhausted = not any(self._has_row(shard) for shard in self._local)
        if self.exhausted and len(self.rows) == self.batch_size:
            raise StopIteration
        own: list[list[Item]] = [[] for _ in self.rows]
        for row in range(self.batch_size):
            shard = (self.step * self.batch_size + row) % self.shards
            if shard in self._local and self._has_row(shard):
                items = self._take_row(shard)
                if row in self.rows:
                    own[self.rows.index(row)] = items
        self._statistics.add(own, self.length)
        self.step += 1
        return make_batch(own, self.length, self.mixture.names)

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
        expected = self._identity
        differing = [key for key in expected if state.get(key, "nothing") != expected[key]]
        if differing:
            found = "; ".join(
                f"{key}: found {state.get(key, 'nothing')}, expected {expected[key]}" for key in differing
            )
            raise InputError(f"the state is of another data order: {found}")
        if missing := [shard for shard in self._local if state["positions"][shard] is None]:
            raise InputError(f"the state has no positions for shards {missing}; merge the states of all processes")
        self.step = state["step"]
        for shard in self._local:
            pool, row = state["positions"][shard]
            self._local[shard] = _Shard(pool, row)

    def _has_row(self, shard: int) -> bool:
        """Makes the shard's current pool if need be, going on past pools without a row; False at its end."""
        at = self._local[shard]
        fruitless = 0
        while at.rows is None:
            first, last = self._pool_range(shard, at.pool)
            if first >= last:
                return False
            at.rows = self._make_rows(shard, at.pool, range(first, last))
            if at.row > 0 and at.row >= len(at.rows):
                raise InputError(f"shard {shard}: the state is at row {at.row} of a pool of {len(at.rows)}")
            if not at.rows:
                at.pool, at.rows, fruitless = at.pool + 1, None, fruitless + last - first
                if fruitless >= _FRUITLESS_DRAWS:
                    raise InputError(f"{fruitless} draws in a row left nothing that carries loss")
        return True

    def _take_row(self, shard: int) -> list[Item]:
        at = self._local[shard]
        assert at.rows is not None
        items = at.rows[at.row]
        at.row += 1
        if at.row == len(at.rows):
            self._local[shard] = _Shard(at.pool + 1)
        return items

    def _pool_range(self, shard: int, pool: int) -> tuple[int, int]:
        """First and last + 1 of the shard's own draws that are in its pool; equal past the end of the data."""
        short = shard * self._pool // self.shards
        first, last = max(0, pool * self._pool - short), (pool + 1) * self._pool - short
        if self._draws is not None:
            blocks, rest = divmod(self._draws, self.shards)
            own = blocks + (self._place(shard, blocks) < rest)
            first, last = min(first, own), min(last, own)
        return first, last

    def _place(self, shard: int, block: int) -> int:
        return (shard + permutation_key(self._seed, "rotation", block)) % self.shards

    def _make_rows(self, shard: int, pool: int, blocks: range) -> list[list[Item]]:
        draws = [self.mixture.draw(block * self.shards + self._place(shard, block)) for block in blocks]
        kept = []
        for draw, item in zip(draws, self._items(draws)):
            if item is None:
                self._statistics.drop("no loss tokens", draw.source)
            else:
                kept.append(item)
        rows = pack_pool([item.example for item in kept], self.length, self._packing)
        key = permutation_key(self._seed, f"rows of shard {shard}", pool)
        return [[kept[i] for i in rows[permute(place, len(rows), key)]] for place in range(len(rows))]

    def _items(self, draws: Sequence[Draw]) -> list[Item | None]:
        """The drawn examples, encoded together as far as they are not in the cache."""
        if isinstance(self._encode, TextObjective):
            return encode_draws(self._encode, self._sources, draws, self._seed)
        keys = [(draw.source, draw.example) for draw in draws]
        items = {key: self._cache[key] for key in keys if key in self._cache}
        new = [key for key in dict.fromkeys(keys) if key not in items]
        for key, item in zip(new, encode_draws(self._encode, self._sources, [Draw(s, 0, i) for s, i in new])):
            items[key] = item
            size = 500 if item is None else 500 + item.example.ids.nbytes + item.example.weights.nbytes
            if size <= self._cache_room:
                self._cache_room -= size
                self._cache[key] = item
        return [items[key] for key in keys]


def encode_draws(
    encode: Encode, sources: Mapping[str, Sequence[Conversation]], draws: Sequence[Draw], seed: int = 0
) -> list[Item | None]:
    """The example of each draw; None where no token carries loss. Only a TextObjective looks at seed and epoch. Uses
    `encode.encode_many` where there is one, as a Template has: one call of the tokenizer for all texts."""
    names, sequences = list(sources), list(sources.values())
    conversations = [sequences[draw.source][draw.example] for draw in draws]
    if isinstance(encode, TextObjective):
        examples = encode.encode_drawn(conversations, [draw_rng(seed, names[draw.source], draw) for draw in draws])
    else:
        many = getattr(encode, "encode_many", None)
        examples = many(conversations) if many else [encode(conversation) for conversation in conversations]
    items: list[Item | None] = []
    for draw, conversation, example in zip(draws, conversations, examples):
        loss_tokens = 0 if example is None else int(np.count_nonzero(example.row()[2]))
        items.append(None if example is None else Item(draw.source, conversation.id, example, loss_tokens))
    return items


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
    sources: Mapping[str, Sequence[Conversation]],
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
    sequences = list(sources.values())
    rows = range(batch_size) if rows is None else rows
    todo = [Draw(s, 0, i) for s, source in enumerate(sequences) for i in range(len(source))[:limit_per_source]]
    waiting: list[list[Item]] = []
    for start in range(0, len(todo), pool):
        items = [item for item in encode_draws(encode, sources, todo[start : start + pool]) if item is not None]
        packed = pack_pool([item.example for item in items], length, packing)
        waiting += [[items[i] for i in row] for row in packed]
        while len(waiting) >= batch_size or (waiting and start + pool >= len(todo)):
            whole = waiting[:batch_size] + [[] for _ in range(batch_size - len(waiting))]
            yield make_batch([whole[row] for row in rows], length, list(sources))
            del waiting[:batch_size]
