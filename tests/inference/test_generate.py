"""Generation with a cache gives what whole passes without one give, however rows are batched, padded or streamed."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator, _decode, _prefill
from easylm_plus.inference.sampling import Sampling
from easylm_plus.models.families import preset
from easylm_plus.models.transformer import Transformer, abstract_parameters, unstack_layers
from easylm_plus.numerics.precision import POLICIES

SMALL = preset("debug", vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8, max_length=20)
PROMPTS = [[5, 9, 2], [1, 33, 60, 12, 12, 7, 48, 21, 3], [17, 17, 40, 8, 55, 31]]
LENGTHS = np.asarray([len(prompt) for prompt in PROMPTS])
MORE = np.random.default_rng(0).integers(0, 64, (3, 6))  # tokens that follow the prompts, whatever the model says
SLOTS = 12


@functools.cache
def model_of(scan=True, policy="float32", **keys):
    return Transformer(dataclasses.replace(SMALL, scan_layers=scan, **keys), POLICIES[policy])


@functools.cache
def parameters(scan=True):
    rng, (shapes, _) = np.random.default_rng(0), abstract_parameters(model_of())
    draw = lambda path, leaf: rng.normal(path[-1].key == "weight", 0.2, leaf.shape).astype(np.float32)
    stacked = jax.tree.map_with_path(draw, shapes)
    return stacked if scan else unstack_layers(stacked)


def whole_passes(model, params):
    """Logits [3, 1 + N, V] after each prompt and after each of MORE, without any cache or padding in sight."""
    rows = [prompt + more.tolist() for prompt, more in zip(PROMPTS, MORE)]
    tokens = np.asarray([row + [0] * (15 - len(row)) for row in rows])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    return np.stack([row[n - 1 : n + MORE.shape[1]] for row, n in zip(logits, LENGTHS)])


def step_by_step(model, params, segments_of=lambda s: s, positions_of=lambda p: p):
    """The same with a cache, prompts padded on the left."""
    tokens, segments = np.zeros((2, 3, SLOTS), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, SLOTS - len(prompt) :] = prompt
        segments[row, SLOTS - len(prompt) :] = 1
    prefill = jax.jit(functools.partial(_prefill, model), static_argnames="slots")
    decode = jax.jit(functools.partial(_decode, model))
    logits, cache = prefill(params, tokens, segments_of(segments), slots=SLOTS + MORE.shape[1])
    steps = [logits]
    for n, token in enumerate(MORE.T):
        logits, cache = decode(params, cache, token.astype(np.int32), positions_of(LENGTHS + n))
        steps.append(logits)
    return np.stack(steps, axis=1), cache


@pytest.mark.parametrize("keys", ({"scan": True}, {"scan": False}, {"sliding_window": 4}), ids=str)
def test_every_step_with_a_cache_equals_the_whole_pass(keys):
    model, params = model_of(**keys), parameters(keys.get("scan", True))
    expected = whole_passes(model, params)
    actual, cache = step_by_step(model, params)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert cache.length == SLOTS + MORE.shape[1]
    np.testing.assert_array_equal((cache.segments_BS > 0).sum(1), LENGTHS + MORE.shape[1])


@pytest.mark.parametrize(
    ("keys", "wrong"),
    (
        ({"sliding_window": 4}, {}),
        ({}, {"segments_of": np.ones_like}),
        ({}, {"positions_of": lambda p: p + 1}),
    ),
    ids=("without the window", "padding seen", "positions off by one"),
)
def test_a_wrong_cache_is_noticed(keys, wrong):
    actual, _ = step_by_step(model_of(), parameters(), **wrong)
    assert np.abs(actual - whole_passes(model_of(**keys), parameters())).max() > 1e-2


def test_a_prompt_in_two_parts_equals_the_whole():
    """More than one query on a cache that already holds something."""
    model, tokens = model_of(), MORE
    with_cache = jax.jit(lambda tokens, cache: model.apply({"params": parameters()}, tokens, None, None, cache))
    first, cache = with_cache(tokens[:, :2], model.init_cache(3, 8))
    second, _ = with_cache(tokens[:, 2:], cache)
    expected = jax.jit(model.apply)({"params": parameters()}, tokens)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, rtol=0, atol=1e-5)


def test_a_bfloat16_cache():
    model = model_of(policy="bf16_pure")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters())
    actual, cache = step_by_step(model, params)
    assert cache.layers.k.dtype == cache.layers.v.dtype == jnp.bfloat16
    assert actual.dtype == jnp.float32
    error = np.abs(actual - whole_passes(model_of(), parameters())).max()
    assert 1e-3 < error < 0.3  # of logits up to 8


# --- the generator ---


@functools.cache
def generator(stop_ids=()):
    return Generator(model_of(), parameters(), stop_ids)


def test_a_batch_equals_its_rows_and_their_streams():
    together = generator()(PROMPTS, 10)
    assert [len(row) for row in together] == [10, 10, 10]
    assert len({tuple(row) for row in together}) == 3
    for prompt, expected in zip(PROMPTS, together):
        assert generator()([prompt], 10) == [expected]
        assert list(generator().stream(prompt, 10)) == expected


def test_rows_end_before_their_stop_token():
    free = generator()(PROMPTS, 10)
    stops = (free[0][3], free[1][0])
    expected = [row[: next((n for n, token in enumerate(row) if token in stops), 10)] for row in free]
    assert len(expected[0]) <= 3 and expected[1] == []
    assert generator(stops)(PROMPTS, 10) == expected
    assert [list(generator(stops).stream(prompt, 10)) for prompt in PROMPTS] == expected


def test_a_seed_is_a_sample():
    hot = Sampling(temperature=1.0)
    first = generator()(PROMPTS, 10, hot, seed=1)
    assert generator()(PROMPTS, 10, hot, seed=1) == first
    assert generator()(PROMPTS, 10, hot, seed=2) != first
    assert first != generator()(PROMPTS, 10)
    assert list(generator().stream(PROMPTS[1], 10, hot, seed=3)) == generator()(PROMPTS[1:2], 10, hot, seed=3)[0]


def test_a_stream_compiles_nothing_after_its_first_tokens(caplog):
    tokens = generator().stream(PROMPTS[0], 10)
    for _ in range(3):
        next(tokens)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        list(tokens)
    assert not [record.message for record in caplog.records if record.message.startswith("Finished XLA compilation")]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(1)
    assert [record.message for record in caplog.records if record.message.startswith("Finished XLA compilation")]


@pytest.mark.parametrize(
    ("prompts", "message"),
    (
        ([[1], [1] * 20], "a prompt of 20 tokens leaves no room in the model's 20"),
        ([[1] * 99], "a prompt of 99 tokens leaves no room in the model's 20"),
        ([[1], []], "an empty prompt: expected at least one token"),
    ),
)
def test_prompts_that_cannot_be_continued(prompts, message):
    with pytest.raises(UserError, match=message):
        generator()(prompts, 5)
    with pytest.raises(UserError, match=message):
        list(generator().stream(prompts[-1], 5))


def test_rows_end_with_the_models_length_each_on_its_own():
    prompts = [PROMPTS[0], [1, 2, 3, 4] * 4, PROMPTS[1]]
    alone = [generator()([prompt], 10)[0] for prompt in prompts]
    assert [len(row) for row in alone] == [10, 4, 10]
    assert generator()(prompts, 10) == alone


def test_no_prompts_no_answers():
    assert generator()([], 5) == []
