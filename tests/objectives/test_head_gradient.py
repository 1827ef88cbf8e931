"""The gradient of a head of bfloat16 parameters is summed over the chunks of the loss in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.numerics import handles
from easylm_plus.numerics.stored import Copy
from easylm_plus.numerics.verbs import project
from easylm_plus.objectives import cross_entropy
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

ROWS, LENGTH, D, V, CHUNK = 8, 512, 16, 24, 4
TARGET = 3
HALF_A_STEP = 2.0**-9  # the largest relative error of rounding to bfloat16
FLOAT32_SUM = 2.0**-24 * ROWS * LENGTH / CHUNK  # of adding up as many chunks in float32


def case():
    """(x[D], head[D, V]) in bfloat16: all tokens have one hidden state and one target, so all chunks add the same."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)
    return draw(0, D), draw(1, D, V)


def wanted():
    """float64[D, V]: the gradient of the mean loss, from its formula x (softmax(x W) - onehot)."""
    x_D, w_DV = (np.asarray(a, np.float64) for a in case())
    p_V = np.exp(x_D @ w_DV) / np.exp(x_D @ w_DV).sum()
    return np.outer(x_D, p_V - (np.arange(V) == TARGET))


def error(dtype, sizes):
    """The largest relative error of the gradient by a head whose parameters have this dtype."""
    x_D, w_DV = case()
    x_BTD, targets = jnp.broadcast_to(x_D, (ROWS, LENGTH, D)), jnp.full((ROWS, LENGTH), TARGET)
    weights = jnp.full((ROWS, LENGTH), 1 / targets.size)
    # the product is in float32 for all dtypes: what differs is how its gradients are added up
    head = lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32)
    loss = lambda w: cross_entropy.blocked_cross_entropy(head, w, x_BTD, targets, weights, 0 * weights, CHUNK)[0]
    with sharding.use(make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])):
        found = jax.jit(jax.grad(loss))(w_DV.astype(dtype))
    assert found.dtype == dtype
    return np.max(np.abs(np.asarray(found, np.float64) / wanted() - 1))


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 8}], ids=str)
def test_chunks_are_summed_in_float32(sizes):
    """A chunk's share is rounded to bfloat16 by the head's own backward pass, and the sum once more."""
    assert error(jnp.float32, sizes) <= 2 * FLOAT32_SUM
    assert error(jnp.bfloat16, sizes) <= 2 * HALF_A_STEP + FLOAT32_SUM


def test_a_sum_in_bfloat16_is_seen(monkeypatch):
    """On one device: the compiler for CPUs aborts at a bfloat16 sum over devices within a manual region."""
    monkeypatch.setattr(jnp, "promote_types", lambda kind, least: kind)  # a running sum in the parameters' dtype
    assert error(jnp.float32, {"fsdp": 1}) <= 2 * FLOAT32_SUM
    assert error(jnp.bfloat16, {"fsdp": 1}) > 0.2


def scans(jaxpr):
    """The loops of a traced function, wherever they are in it."""
    within = [v.jaxpr for e in jaxpr.eqns for v in e.params.values() if hasattr(v, "jaxpr")]
    return [e for e in jaxpr.eqns if e.primitive.name == "scan"] + [e for inner in within for e in scans(inner)]


def test_a_head_that_is_a_copy_has_one_sum():
    """That of its handle; its value, which is not learned, has none."""
    x_D, w_DV = case()
    x_BTD, targets = jnp.broadcast_to(x_D, (ROWS, LENGTH, D)), jnp.full((ROWS, LENGTH), TARGET)
    weights = jnp.full((ROWS, LENGTH), 1 / targets.size)

    def gradient(head):
        loss = lambda h: cross_entropy.blocked_cross_entropy(
            lambda w, x: project(x, w["head"]).astype(jnp.float32),
            handles.held(head, h),
            x_BTD,
            targets,
            weights,
            0 * weights,
            CHUNK,
        )[0]
        return jax.grad(loss)

    def sums(head):
        """How many arrays of the head's shape the loop over chunks carries."""
        (scan,) = scans(jax.make_jaxpr(gradient(head))(handles.handles(head)).jaxpr)
        return sum(v.aval.shape == (D, V) for v in scan.outvars)

    plain, copy = {"head": w_DV}, {"head": Copy(w_DV)}
    found, wanted = (jax.jit(gradient(head))(handles.handles(head))["head"] for head in (copy, plain))
    np.testing.assert_array_equal(found, wanted)
    assert sums(copy) == sums(plain) == 1
