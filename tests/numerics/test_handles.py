"""Weights that are stored otherwise than they are learned: what is differentiated in their place, what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_fp8 import codes, leaf, sqnr

from easylm_plus.numerics import handles
from easylm_plus.numerics.formats import E4M3, FORMATS, FP16, Scaled, decode, encode
from easylm_plus.numerics.fp8 import Fp8Handle
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.stored import Copy
from easylm_plus.numerics.ternary import Ternary
from easylm_plus.numerics.verbs import dense, lookup, project, project_grouped, settle, unembed

D, F, E, M = 16, 32, 3, 12
KEYS = jax.random.split(jax.random.key(0), 6)
W_DF, W_EDF = jax.random.normal(KEYS[0], (D, F)), jax.random.normal(KEYS[1], (E, D, F))
X = jax.random.normal(KEYS[2], (M, D))
GROUPS = Groups(jnp.array([5, 0, 7], jnp.int32))
USES = {  # a verb, and the array that it multiplies by
    "project": (lambda w: project(X, w), W_DF),
    "lookup": (lambda w: lookup(jnp.array([[3, 0, 3]]), w, jnp.float32), W_DF),
    "unembed": (lambda w: unembed(jnp.tile(X, 2), w), W_DF),
    "dense": (lambda w: dense(w) * 2, W_DF),
    "settle": (lambda w: dense(settle(w)) * 2, W_EDF),
    "project_grouped": (lambda w: project_grouped(X, w, GROUPS), W_EDF),
}
ALL_USES = pytest.mark.parametrize(("use", "w"), USES.values(), ids=USES)


def learned(view, loss):
    """(gradients, observations) of loss(view)."""
    cotangents = jax.jit(jax.grad(lambda h: loss(handles.held(view, h))))(handles.handles(view))
    return handles.gradients(cotangents), handles.observations(cotangents)


def loss_of(use, dy=1.0):
    """A loss with an uneven gradient of the output, `dy` of about 1."""

    def loss(w):
        y = use(w)
        return dy * (y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)).sum()

    return loss


# --- the contract ---


def test_an_array_is_its_own_handle():
    view = {"a": W_DF, "b": {"c": X}}
    assert handles.handles(view)["b"]["c"] is X and handles.held(view, {"a": 1, "b": {"c": 2}}) == {
        "a": 1,
        "b": {"c": 2},
    }
    gradients, seen = learned(view, lambda v: (v["a"] * 2).sum())
    assert (gradients["a"] == 2).all() and (gradients["b"]["c"] == 0).all() and seen == {}


def test_typed_leaves_in_a_tree():
    """Handles go in, gradients come out in their places; what was measured comes by the name of the weight."""
    view = {
        "layers": {"up": leaf(W_DF), "down": Copy(encode(W_DF, FP16)), "odd": Copy(W_DF, narrow=True)},
        "norm": X[0],
    }
    held = handles.held(view, handles.handles(view))
    assert isinstance(held["layers"]["up"].handle, Fp8Handle) and view["layers"]["up"].handle is None
    use = lambda v: sum(loss_of(lambda w: project(X, w))(w) for w in v["layers"].values()) + v["norm"].sum()
    gradients, seen = learned(view, use)
    assert {name: type(g) is Scaled for name, g in gradients["layers"].items()} == {
        "up": True,
        "down": False,
        "odd": True,
    }
    assert sorted(seen) == ["layers/odd", "layers/up"] and seen["layers/up"].shape == (3, 3)
    exact = jax.grad(loss_of(lambda w: project(X, w)))(W_DF)
    assert sqnr(gradients["layers"]["down"], exact) > 100
    assert sqnr(decode(gradients["layers"]["odd"]), exact) > 30
    assert sqnr(decode(gradients["layers"]["up"]), exact) > 20
    assert (gradients["norm"] == 1).all()
    assert seen["layers/odd"][2, 0] == pytest.approx(float(jnp.abs(exact).max()), rel=1e-6)


# --- weights kept in fewer bits ---


@ALL_USES
@pytest.mark.parametrize("name", ("fp16", "e4m3", "bf16"))
def test_codes_multiply_as_what_they_stand_for(use, w, name):
    """As kept, and as a step's copy of it."""
    kept = encode(w, FORMATS[name])
    expected = use(decode(kept).astype(jnp.float32))
    np.testing.assert_array_equal(use(Copy(kept)), expected.astype(use(Copy(kept)).dtype))
    if isinstance(kept, Scaled) and use not in (USES["lookup"][0], USES["unembed"][0]):
        np.testing.assert_array_equal(use(kept), expected)
    assert (decode(kept).astype(jnp.float32) != w).any()


@ALL_USES
def test_the_gradient_of_a_copy_is_that_of_the_array_it_stands_for(use, w):
    """In float32: the master has 16 bits, and what is smaller than 2^-24 of 1 would be 0 in them."""
    tiny = 2.0**-60
    kept = encode(w, FP16)
    gradient, _ = learned(Copy(kept), loss_of(use, tiny))
    expected = jax.grad(loss_of(use, tiny))(decode(kept))
    assert gradient.dtype == jnp.float32
    assert sqnr(gradient, expected) > 100
    through_codes = jax.grad(lambda code: loss_of(use, tiny)(code.astype(jnp.float32) * 1.0))(w.astype(jnp.float16))
    assert (through_codes == 0).all() and (gradient != 0).any()


@ALL_USES
def test_the_gradient_of_a_narrow_copy_is_in_e4m3(use, w):
    """With the scale of its matrix, one an expert; codes are those of the gradient."""
    kept = encode(w, FP16)
    gradient, seen = learned({"w": Copy(kept, narrow=True)}, lambda v: loss_of(use)(v["w"]))
    expected = encode(jax.grad(loss_of(use))(decode(kept)), E4M3)
    assert gradient["w"].scale_inv.shape == w.shape[:-2]
    np.testing.assert_array_equal(gradient["w"].scale_inv, expected.scale_inv)
    assert (codes(gradient["w"].code) != codes(expected.code)).mean() < 0.01
    assert seen["w"].shape == (*w.shape[:-2], 3, 3)


def test_two_uses_of_a_narrow_copy_are_no_gradient():
    """As with FP8 products (test_fp8); a float32 gradient is a sum like any other."""
    twice = lambda w: loss_of(lambda w: project(X, w))(w) + loss_of(lambda w: project(2 * X, w))(w)
    narrow, _ = learned(Copy(W_DF, narrow=True), twice)
    assert jnp.isnan(decode(narrow)).all()
    wide, _ = learned(Copy(encode(W_DF, FP16)), twice)
    assert sqnr(wide, jax.grad(twice)(W_DF)) > 100


@pytest.mark.parametrize("narrow", (False, True))
def test_a_ternary_weight_learns_through_its_copy(narrow):
    """Straight through, as an array does: the gradient of the latent is that of the rounded weight."""
    kept = encode(W_DF, FP16)
    gradient, seen = learned(
        {"w": Ternary(Copy(kept, narrow=narrow))}, lambda v: loss_of(lambda w: project(X, w))(v["w"])
    )
    expected = jax.grad(lambda w: loss_of(lambda w: project(X, Ternary(w)))(w))(decode(kept))
    (found,) = jax.tree.leaves(gradient, is_leaf=lambda x: isinstance(x, Scaled))
    assert isinstance(found, Scaled) == narrow and len(seen) == narrow
    assert sqnr(decode(found), expected) > (30 if narrow else 100)


@pytest.mark.parametrize("value", (jnp.inf, jnp.nan))
def test_a_gradient_that_is_none_is_nan(value):
    """A cast would saturate it, and the step would count."""
    narrow, seen = learned({"w": Copy(W_DF, narrow=True)}, lambda v: (project(X, v["w"])[0, 0] * value).sum())
    assert jnp.isnan(decode(narrow["w"])).all() and seen["w"][2, 0] == jnp.inf


def test_without_a_handle_nothing_is_learned():
    kept = Copy(encode(W_DF, FP16), narrow=True)
    gradient = jax.grad(lambda x: project(x, kept).sum())(X)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(decode(kept.value).sum(1), X.shape), rtol=1e-5)
