"""Generation with a key-value cache: a whole batch in one compiled loop, or one row token by token.

Prompts of different lengths are padded on the left, so that all rows write the same cache slot; padding is segment
0, which nothing attends to, and positions count from each row's first real token. Prompt lengths are rounded up, so
that few shapes are ever compiled.

Legend: B batch, P padded prompt length, N new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.inference.sampling import GREEDY, Sampling, checked, sample
from easylm_plus.models.transformer import Cache, Transformer

ROUND = 32  # prompts are padded to a multiple of this


class Generator:
    """Continues token sequences with one model.

    Args:
      stop_ids: tokens that end a row; they are not part of the result.
    """

    def __init__(self, model: Transformer, params: Any, stop_ids: Sequence[int]):
        self.model, self.params = model, params
        self._stop = np.asarray(sorted(set(stop_ids)), np.int32)
        self._prefill = jax.jit(partial(_prefill, model), static_argnames="slots")
        self._decode = jax.jit(partial(_decode, model), donate_argnums=1)
        self._loop = jax.jit(partial(_loop, model), static_argnames="count")
        self._sample = jax.jit(sample)  # outside a jit, its `cond` would be compiled anew for every token

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> list[list[int]]:
        """The continuation of each prompt in one batch: at most `max_new_tokens`, and what the model's length holds."""
        if not prompts:
            return []
        tokens, segments, room = self._padded(prompts)
        count = min(max_new_tokens, max(room))
        logits, cache = self._prefill(self.params, tokens, segments, slots=tokens.shape[1] + count)
        key = jax.random.key(seed)
        out_BN = self._loop(
            self.params, cache, logits, segments.sum(1), key, checked(sampling), self._stop, count=count
        )
        return [self._until_stop(row[:most]) for row, most in zip(np.asarray(out_BN), room)]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[int]:
        """Yields the tokens of one continuation as they are made; the same ones that `__call__` returns."""
        tokens, segments, room = self._padded([prompt])
        count = min(max_new_tokens, room[0])
        logits, cache = self._prefill(self.params, tokens, segments, slots=tokens.shape[1] + count)
        key, options = jax.random.key(seed), checked(sampling)
        for n in range(count):
            token = self._sample(logits, jax.random.fold_in(key, n), options)
            if int(token[0]) in self._stop:
                return
            yield int(token[0])
            logits, cache = self._decode(self.params, cache, token, jnp.asarray([len(prompt) + n]))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(tokens int32[B, P], segments int32[B, P], new tokens that fit by row); 0 on the left of shorter prompts."""
        longest = max(map(len, prompts))
        limit = self.model.config.max_length
        if min(map(len, prompts)) == 0:
            raise UserError("an empty prompt: expected at least one token, as the begin-of-sequence token")
        if longest >= limit:
            raise UserError(f"a prompt of {longest} tokens leaves no room in the model's {limit}")
        P = -(-longest // ROUND) * ROUND
        tokens, segments = np.zeros((2, len(prompts), P), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, P - len(prompt) :] = prompt
            segments[row, P - len(prompt) :] = 1
        return tokens, segments, [limit - len(prompt) for prompt in prompts]

    def _until_stop(self, row: np.ndarray) -> list[int]:
        ends = np.flatnonzero(np.isin(row, self._stop))
        return row[: ends[0]].tolist() if ends.size else row.tolist()


def _prefill(
    model: Transformer, params: Any, tokens_BP: jax.Array, segments_BP: jax.Array, slots: int
) -> tuple[jax.Array, Cache]:
    """(logits after each prompt [B, V], the cache that holds it)."""
    positions = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
    cache = model.init_cache(tokens_BP.shape[0], slots)
    out: Any = model.apply({"params": params}, tokens_BP, positions, segments_BP, cache, method="hidden")
    return _last_logits(model, params, out[0]), out[1]


def _decode(
    model: Transformer, params: Any, cache: Cache, token_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """One more token a row -> (logits [B, V], cache)."""
    args = (token_B[:, None], position_B[:, None], jnp.ones_like(token_B)[:, None], cache)
    out: Any = model.apply({"params": params}, *args, method="hidden")
    return _last_logits(model, params, out[0]), out[1]


def _last_logits(model: Transformer, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Only the last position is unembedded: a prompt's logits [B, P, V] are of no use."""
    logits: Any = model.apply({"params": params}, x_BTD[:, -1], method="head")
    return logits


def _loop(
    model: Transformer, params: Any, cache: Cache, logits_BV: jax.Array, lengths_B: jax.Array, key: jax.Array,
    sampling: Sampling, stop: jax.Array, count: int,
) -> jax.Array:  # fmt: skip
    """Decodes until all rows have stopped, or `count` tokens -> int32[B, count], stop tokens after the end."""
    B = logits_BV.shape[0]
    out = jnp.full((B, count), stop[0] if stop.size else 0, jnp.int32)

    def unfinished(carry: Any) -> jax.Array:
        n, _, _, done, _ = carry
        return (n < count) & ~done.all()

    def body(carry: Any) -> Any:
        n, logits, cache, done, out = carry
        token = sample(logits, jax.random.fold_in(key, n), sampling)
        done = done | jnp.isin(token, stop)
        out = out.at[:, n].set(jnp.where(done & (stop.size > 0), out[:, n], token))
        logits, cache = _decode(model, params, cache, token, lengths_B + n)
        return n + 1, logits, cache, done, out

    start = (jnp.zeros((), jnp.int32), logits_BV, cache, jnp.zeros(B, bool), out)
    return jax.lax.while_loop(unfinished, body, start)[4]
