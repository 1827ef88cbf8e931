"""The ternary leaf against what Hugging Face's BitNet rounds to, and its gradients against the rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.errors import UserError
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.models import moe
from easylm_plus.models.transformer import abstract_parameters, unstack_layers
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.rules import BITNET, attach
from easylm_plus.numerics.ternary import Ternary, int8_activation, ternary_weight
from easylm_plus.numerics.verbs import dense, project, project_grouped
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

FOLDER = tiny.ROOT / "tests/golden/bitnet_tiny"


@functools.cache
def golden():
    with np.load(FOLDER / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded():
    return load_hf(FOLDER)


def first_query():
    return loaded()[1]["layers"]["self_attn"]["q_proj"]["kernel"][0]


def test_weights_and_activations_of_the_first_query_projection():
    np.testing.assert_allclose(ternary_weight(first_query()).T, golden()["l0_q_weight_quant"], rtol=1e-6)
    rounded = int8_activation(golden()["l0_q_proj_in"])
    np.testing.assert_allclose(rounded, golden()["l0_q_act_quant"], rtol=1e-6, atol=1e-7)
    y = jax.jit(project)(golden()["l0_q_proj_in"], Ternary(first_query()))
    np.testing.assert_allclose(y, golden()["l0_q_proj_out"], rtol=0, atol=1e-5)
    plain = project(golden()["l0_q_proj_in"], first_query())
    assert np.abs(plain - golden()["l0_q_proj_out"]).max() > 0.1


def test_there_are_three_values_and_a_tie_goes_to_the_even_one():
    w = jnp.asarray([[1.0, -1.0], [0.5, 1.5]])  # mean |w| is 1
    np.testing.assert_array_equal(ternary_weight(w), [[1, -1], [0, 1]])
    np.testing.assert_array_equal(ternary_weight(jnp.zeros((2, 2))), np.zeros((2, 2)))
    assert len(np.unique(ternary_weight(first_query()))) == 3
    usual = lambda w: w + jax.lax.stop_gradient(ternary_weight(w) - w)
    assert any(len(np.unique(usual(factor * first_query()))) > 3 for factor in (1.0, 1.3, 1.7))


def test_gradients_pass_straight_through():
    """dW = x~' dy and dx = dy W~', also where an activation or a weight was clipped."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 8), (8, 6), (5, 6)))
    _, pull = jax.vjp(project, jnp.asarray(x), Ternary(jnp.asarray(w)))
    dx, dw = pull(jnp.asarray(dy))
    np.testing.assert_allclose(dw.latent, np.asarray(int8_activation(x)).T @ dy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, dy @ np.asarray(ternary_weight(w)).T, rtol=1e-5, atol=1e-6)
    clipped = np.abs(w) > 1.5 * np.abs(w).mean()
    assert clipped.any() and np.abs(dw.latent)[clipped].min() > 0


def test_a_scale_for_each_matrix_of_a_stack():
    stack = jnp.stack([first_query(), 10 * first_query()])
    both = dense(Ternary(stack))
    np.testing.assert_allclose(both[1], 10 * both[0], rtol=1e-6)
    x = jnp.asarray(golden()["l0_q_proj_in"][0])
    groups = Groups(jnp.asarray([8, 16]), tile=8, implementation="tiled")
    rows = project_grouped(x, Ternary(stack), groups)
    np.testing.assert_allclose(rows[:8], project(x[:8], Ternary(first_query())), rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows[8:], 10 * project(x[8:], Ternary(first_query())), rtol=1e-5, atol=1e-5)


def test_rules_turn_what_they_name():
    params = attach(loaded()[1], BITNET)
    kinds = jax.tree_util.tree_map(
        lambda leaf: isinstance(leaf, Ternary), params, is_leaf=lambda leaf: isinstance(leaf, Ternary)
    )
    inner = kinds["layers"]
    assert all(inner["self_attn"][f"{p}_proj"]["kernel"] for p in "qkvo")
    assert all(inner["mlp"][f"{p}_proj"]["kernel"] for p in ("gate", "up", "down"))
    assert not (kinds["embed_tokens"]["embedding"] or kinds["lm_head"]["kernel"] or kinds["norm"]["weight"])
    assert sum(jax.tree.leaves(kinds)) == 7


@pytest.mark.parametrize(
    ("rule", "message"),
    [("layers/.*/wrong=ternary", "matches no weight"), ("lm_head=ternary", "matches no weight"),
     ("norm=ternary", "matches no weight"),
     ("layers=fp9", "expected 'regular expression=transform' with one of plain, ternary"),
     ("layers", "found 'layers', expected"), ("(=ternary", "not a regular expression")],
)  # fmt: skip
def test_a_rule_that_does_nothing_is_an_error(rule, message):
    with pytest.raises(UserError, match=message):
        attach(loaded()[1], (rule,))


def test_the_first_rule_that_matches_decides():
    params = attach(loaded()[1], ("q_proj=plain", r"layers/\*/self_attn/.*_proj=ternary"))
    attention = params["layers"]["self_attn"]
    assert isinstance(attention["k_proj"]["kernel"], Ternary) and not isinstance(attention["q_proj"]["kernel"], Ternary)


def test_one_rule_serves_stacked_and_unrolled_layers_and_a_number_serves_one():
    count = lambda params, *rules: sum(
        isinstance(leaf, Ternary)
        for leaf in jax.tree.leaves(attach(params, rules), is_leaf=lambda leaf: isinstance(leaf, Ternary))
    )
    stacked, unrolled = loaded()[1], unstack_layers(loaded()[1])
    assert count(stacked, "layers/.*/mlp=ternary") == 3 and count(unrolled, "layers/.*/mlp=ternary") == 6
    assert count(unrolled, "layers/1/mlp=ternary") == 3


def test_ternary_experts_on_a_mesh(monkeypatch):
    """Scales are those of the whole matrix and of the whole token also where each device has a part of them."""
    model, params = tiny.model(vocab=50, num_experts=4, scan_layers=True, intermediate_size=16)
    experts = params["layers"]["mlp"]["experts"]
    experts |= jax.tree.map(lambda x: x * jnp.arange(1.0, 1 + x.shape[-1]), experts)  # columns of different sizes
    batch, objective = tiny.random_batch(8, 8, 50), LanguageModel(model, 2, chunk=16)
    share = lambda params: objective(attach(params, ("experts=ternary",)), batch, objective.denominators(batch))[0]
    loss, gradients = jax.jit(jax.value_and_grad(share))(params)
    mesh = make_mesh({"expert": 2, "tensor": 4})
    with sharding.use(mesh, sharding.rules_for(mesh, 4, 2)):
        shapes, axes = abstract_parameters(model)
        placed = jax.device_put(params, sharding.shardings(axes, shapes, mesh))
        other, others = jax.jit(jax.value_and_grad(share))(placed)
        monkeypatch.setattr(moe, "settle", lambda w: w)  # each device rounds by its own part
        apart = jax.jit(lambda params: share(params))(placed)
    assert float(other) == pytest.approx(float(loss), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, others)
    assert abs(float(apart) - float(loss)) > 1e-3
