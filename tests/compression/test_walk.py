"""The walk over a model: it measures what evaluation measures, and its matrices see what they will see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.compression.schemes import scheme
from easylm_plus.compression.walk import walk
from easylm_plus.evaluation.loss import make_evaluate
from easylm_plus.interop.weights import of_params
from easylm_plus.models.families import preset
from easylm_plus.models.transformer import Transformer, init_parameters
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.grouped import Groups
from easylm_plus.numerics.int8_rows import Int8Rows
from easylm_plus.numerics.integer import Integers
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.verbs import project, project_grouped
from easylm_plus.numerics.watched import Seen, Watched, new_tap
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.tree import path_name

ROWS, LENGTH, VOCAB = 2, 24, 50
FAMILIES = {
    "llama": ("debug", {"scan_layers": True}),
    "unrolled": ("debug", {"scan_layers": False}),
    "yuan": ("yuan-2b", {"num_kv_heads": 4}),
    "shared": ("yuan-2b", {"num_kv_heads": 4, "lfa_variant": "none", "share_qk": True}),
    "experts": ("mixtral-8x7b", {"num_experts": 4}),
    "yuan experts": ("yuan-m32", {"num_kv_heads": 4, "num_experts": 4}),
    "gpt": ("gpt2-124m", {"num_kv_heads": 4}),
    "palm": ("palm-8b", {"num_kv_heads": 1, "logit_scale": 1.0}),
    "bitnet": ("bitnet-700m", {"num_kv_heads": 4}),
}


@functools.cache
def made(family="llama"):
    name, keys = FAMILIES[family]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    config = preset(
        name, **{**shape, "num_layers": 2, "vocab_size": VOCAB, "max_length": 64, "attention": "xla", **keys}
    )
    model = Transformer(config, precision("float32"))
    params = jax.jit(lambda: init_parameters(model, jax.random.key(1)))()
    grown = lambda path, x: 4 * x if path_name(path).endswith("kernel") else x  # layers that do something
    return model, jax.tree_util.tree_map_with_path(grown, params)


def batches(seeds, rows=ROWS):
    """With padding at the end of the rows."""
    found = [tiny.random_batch(rows, LENGTH, VOCAB, seed) for seed in seeds]
    for batch in found:
        for key in ("segment_ids", "loss_weights"):
            batch[key][:, LENGTH - 5 :] = 0
    return found


def walked(text, family="llama", compress=None, calibration=(0, 1), ends=None, **options):
    model, params = made(family)
    asked = scheme(text)
    seen = batches(calibration)
    weights = of_params(model.config, params, "the tree")
    compress = compress or asked
    return walk(weights, model.precision, compress, ends or asked.ends, seen, batches((7, 8)), **options)


def evaluated(family, params):
    model, _ = made(family)
    return make_evaluate(LanguageModel(model, 2), ["a", "b"])(params, batches((7, 8)))["eval/loss"]


def leaves(params):
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_kept)
    return {path_name(path): leaf for path, leaf in found}


# --- a leaf that watches ---


def test_what_a_watched_product_sees():
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    counts = jnp.asarray([1.0, 1, 0, 1, 1, 1])
    run = lambda x, tap: project(jnp.sin(x), Watched(w, tap, counts))
    y, pull = jax.vjp(run, x, new_tap(w.shape))
    np.testing.assert_array_equal(y, project(jnp.sin(x), w))
    dx, seen = pull(jnp.ones_like(y))
    rows = np.delete(np.sin(x).reshape(6, 8), 2, axis=0)
    np.testing.assert_allclose(seen.gram, rows.T @ rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.magnitude, np.abs(rows).sum(0), rtol=1e-5)
    np.testing.assert_allclose(dx, jax.grad(lambda x: project(jnp.sin(x), w).sum())(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.vjp(run, x, new_tap(w.shape))[1](jnp.zeros_like(y))[1].gram, seen.gram)
    all_rows = np.sin(x).reshape(6, 8)
    assert np.abs(seen.gram - all_rows.T @ all_rows).max() > 0.01, "padding does not count"


@pytest.mark.parametrize("implementation", ("tiled", "ragged"))
def test_what_watched_experts_see(implementation):
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(24, 8)), jnp.float32), jnp.asarray(rng.normal(size=(3, 8, 5)), jnp.float32)
    groups = Groups(jnp.asarray([8, 0, 16]), tile=8, implementation=implementation)
    y, pull = jax.vjp(lambda tap: project_grouped(x, Watched(w, tap), groups), new_tap(w.shape))
    np.testing.assert_array_equal(y, project_grouped(x, w, groups))
    seen = pull(jnp.zeros_like(y))[0]
    for e, rows in enumerate((x[:8], x[:0], x[8:])):
        np.testing.assert_allclose(seen.gram[e], rows.T @ rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen.magnitude[e], jnp.abs(rows).sum(0), rtol=1e-5)


# --- the walk ---


QUICK = ("yuan", "experts")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", ALL)
def test_losses_and_leaves_of_every_family(family):
    """Before is what evaluation says of the model, after what it says of the result; all matrices are done."""
    _, params = made(family)
    result = walked("int3:group=4,method=gptq,embed=keep", family)
    assert result.before == pytest.approx(evaluated(family, params), rel=2e-5)
    assert result.after == pytest.approx(evaluated(family, result.params), rel=2e-5)
    assert abs(result.after - result.before) > 1e-4
    before, after = leaves(params), leaves(result.params)
    assert before.keys() == after.keys()
    for name, leaf in after.items():
        matrix = name.startswith("layers/") and name.endswith("kernel") and "/router/" not in name
        assert isinstance(leaf, Integers) == matrix, name
        assert leaf.shape == before[name].shape
        if not matrix:
            np.testing.assert_array_equal(leaf, before[name])
    assert result.weights == sum(x.size for x in before.values())
    assert result.total_bytes[1] == sum(x.nbytes for x in after.values())
    assert result.matrix_bytes[1] == sum(x.nbytes for x in after.values() if isinstance(x, Coded))


@pytest.mark.parametrize(
    "family", ["yuan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("experts", "palm"))]
)
def test_matrices_see_what_is_done_before_them(family):
    """The sums are those of the quantised model itself, matrix by matrix; those of the original are told apart."""
    model, params = made(family)
    asked, noted = scheme("int3:method=gptq,embed=keep"), {}

    def compress(name, w, seen):
        noted.setdefault(name, []).append(seen)
        return asked(name, w, seen)

    result = walked(asked.text, family, compress)

    def watched(params):
        """name -> sums of a whole pass, with all matrices watched at once."""
        found = {name: leaf for name, leaf in leaves(params).items() if name in noted}
        taps = {name: new_tap(leaf.shape) for name, leaf in found.items()}

        def run(taps, batch):
            counts = jnp.broadcast_to((batch["segment_ids"] != 0).reshape(-1).astype(jnp.float32), (2, ROWS * LENGTH))
            put = lambda path, leaf: Watched(leaf, taps[path_name(path)], counts) if path_name(path) in taps else leaf
            tree = jax.tree_util.tree_map_with_path(put, params, is_leaf=is_kept)
            return model.apply({"params": tree}, batch["inputs"], batch["positions"], batch["segment_ids"])

        sums = []
        for batch in batches((0, 1)):
            out, pull = jax.vjp(lambda taps: run(taps, batch), taps)  # noqa: B023
            sums.append(pull(jnp.zeros_like(out))[0])
        return jax.tree.map(lambda a, b: a + b, *sums)

    of_result, of_original = watched(jax.tree.map(jnp.asarray, result.params)), watched(params)
    others = 0
    for name, layers in noted.items():
        for i, seen in enumerate(layers):
            size = np.abs(seen.gram).max()
            np.testing.assert_allclose(seen.gram, of_result[name].gram[i], rtol=0, atol=1e-4 * size, err_msg=name)
            np.testing.assert_allclose(seen.magnitude, of_result[name].magnitude[i], rtol=1e-3, atol=1e-5)
            others += np.abs(seen.gram - of_original[name].gram[i]).max() > 1e-2 * size
    assert others > len(noted), "the original's"


def test_rounding_needs_no_calibration():
    _, params = made()
    result = walked("int8", calibration=())
    found = decode(leaves(result.params)["layers/mlp/up_proj/kernel"])
    for i, w in enumerate(params["layers"]["mlp"]["up_proj"]["kernel"]):
        np.testing.assert_array_equal(found[i], decode(scheme("int8")("", w)))
    assert isinstance(result.params["lm_head"]["kernel"], Int8Rows), "the default policy"
    assert abs(result.after - result.before) < 2e-3 * result.before
    assert abs(walked("int3", calibration=()).after - result.before) > 10 * abs(result.after - result.before)


def test_an_expert_that_nobody_meets_is_rounded_to_nearest():
    asked = scheme("int4:method=gptq")
    w = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(30, 8)) @ np.random.default_rng(2).normal(size=(8, 8))
    seen = Seen(np.stack([x.T @ x, np.zeros((8, 8))]), np.stack([np.abs(x).sum(0), np.zeros(8)]))
    found, nearest = asked("experts", w, seen), scheme("int4")("experts", w)
    np.testing.assert_array_equal(decode(found[1]), decode(nearest[1]))
    assert np.abs(decode(found[0]) - decode(nearest[0])).max() > 0.01


@pytest.mark.parametrize("text", ("int4:method=awq", "sparse:share=0.7", "sparse:share=0.7,method=sparsegpt"))
def test_an_expert_that_nobody_meets_is_of_the_same_kind(text):
    """As many values and factors as its siblings have, so that they are one leaf; and its own largest weights."""
    w = np.random.default_rng(0).normal(size=(2, 8, 25)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(30, 8))
    seen = Seen(np.stack([x.T @ x, np.zeros((8, 8))]), np.stack([np.abs(x).sum(0), np.zeros(8)]))
    found = np.asarray(decode(scheme(text)("experts", w, seen)[1]))
    assert found.shape == (8, 25)
    if "int" in text:
        assert np.abs(found - w[1]).max() < np.abs(w[1]).max() / 2
    else:
        alone = np.asarray(decode(scheme(text)("expert", w[1], Seen(np.eye(8), np.ones(8)))))
        np.testing.assert_array_equal(found, alone)
        assert 0.3 <= (found != 0).mean() <= 0.4


SLOW = ("nf4:double", "fp8", "2:4:method=sparsegpt", "int3:method=awq,asym,group=8")


@pytest.mark.parametrize(
    "text", ["ternary", "sparse:share=0.75", *(pytest.param(text, marks=pytest.mark.slow) for text in SLOW)]
)
def test_every_scheme_answers_to_its_leaves(text):
    result = walked(text)
    assert result.after == pytest.approx(evaluated("llama", result.params), rel=2e-5)
    assert result.matrix_bytes[1] < result.matrix_bytes[0]
    assert 1e-5 < abs(result.after - result.before) < 3
