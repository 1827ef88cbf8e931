"""AdamW against the same formulas in float64: bias correction, which weights decay, clipping by the global norm. And
the contract of optimizers: FP8 gradients, and steps that do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm_plus.config import base, model_config
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.numerics.formats import E4M3, FP16, decode, encode
from easylm_plus.training.optimizer import adamw, decay_mask, from_optax, global_norm, is_scaled
from easylm_plus.training.scaled_adam import scaled_adamw
from easylm_plus.training.schedules import weight_decay
from easylm_plus.tree import path_name

RATE, B1, B2, EPS, DECAY, CLIP, STEPS = 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 12
SHAPES = {
    "embed_tokens/embedding": (7, 4),
    "layers/q_proj/kernel": (2, 4, 6),
    "layers/q_proj/bias": (2, 6),
    "norm/weight": (4,),
}


def reference(params, gradients, corrected=True, decays=("kernel", "embedding"), clip="global"):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) in float64, with what could be wrong as options."""
    params = {name: x.astype(np.float64) for name, x in params.items()}
    m, v = ({name: np.zeros_like(x) for name, x in params.items()} for _ in "mv")
    for t, grads in enumerate(gradients, start=1):
        norms = {name: np.sqrt(np.sum(g.astype(np.float64) ** 2)) for name, g in grads.items()}
        whole = np.sqrt(sum(n**2 for n in norms.values()))
        for name, g in grads.items():
            norm = {"global": whole, "each": norms[name], "none": 0.0}[clip]
            g = g.astype(np.float64) * min(1.0, CLIP / max(norm, 1e-12))
            m[name] = B1 * m[name] + (1 - B1) * g
            v[name] = B2 * v[name] + (1 - B2) * g * g
            scale = (1 - B1**t, 1 - B2**t) if corrected else (1.0, 1.0)
            update = (m[name] / scale[0]) / (np.sqrt(v[name] / scale[1]) + EPS)
            update += DECAY * params[name] * name.endswith(decays)
            params[name] = params[name] - RATE * update
    return params


def nested(flat):
    tree = {}
    for name, x in flat.items():
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(x)
    return tree


def built():
    config = base().optimizer
    config.update(learning_rate=RATE, schedule="constant", b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, clip_norm=CLIP)
    return adamw(config, STEPS)


@pytest.fixture(scope="module")
def runs():
    """(first parameters, gradients, parameters after all steps)."""
    rng = np.random.default_rng(0)
    draw = lambda scale: {name: (scale * rng.standard_normal(s)).astype(np.float32) for name, s in SHAPES.items()}
    params, gradients = draw(1.0), [draw(0.02 if t % 2 else 1.0) for t in range(STEPS)]
    optimizer, tree = built(), nested(params)
    step, state = jax.jit(optimizer.step), optimizer.init(tree)
    for grads in map(nested, gradients):
        tree, state, _ = step(grads, state, tree, global_norm(grads), True)
    found = {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return params, gradients, found


def agrees(found, wanted):
    return all(np.allclose(found[name], wanted[name], rtol=2e-5, atol=2e-6) for name in SHAPES)


def test_adamw_is_the_published_one(runs):
    params, gradients, found = runs
    assert agrees(found, reference(params, gradients))


@pytest.mark.parametrize(
    "wrong",
    [{"corrected": False}, {"decays": ("kernel", "embedding", "weight")}, {"decays": ("kernel", "embedding", "bias")},
     {"decays": ("kernel",)}, {"clip": "each"}, {"clip": "none"}],
    ids=str,
)  # fmt: skip
def test_the_comparison_tells_wrong_ones_apart(runs, wrong):
    params, gradients, found = runs
    assert not agrees(found, reference(params, gradients, **wrong))


@pytest.mark.parametrize("scan", [True, False])
def test_matrices_decay_and_norms_and_biases_do_not(scan):
    config = base("debug", qkv_bias=True, scan_layers=scan)
    shapes, _ = abstract_parameters(Transformer(model_config(config)))
    mask = decay_mask(shapes, config.optimizer.decay)
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        assert decays == (path_name(path).split("/")[-1] in ("kernel", "embedding")), path_name(path)
    assert {True, False} == set(jax.tree.leaves(mask))


def test_scaled_weights_decay_by_the_path_of_the_whole():
    params = {"q_proj": {"kernel": encode(jnp.ones((4, 4)), FP16), "bias": jnp.ones(4)}}
    assert decay_mask(params, "kernel$") == {"q_proj": {"kernel": True, "bias": False}}


# --- the contract ---


def fp8_gradients(size):
    """Of SHAPES, the stacked kernel in FP8, its layers 1000 times apart in magnitude; and the same decoded."""
    rng = np.random.default_rng(1)
    plain = {name: jnp.asarray(size * rng.standard_normal(s), jnp.float32) for name, s in SHAPES.items()}
    plain["layers/q_proj/kernel"] *= jnp.asarray([1.0, 1000.0])[:, None, None]
    coded = plain | {"layers/q_proj/kernel": encode(plain["layers/q_proj/kernel"], E4M3)}
    return coded, {name: decode(g) for name, g in coded.items()}


def test_the_global_norm_is_of_decoded_gradients_in_float32():
    coded, plain = fp8_gradients(3.0)
    whole = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in plain.values()))
    assert float(global_norm(coded)) == pytest.approx(whole, rel=1e-6)
    ones = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(3)}
    assert float(global_norm(ones)) == pytest.approx(np.sqrt(64 * 64 + 3), rel=1e-6)
    of_codes = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), coded))
    assert float(of_codes) != pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("size, clips", ((3.0, True), (1e-6, False)))
def test_fp8_gradients_move_float32_weights_as_their_values_do(size, clips):
    """Clipped like all others: SGD, whose update is the gradient."""
    sgd = from_optax(optax.sgd(1.0), CLIP)
    coded, plain = fp8_gradients(size)
    params = {name: jnp.zeros(s) for name, s in SHAPES.items()}
    norm = global_norm(plain)
    assert (norm > CLIP) == clips
    for optimizer in (sgd, built()):
        moved = [optimizer.step(g, optimizer.init(params), params, norm, True)[0] for g in (coded, plain)]
        for name in SHAPES:
            np.testing.assert_allclose(moved[0][name], moved[1][name], rtol=1e-6)
    moved = sgd.step(coded, sgd.init(params), params, norm, True)[0]
    assert float(global_norm(moved)) == pytest.approx(min(float(norm), CLIP), rel=1e-5)
    free = from_optax(optax.sgd(1.0))
    unclipped = free.step(coded, free.init(params), params, norm, True)[0]
    assert float(global_norm(unclipped)) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_a_step_that_does_not_count_changes_no_bit(bad):
    optimizer, params = built(), {name: jnp.ones(s) for name, s in SHAPES.items()}
    coded, _ = fp8_gradients(1.0)
    step, state = jax.jit(optimizer.step), optimizer.init(params)
    params, state, metrics = step(coded, state, params, global_norm(coded), True)
    poisoned = jax.tree.map(lambda g: jnp.full_like(g, bad), coded)
    bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
    after = step(poisoned, state, params, jnp.float32(bad), False)
    assert bits(after[:2]) == bits((params, state))
    assert float(after[2]["learning_rate"]) == float(metrics["learning_rate"]) == pytest.approx(RATE)
    counted = step(poisoned, state, params, jnp.float32(bad), True)
    assert all(np.isnan(x).any() for x in jax.tree.leaves(counted[0]))


def test_moments_keep_the_parameters_dtype():
    """Sums of micro-batches are float32 where the parameters are bfloat16; FP8 gradients decode to float32."""
    optimizer, params = built(), {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    state = optimizer.init(params)
    for grads in ({"kernel": jnp.ones((4, 4))}, {"kernel": encode(jnp.ones((4, 4)), E4M3)}):
        new = optimizer.step(grads, state, params, jnp.float32(1), True)[:2]
        assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves((params, state))]
    assert len(jax.tree.leaves(grads, is_leaf=is_scaled)) == 1


@pytest.mark.parametrize("kind", ("plain", "narrow"))
@pytest.mark.parametrize("rest", (0.0, 0.05))
def test_decay_changes_at_the_second_stage(kind, rest):
    """Without gradients only decay moves weights; the decay of either stage for the whole run is told apart."""
    config = base().optimizer
    config.update(learning_rate=RATE, stage_learning_rate=RATE, end_learning_rate=RATE, schedule="two_stage")
    config.update(weight_decay=DECAY, stage_weight_decay=rest, stage_at=0.25)
    optimizer = adamw(config, STEPS) if kind == "plain" else scaled_adamw(config, STEPS, lambda _: False)
    params, nothing = {"kernel": jnp.full((4, 4), 2.0)}, {"kernel": jnp.zeros((4, 4))}
    step, state = jax.jit(optimizer.step), optimizer.init(params)
    for _ in range(STEPS):
        params, state, _ = step(nothing, state, params, jnp.float32(0), True)
    shrunk = lambda *stages: 2.0 * np.prod([(1 - RATE * decay) ** steps for decay, steps in stages])
    np.testing.assert_allclose(params["kernel"], shrunk((DECAY, 3), (rest, 9)), rtol=1e-6)
    config.stage_weight_decay = base().optimizer.stage_weight_decay
    assert weight_decay(config, STEPS) == DECAY, "where no config says otherwise, as before there were two"
    for wrong in (shrunk((DECAY, 12)), shrunk((rest, 12)), shrunk((DECAY, 4), (rest, 8))):
        assert abs(float(params["kernel"][0, 0]) - wrong) > 1e-4
