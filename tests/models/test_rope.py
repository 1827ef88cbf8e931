"""Rotary positions: the frequencies are Hugging Face's, the rotation is the paper's, in the half-split layout."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.errors import UserError
from easylm_plus.interop.huggingface import read_config
from easylm_plus.models.families import preset
from easylm_plus.models.rope import frequencies, rotate, rotations

GOLDEN = Path(__file__).parents[1] / "golden"


def turned(x, positions, config):
    return np.asarray(rotate(jnp.asarray(x), *rotations(jnp.asarray(positions), config)))


@pytest.mark.parametrize("name", ("llama_tiny", "llama3_tiny", "qwen2_tiny"))
def test_frequencies_are_hugging_faces(name):
    with np.load(GOLDEN / name / "golden.npz") as golden:
        expected = golden["rope_inv_freq"]
    np.testing.assert_allclose(frequencies(read_config(GOLDEN / name)), expected, rtol=1e-6)
    unscaled = frequencies(read_config(GOLDEN / name, rope_scaling="none"))
    assert np.allclose(unscaled, expected, rtol=1e-6) == (name != "llama3_tiny")


def test_rotation_is_multiplication_by_a_complex_number():
    config = preset("debug", rope_theta=50.0)
    x = np.random.default_rng(0).normal(size=(2, 5, 3, config.head_dim)).astype(np.float32)
    positions = np.asarray([[0, 1, 2, 3, 4], [7, 8, 0, 1, 1000]])
    half = config.head_dim // 2
    angle = positions[..., None, None] * 50.0 ** -(np.arange(half) / half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    actual = turned(x, positions, config)
    np.testing.assert_allclose(actual, np.concatenate([pairs.real, pairs.imag], axis=-1), rtol=0, atol=2e-4)
    np.testing.assert_array_equal(actual[0, 0], x[0, 0])  # position 0 is left alone
    neighbours = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)  # Meta's layout
    wrong = np.stack([neighbours.real, neighbours.imag], axis=-1).reshape(x.shape)
    assert np.abs(actual - wrong).max() > 1


def test_scores_depend_on_the_distance_only():
    config = preset("debug")
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, config.head_dim)).astype(np.float32)
    score = lambda t, s: float((turned(q, [[t]], config) * turned(k, [[s]], config)).sum())
    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_linear_scaling_divides_positions():
    plain, scaled = preset("debug"), preset("debug", rope_scaling="linear", rope_factor=4.0)
    np.testing.assert_allclose(frequencies(scaled) * 4, frequencies(plain), rtol=1e-6)


def test_ntk_scaling_stretches_the_slowest_pair_only():
    plain, scaled = preset("debug"), preset("debug", rope_scaling="ntk", rope_factor=4.0)
    ratio = frequencies(plain) / frequencies(scaled)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(4.0, rel=1e-5) and (np.diff(ratio) > 0).all()


def test_an_odd_head_cannot_be_turned():
    with pytest.raises(UserError, match=r"model\.head_dim = 15"):
        preset("debug", head_dim=15)


def test_result_has_the_dtype_of_its_input():
    config = preset("debug")
    x = jnp.ones((1, 2, 1, config.head_dim), jnp.bfloat16)
    assert rotate(x, *rotations(jnp.asarray([[0, 1]]), config)).dtype == jnp.bfloat16
