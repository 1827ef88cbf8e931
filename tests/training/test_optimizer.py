"""AdamW against the same formulas in float64: bias correction, which weights decay, clipping by the global norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.config import base, model_config
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.training.optimizer import adamw, decay_mask
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


@pytest.fixture(scope="module")
def runs():
    """(first parameters, gradients, parameters after all steps)."""
    rng = np.random.default_rng(0)
    draw = lambda scale: {name: (scale * rng.standard_normal(s)).astype(np.float32) for name, s in SHAPES.items()}
    params, gradients = draw(1.0), [draw(0.02 if t % 2 else 1.0) for t in range(STEPS)]
    config = base().optimizer
    config.update(learning_rate=RATE, schedule="constant", b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, clip_norm=CLIP)
    optimizer = adamw(config, STEPS)
    step, tree = jax.jit(optimizer.step), nested(params)
    state = optimizer.init(tree)
    for grads in gradients:
        tree, state, metrics = step(nested(grads), state, tree)
        whole = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads.values()))
        assert float(metrics["grad_norm"]) == pytest.approx(whole, rel=1e-6), "the norm before clipping"
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
