"""The blocked cross-entropy is the plain one, on every mesh, and the logits of a step never exist.

Value and gradients are compared with log_softmax over whole logits. That the logits never exist is read off the
optimised program: no instruction of it, on any device, in any dtype, has as many elements as that device's share
of the logits [B, T, V]. With a single chunk the same reading finds them. The language-model objective on top is the
weighted mean over all tokens, not the mean of the rows' means.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_plus.models.families import preset
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.objectives.cross_entropy import _chunks, blocked_cross_entropy
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh

B, T, D, V = 8, 6, 8, 34
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "fsdp 2, sequence 2, tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "replica 2, fsdp 2, sequence 2": {"replica": 2, "fsdp": 2, "sequence": 2},
}
HEADS = {"untied": lambda w, x: x @ w, "tied": lambda w, x: x @ w.T}
Z = 0.01


def case(tied):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.7)
    return draw(*((V, D) if tied == "tied" else (D, V))), draw(B, T, D), rng.integers(0, V, (B, T)), np.float32(weights)


def plain(head, w, x, targets, weights, z):
    logits = head(w, x)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return (weights * (nll + z * jax.nn.logsumexp(logits, axis=-1) ** 2)).sum()


def blocked(head, w, x, targets, weights, z, chunk):
    return blocked_cross_entropy(head, w, x, targets, weights, z * weights, chunk)[0]


@functools.cache
def compared(tied, chunk, mesh=None):
    """The two functions whose values and gradients are compared; the mesh is the one they are first called under."""
    both = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
    return both(functools.partial(plain, HEADS[tied])), both(functools.partial(blocked, HEADS[tied], chunk=chunk))


def check_against_plain(tied, chunk, mesh=None, z=Z, change=lambda targets, weights, z: (targets, weights, z)):
    """`change` is what the blocked one is given instead."""
    w, x, targets, weights = case(tied)
    reference, function = compared(tied, chunk, mesh)
    expected, expected_gradients = reference(w, x, targets, weights, z)
    actual, gradients = function(w, x, *change(targets, weights, z))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", HEADS)
@pytest.mark.parametrize("z", (0.0, Z))
@pytest.mark.parametrize("chunk", (7, B * T))
def test_value_and_gradients_are_those_of_log_softmax(tied, z, chunk):
    check_against_plain(tied, chunk, z=z)


@pytest.mark.parametrize("chunk", (1, 16, 1000))
def test_any_chunk_will_do(chunk):
    check_against_plain("untied", chunk)


@pytest.mark.parametrize(
    ("mesh", "tied"),
    [*((mesh, "untied") for mesh in MESHES), *((mesh, "tied") for mesh in MESHES if "tensor" in mesh)],
)
def test_the_same_on_every_mesh(mesh, tied):
    with sharding.use(make_mesh(MESHES[mesh])):
        check_against_plain(tied, 4, mesh)


@pytest.mark.parametrize(
    "change",
    (
        lambda targets, weights, z: (targets, weights, 0.999 * z),
        lambda targets, weights, z: (targets, weights + 1e-4, z),
        lambda targets, weights, z: (np.roll(targets, 1, axis=1), weights, z),
        lambda targets, weights, z: (targets, weights * (np.arange(T) > 0), z),
    ),
    ids=("z-loss", "weights", "targets", "mask"),
)
def test_the_comparison_notices(change):
    check_against_plain("untied", 7)
    with pytest.raises(AssertionError):
        check_against_plain("untied", 7, change=change)


def test_terms_by_token():
    w, x, targets, weights = case("untied")
    _, nll, lse = blocked_cross_entropy(HEADS["untied"], w, x, targets, weights, weights, 7)
    logits = x.astype(np.float64) @ w
    expected = np.log(np.exp(logits).sum(-1))
    expected_nll = expected - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    counts = weights != 0  # elsewhere they mean nothing
    np.testing.assert_allclose(lse[counts], expected[counts], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nll[counts], expected_nll[counts], atol=1e-5)


def test_the_cotangent_scales_the_gradients():
    w, x, targets, weights = case("untied")
    gradient = lambda factor: jax.grad(lambda x: factor * blocked(HEADS["untied"], w, x, targets, weights, Z, 7))(x)
    np.testing.assert_allclose(gradient(-3.0), -3.0 * gradient(1.0), rtol=1e-6)


def test_what_weighs_nothing_may_be_infinite():
    """Tokens that the head forbids (logit -inf) as targets of weight 0, and a NaN that is not learned from."""
    w, x, targets, weights = case("untied")
    forbids = lambda w, x: (x @ w).at[:, 0].set(-jnp.inf)
    targets = np.where(weights == 0, 0, np.maximum(targets, 1))
    both = jax.value_and_grad(functools.partial(blocked, forbids), argnums=(0, 1))
    value, gradients = both(w, x, targets, weights, Z, 7)
    assert all(np.isfinite(leaf).all() for leaf in (value, *gradients))
    assert np.isinf(blocked(forbids, w, x, targets, weights + 1, 0.0, 7))
    x[weights == 0] = np.nan
    for ours, expected in zip(jax.tree.leaves(both(w, x, targets, weights, Z, 7)), (value, *gradients)):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert np.isnan(jax.grad(functools.partial(plain, forbids))(w, x, targets, weights, Z)).any()


@pytest.mark.parametrize(
    ("tokens", "chunk", "count"), ((24, 24, 1), (24, 25, 1), (24, 7, 4), (24, 1, 24), (23, 7, 23), (4096, 1024, 4))
)
def test_chunks_are_equal_and_as_few_as_can_be(tokens, chunk, count):
    assert _chunks(tokens, chunk) == count


# --- the objective ---

CONFIG = preset(
    "debug", vocab_size=1024, hidden_size=16, intermediate_size=24, num_heads=2, head_dim=8, num_layers=1,
    init="fan_in", scan_layers=True,
)  # fmt: skip
ROWS, LENGTH = 16, 32


@functools.cache
def parameters(tie=False):
    rng, (shapes, _) = np.random.default_rng(0), abstract_parameters(model_of(tie))
    draw = lambda path, leaf: rng.normal(path[-1].key == "weight", 0.3, leaf.shape).astype(np.float32)
    return jax.tree.map_with_path(draw, shapes)


def model_of(tie=False):
    return Transformer(preset("debug", **{**vars(CONFIG), "tie_embeddings": tie}))


def ragged_batch():
    """Rows of one document, of which the last 1, 3, 5, ... tokens are learned; three sources."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1))
    learned = np.arange(LENGTH) >= LENGTH - 1 - 2 * np.arange(ROWS)[:, None]
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (learned * rng.uniform(0.5, 2, (ROWS, LENGTH))).astype(np.float32),
        "positions": np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "source_ids": np.broadcast_to(np.arange(ROWS)[:, None] % 3, (ROWS, LENGTH)),
    }


@functools.cache
def negative_log_likelihoods():
    """Of `ragged_batch`, float64[ROWS, LENGTH], from whole logits."""
    batch = ragged_batch()
    logits = np.asarray(jax.jit(model_of().apply)({"params": parameters()}, batch["inputs"]), np.float64)
    logsumexp = np.log(np.exp(logits).sum(-1))
    return logsumexp - np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]


OBJECTIVE = LanguageModel(model_of(), num_sources=4, chunk=20)
share_of_loss = jax.jit(OBJECTIVE)


@functools.cache
def evaluated():
    return share_of_loss(parameters(), ragged_batch(), OBJECTIVE.denominators(ragged_batch()))


def test_loss_is_the_mean_over_all_weighted_tokens():
    weights, nll = ragged_batch()["loss_weights"], negative_log_likelihoods()
    loss, _ = evaluated()
    np.testing.assert_allclose(loss, (weights * nll).sum() / weights.sum(), rtol=2e-6)
    row_means = (weights * nll).sum(1) / weights.sum(1)
    assert abs(float(loss) - row_means.mean()) > 1e-3  # what EasyLM optimised


def test_sums_by_source():
    weights, nll, source = ragged_batch()["loss_weights"], negative_log_likelihoods(), ragged_batch()["source_ids"]
    _, sums = evaluated()
    for i in range(4):  # the last of which no row comes from
        np.testing.assert_allclose(sums["tokens"][i], (weights * (source == i)).sum(), rtol=1e-6)
        np.testing.assert_allclose(sums["nll"][i], (weights * nll * (source == i)).sum(), rtol=2e-6)


def test_z_loss_is_added():
    with_z, batch = dataclasses.replace(OBJECTIVE, z_loss=0.1), ragged_batch()
    loss, sums = jax.jit(with_z)(parameters(), batch, with_z.denominators(batch))
    expected = 0.1 * sums["z"] / batch["loss_weights"].sum()
    assert expected > 0.1
    np.testing.assert_allclose(loss - evaluated()[0], expected, rtol=1e-5)


def test_shares_of_micro_batches_add_up():
    batch = ragged_batch()
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 8), slice(8, 16))]
    together = sum(share_of_loss(parameters(), half, OBJECTIVE.denominators(batch))[0] for half in halves)
    np.testing.assert_allclose(together, evaluated()[0], rtol=2e-6)
    means = [share_of_loss(parameters(), half, OBJECTIVE.denominators(half))[0] for half in halves]
    assert abs(sum(means) / 2 - float(together)) > 1e-2  # the mean of means is another number


def test_nothing_learned_is_no_loss():
    batch = ragged_batch() | {"loss_weights": np.zeros((ROWS, LENGTH), np.float32)}
    assert share_of_loss(parameters(), batch, OBJECTIVE.denominators(batch))[0] == 0


# --- the logits never exist ---


@functools.cache
def compiled(mesh, chunk, tie):
    """value_and_grad of the objective, compiled for a mesh, with its arguments in place."""
    model = model_of(tie)
    objective = LanguageModel(model, num_sources=4, chunk=chunk)
    function = jax.value_and_grad(lambda p, b: objective(p, b, objective.denominators(b))[0])
    params, batch = parameters(tie), ragged_batch()
    if mesh is None:
        return jax.jit(function).lower(params, batch).compile(), (params, batch)
    mesh = make_mesh(MESHES[mesh])
    shapes, axes = abstract_parameters(model)
    with sharding.use(mesh, sharding.rules_for(mesh, CONFIG.num_heads, CONFIG.num_kv_heads)):
        params = jax.device_put(params, sharding.shardings(axes, shapes, mesh))
        rows = jax.sharding.NamedSharding(mesh, sharding.spec_of(("batch", "length"), (ROWS, LENGTH), mesh))
        batch = jax.device_put(batch, rows)
        return jax.jit(function).lower(params, batch).compile(), (params, batch)


def largest(hlo):
    """Elements of the largest array that an optimised program mentions: results, operands, parameters."""
    shapes = re.findall(r"\b[a-z]+\d*[a-z0-9]*\[(\d[\d,]*)\]", hlo)
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def share_of_logits(mesh):
    """Elements of [B, T, V] on one device, V cut over `tensor` too."""
    return ROWS * LENGTH * CONFIG.vocab_size // (1 if mesh is None else 8)


@pytest.mark.parametrize(
    ("mesh", "tie"), [(mesh, False) for mesh in (None, *MESHES)] + [("fsdp 2, sequence 2, tensor 2", True)]
)
def test_no_instruction_is_as_large_as_the_logits(mesh, tie):
    """Nor is any weight, even whole; and the program's numbers are those of one device."""
    program, arguments = compiled(mesh, chunk=16, tie=tie)
    assert max(leaf.size for leaf in jax.tree.leaves(arguments[0])) < share_of_logits(mesh)
    assert largest(program.as_text()) < share_of_logits(mesh)
    loss, gradients = program(*arguments)
    expected_loss, expected = on_one_device(tie)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected)


@functools.cache
def on_one_device(tie):
    program, arguments = compiled(None, ROWS * LENGTH, tie)
    return program(*arguments)


@pytest.mark.parametrize("mesh", (None, "fsdp 8", "fsdp 2, sequence 2, tensor 2"))
def test_with_a_single_chunk_the_logits_are_found(mesh):
    program, _ = compiled(mesh, chunk=ROWS * LENGTH, tie=False)
    assert largest(program.as_text()) >= share_of_logits(mesh)


def test_the_reader_of_programs_reads_every_kind_of_shape():
    text = """%a.1 = (f32[2,3]{1,0}, s32[]) fusion(bf16[5,7]{1,0:T(8,128)} %b), dimensions={0}
      ROOT %c = pred[4,2,6]{2,1,0} copy(f8e4m3fn[40]{0} %d), replica_groups=[8,100]<=[800]"""
    assert largest(text) == 48
