"""Models whose matrices are kept in FP16 codes answer, and are measured, as their values would: a layer is decoded when
its turn comes, and never the whole tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.inference.generate import Generator
from easylm_plus.inference.sampling import GREEDY
from easylm_plus.numerics.formats import FP16, decode, encode, is_scaled
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.tree import path_name

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]


def in_codes(params):
    """The matrices of the blocks as O2 and O3 keep them."""
    is_matrix = lambda path: path_name(path).startswith("layers/") and path_name(path).endswith("kernel")
    turned = lambda path, leaf: encode(leaf, FP16) if is_matrix(path) else leaf
    return jax.tree_util.tree_map_with_path(turned, params)


def values(params):
    return jax.tree.map(decode, params, is_leaf=is_scaled)


UNROLLED = pytest.param({"scan_layers": False}, marks=pytest.mark.slow)  # as test_deploy opens them


@pytest.mark.parametrize("kind", [{"scan_layers": True}, UNROLLED, {"num_experts": 4}], ids=str)
def test_answers_are_those_of_the_values(kind):
    model, params = tiny.model(**kind)
    kept = in_codes(params)
    answers = [Generator(model, p, ())(PROMPTS, 12) for p in (kept, values(kept))]
    assert answers[0] == answers[1], "scanned, with a cache"
    assert [*Generator(model, kept, ()).stream(PROMPTS[0], 12)] == answers[0][0], "and token by token"
    bare = jax.tree.map(lambda x: x.code if is_scaled(x) else x, kept, is_leaf=is_scaled)
    assert Generator(model, bare, ())(PROMPTS, 12) != answers[0], "codes alone are another model"


# --- memory ---

LAYERS = 12


@pytest.fixture(scope="module")
def deep():
    """(model, parameters in codes, bytes of their values)."""
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_layers": LAYERS, "scan_layers": True}
    model, params = tiny.model(**shape)
    return model, in_codes(params), sum(x.nbytes for x in jax.tree.leaves(params["layers"]))


def held_out_loss(model):
    objective, batch = LanguageModel(model, 2, chunk=8), tiny.random_batch(2, 8, 50)
    return lambda params: objective(params, batch, objective.denominators(batch))[1]


def next_token(model):
    generator = Generator(model, None, ())
    logits, cache = jax.eval_shape(lambda: (jnp.zeros((2, 50)), model.init_cache(2, 16)))
    return lambda params: generator._loop(
        params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache), jnp.zeros(logits.shape),
        jnp.ones(2, jnp.int32), jax.random.key(0), GREEDY, np.zeros(0, np.int32), count=4,
    )  # fmt: skip


@pytest.mark.parametrize("program", [held_out_loss, next_token])
def test_nothing_decodes_the_whole_tree(program, deep):
    """No more than the program of plain float32 weights works in, which has a layer's at a time, too."""
    model, kept, whole = deep
    run = program(model)
    working = lambda f, p: jax.jit(f).lower(p).compile().memory_analysis().temp_size_in_bytes
    plain, codes = working(run, values(kept)), working(run, kept)
    first = working(lambda p: run(jax.tree.map(jax.lax.optimization_barrier, values(p))), kept)
    assert codes - plain < 0.5 * whole / LAYERS
    assert first - plain > 0.9 * whole, "decoding all first would be seen"
