"""GELU is what its paper says, and is not written in the way that keeps XLA:GPU from emitting FP8 products."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from easylm_plus.models.feedforward import ACTIVATIONS


def test_gelu_tanh_is_that_of_the_paper_without_a_tanh():
    """Against float64; a float32 is off by a few units in the last place of values up to 12."""
    gelu, usual = ACTIVATIONS["gelu_tanh"], lambda x: nn.gelu(x, approximate=True)
    x = np.linspace(-12, 12, 4001)
    root = np.sqrt(2 / np.pi)
    t = np.tanh(root * (x + 0.044715 * x**3))
    value, slope = x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t * t) / 2 * root * (1 + 3 * 0.044715 * x**2)
    x32 = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(gelu(x32), value, rtol=0, atol=3e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x32), slope, rtol=0, atol=3e-6)
    assert np.abs(nn.gelu(x32, approximate=False) - value).max() > 2e-4, "the exact one is another"
    text = lambda f: jax.jit(jax.value_and_grad(lambda x: f(x).sum())).lower(x32).as_text()
    assert "tanh" in text(usual) and "tanh" not in text(gelu)
