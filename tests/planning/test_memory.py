"""The bytes that the banner promises are those that the state takes on a device."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.config import base
from easylm_plus.models.families import preset
from easylm_plus.models.transformer import abstract_parameters
from easylm_plus.numerics.precision import precision
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning.memory import estimate, human, kept_per_token, sharded_bytes
from easylm_plus.training.gradients import accumulate
from easylm_plus.training.optimizer import adamw
from easylm_plus.training.state import new_state, state_shardings


def on_first_device(tree):
    """Bytes that the arrays of a tree really have there."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"replica": 8}], ids=str)
@pytest.mark.parametrize("ema", [True, False])
def test_state_bytes_are_exact(sizes, ema):
    model, params = tiny.model(vocab=64)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    optimizer = adamw(base().optimizer, 10)
    with sharding.use(mesh, sharding.rules_for(mesh, 4, 2)):
        shapes, axes = abstract_parameters(model)
        wanted = sharding.shardings(axes, shapes, mesh)
    abstract = jax.eval_shape(lambda p: new_state(p, optimizer, ema), shapes)
    shardings = state_shardings(abstract, wanted, mesh)
    state = jax.device_put(new_state(params, optimizer, ema), shardings)
    found = estimate(abstract, shardings, model.config, model.precision, tokens=512, accumulate=2, chunk=64)
    assert found.parameters == found.gradients / 2 == on_first_device(state.params)
    assert found.optimizer == on_first_device((state.opt_state, state.ema))
    assert found.parameters + found.optimizer + on_first_device((state.step, state.guard)) == on_first_device(state)
    if sizes.get("fsdp", 1) > 1:
        assert found.parameters < sum(x.nbytes for x in jax.tree.leaves(params)), "sharded"


def test_sharded_bytes():
    mesh = make_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    tree = {"a": jax.ShapeDtypeStruct((8, 6), np.float32), "b": jax.ShapeDtypeStruct((5,), np.int8)}
    cut = {"a": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "b": NamedSharding(mesh, PartitionSpec())}
    assert sharded_bytes(tree, cut) == 2 * 3 * 4 + 5


def test_more_remat_keeps_less():
    kept = [sum(kept_per_token(preset("llama-7b", remat=r), precision("bf16"))) for r in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2]


# --- what is left of it after cutting, by hand for one block that keeps everything, in float32 ---

SHAPE = {"vocab": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "remat": "none"}
TOKENS = 512


def estimated(sizes, accumulate=1, chunk=64, **shape):
    model, _ = tiny.model(**(SHAPE | shape))
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    optimizer = adamw(base().optimizer, 10)
    with sharding.use(mesh, sharding.rules_for(mesh, 4, 2)):
        shapes, axes = abstract_parameters(model)
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer, False), shapes)
        shardings = state_shardings(abstract, sharding.shardings(axes, shapes, mesh), mesh)
    return estimate(abstract, shardings, model.config, model.precision, TOKENS, accumulate, chunk)


def test_what_every_device_of_tensor_keeps_is_not_divided():
    """The residual stream and the norms are D wide on all of them; heads and feed-forward are cut."""
    heads, attention, ffn = 4 * 4 + 2 * 2 * 4, 4 * 4, 3 * 32
    for tensor in (1, 2):
        wanted = 3 * 4 * TOKENS * (4 * 16 + (heads + attention + ffn) / tensor)
        assert estimated({"tensor": tensor}).activations == wanted
    assert estimated({"tensor": 2}).activations > 1.2 * estimated({"tensor": 1}).activations / 2, "more than its share"
    assert estimated({"fsdp": 2}).activations == estimated({"tensor": 1}).activations / 2, "tokens are cut"


def test_micro_batches_take_a_second_tree_of_gradients():
    """The sum so far and those of this micro-batch; activations are of one micro-batch."""
    one, two, eight = (estimated({"fsdp": 2}, accumulate=parts) for parts in (1, 2, 8))
    assert one.gradients == one.parameters
    assert two.gradients == eight.gradients == 2 * one.parameters
    assert (two.activations, eight.activations) == (one.activations / 2, one.activations / 8)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_loss_takes_a_chunk_and_the_gathered_head(tensor):
    """Over fsdp the head is gathered whole, with its gradient; of a chunk there are three arrays of logits."""
    head, logits = 16 * 64 * 4 / tensor, lambda tokens: 3 * tokens * 64 * 4 / tensor
    for chunk in (32, 64):
        assert estimated({"fsdp": 4, "tensor": tensor}, chunk=chunk).loss == logits(chunk) + 2 * head
    short = estimated({"fsdp": 4, "tensor": tensor}, accumulate=8, chunk=64)
    assert short.loss == logits(TOKENS / 4 / 8) + 2 * head, "fewer tokens on a device than a chunk has"


def test_the_compiled_step_has_the_second_tree():
    """Of a program that scans its layers; one that does not adds each gradient to the sum as soon as it is there."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_layers": 4, "remat": "full", "scan_layers": True}
    model, params = tiny.model(vocab=64, **shape)
    objective, batch = LanguageModel(model, 2, chunk=8), tiny.random_batch(8, 8, 64)

    def working_bytes(parts):
        of_batch = lambda p, b: accumulate(objective, p, b, objective.denominators(b), parts)
        program = jax.jit(of_batch).lower(params, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    tree = sum(x.nbytes for x in jax.tree.leaves(params))
    assert 0.7 * tree < working_bytes(2) - working_bytes(1) < 1.1 * tree
    assert abs(working_bytes(4) - working_bytes(2)) < 0.2 * tree, "and no third one"


def test_human():
    assert [human(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]
