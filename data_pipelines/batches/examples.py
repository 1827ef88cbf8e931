"""Where the loader gets the examples of draws: read from a store of tokens (tokens.py), or tokenised as they are drawn.

Packing asks for the positions that examples take, and only what is packed into the next batch is read. A store knows
the first without reading the second; conversations have to be tokenised for it, so what that gave is kept with the
draw until its row is handed out, and in a cache for later epochs.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data_pipelines.batches.batch_stats import Item
from data_pipelines.batches.tokens import TokenStore
from data_pipelines.conversation import Conversation
from data_pipelines.mixing.mixture import Draw, Draws, draw_rng
from data_pipelines.templates.template import Example
from data_pipelines.templates.text_objective import TextObjective

Encode = Callable[[Conversation], Example | None] | TextObjective
Source = Sequence[Conversation] | TokenStore
Handle = Item | tuple[int, int]  # an example, or where it lies: (source, example)


class Examples:
    """The examples of named sources.

    sources: name -> conversations, or tokens. encode: makes examples of conversations, usually a Template with
    max_length = length + 1, or a TextObjective of one, whose examples differ from epoch to epoch and are not cached.
    cache_bytes: encoded examples are kept up to this size (and not replaced: in shuffled epochs of more data than
    fits, an LRU cache would be hit less often than one that stays as it is).
    """

    def __init__(self, sources: Mapping[str, Source], encode: Encode, seed: int = 0, cache_bytes: int = 0):
        self._stores = {i: s for i, s in enumerate(sources.values()) if isinstance(s, TokenStore)}
        self._conversations = {name: () if isinstance(s, TokenStore) else s for name, s in sources.items()}
        self._stored = np.array([i in self._stores for i in range(len(sources))])
        self._encode, self._seed, self._room = encode, seed, cache_bytes
        self._cache: dict[tuple[int, int], Item | None] = {}
        self._known: dict[int, npt.NDArray[np.int32]] = {}

    def open(self, draws: Draws) -> tuple[npt.NDArray[np.int32], list[Handle]]:
        """int32[n]: the positions of each draw's example, 0 where no token carries loss; and what `fetch` needs."""
        positions, fresh = self._stored_positions(draws)
        handles: list[Handle] = list(zip(draws.source.tolist(), draws.example.tolist()))
        for i, item in zip(fresh.tolist(), self._items(_listed(draws, fresh))):
            if item is not None:
                positions[i], handles[i] = item.example.positions, item
        return positions, handles

    def fetch(self, handles: Sequence[Handle]) -> list[Item]:
        """The examples of draws that take one position or more."""
        return [handle if isinstance(handle, Item) else self._read(*handle) for handle in handles]

    def positions(self, draws: Draws) -> npt.NDArray[np.int32]:
        """Those of `open`; what had to be tokenised for it is remembered by its length alone."""
        positions, fresh = self._stored_positions(draws)
        if isinstance(self._encode, TextObjective):
            items = self._items(_listed(draws, fresh))
            positions[fresh] = [0 if item is None else item.example.positions for item in items]
            return positions
        for source in np.unique(draws.source[fresh]).tolist():
            own = fresh[draws.source[fresh] == source]
            size = len(list(self._conversations.values())[source])
            known = self._known.setdefault(source, np.full(size, -1, np.int32))
            new = np.unique(draws.example[own][known[draws.example[own]] < 0])
            items = self._items([Draw(source, 0, example) for example in new.tolist()])
            known[new] = [0 if item is None else item.example.positions for item in items]
            positions[own] = known[draws.example[own]]
        return positions

    def _stored_positions(self, draws: Draws) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """(int32[n] with the positions of stored examples, the places of the others)."""
        positions = np.zeros(len(draws.source), np.int32)
        for source, store in self._stores.items():
            own = np.flatnonzero(draws.source == source)
            positions[own] = store.positions(draws.example[own])
        return positions, np.flatnonzero(~self._stored[draws.source])

    def _read(self, source: int, index: int) -> Item:
        name, example = self._stores[source].read(index)
        return Item(source, name, example, int(np.count_nonzero(example.weights[1:])))

    def _items(self, draws: Sequence[Draw]) -> list[Item | None]:
        """The drawn examples, encoded together as far as they are not in the cache."""
        if not draws:
            return []
        if isinstance(self._encode, TextObjective):
            return encode_draws(self._encode, self._conversations, draws, self._seed)
        keys = [(draw.source, draw.example) for draw in draws]
        items = {key: self._cache[key] for key in keys if key in self._cache}
        new = [key for key in dict.fromkeys(keys) if key not in items]
        encoded = encode_draws(self._encode, self._conversations, [Draw(s, 0, i) for s, i in new])
        for key, item in zip(new, encoded):
            items[key] = item
            size = 500 if item is None else 500 + item.example.ids.nbytes + item.example.weights.nbytes
            if size <= self._room:
                self._room -= size
                self._cache[key] = item
        return [items[key] for key in keys]


def _listed(draws: Draws, places: npt.NDArray[np.int64]) -> list[Draw]:
    return [Draw(*numbers) for numbers in zip(*(array[places].tolist() for array in draws))]


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
