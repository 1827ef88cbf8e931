"""QLoRA: adapters learn on a base in four bits, the same on any mesh, which is decoded layer by layer only."""

import functools

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_fp8 import MODEL, run_of

from easylm_plus.errors import UserError
from easylm_plus.numerics import handles
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.nf4 import NF4, nf4
from easylm_plus.numerics.packed_ternary import packed
from easylm_plus.numerics.rules import attach, for_use
from easylm_plus.numerics.ternary_codes import TernaryCodes
from easylm_plus.parallel import sharding

LORA, RULES = ("layers=4",), ("layers=nf4",)
D, F, L = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_layers"]
PAIRS = 4 * L * (2 * 2 * D + 2 * (D + D // 2) + 3 * (D + F))  # weights of all adapters; k and v have half the heads


def qlora(sizes=None, rules=RULES, **options):
    return run_of("none", sizes, **{"lora": LORA, "rules": rules, "scan_layers": True, "precision": "bf16"} | options)


def adapters(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, LowRank))
    return [x for x in leaves if isinstance(x, LowRank)]


def test_the_base_is_what_the_weights_are_in_four_bits():
    run = qlora().start()
    plain = run.parameters()["layers"]["mlp"]["up_proj"]["kernel"]
    leaf = run.state.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(leaf, LowRank) and isinstance(leaf.base, NF4)
    np.testing.assert_array_equal(leaf.base.codes, nf4(plain).codes)
    np.testing.assert_array_equal(leaf.base.absmax, nf4(plain).absmax)
    twice = qlora(rules=("layers=nf4_double",)).start().state.params["layers"]["mlp"]["up_proj"]["kernel"].base
    np.testing.assert_array_equal(twice.absmax, nf4(jnp.asarray(plain), double=True).absmax)
    others = [run.state.params[name] for name in ("embed_tokens", "lm_head")]
    assert {x.dtype for x in jax.tree.leaves(others)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("rules", (RULES, ("layers=nf4_double",)), ids=("nf4", "double"))
def test_only_adapters_learn_and_have_moments(rules):
    run = qlora(rules=rules).start()
    before = jax.device_get(run.state.params)
    losses = run.steps(9)
    assert losses[-3:] < losses[:3], "nothing is learned"
    for old, new in zip(adapters(before), adapters(jax.device_get(run.state.params)), strict=True):
        for one, other in zip(jax.tree.leaves(old.base), jax.tree.leaves(new.base), strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.abs(new.a - old.a).max() > 0 and np.abs(new.b - old.b).max() > 0
    moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
    assert sum(x.nbytes for x in moments) == 8 * PAIRS
    narrow = qlora(rules=rules, lora=("layers=2",)).parts.state.opt_state
    assert sum(x.size for x in jax.tree.leaves(narrow) if x.ndim) == PAIRS, "half the rank, half the moments"


@functools.cache
def alone(rules=RULES):
    """Losses of three steps on one device."""
    return qlora(rules=rules, precision="float32").start().steps(3)


REPLICAS = pytest.param({"replica": 2}, marks=pytest.mark.slow)


@pytest.mark.parametrize("sizes", ({"fsdp": 2, "tensor": 2}, REPLICAS), ids=str)
def test_losses_are_the_same_on_any_mesh(sizes):
    """With masters cut over replicas, too, which leaves codes whole."""
    zero = "sharded" if "replica" in sizes else "none"
    run = qlora(sizes, precision="float32", remat="full", accumulate=2, zero=zero).start()
    np.testing.assert_allclose(run.steps(3), alone(), rtol=2e-6)
    base = adapters(run.state.params)[-1].base
    part = base.codes.addressable_shards[0].data
    assert base.codes.size // part.size == (1 if "replica" in sizes else 4), "cut as the matrix would be"
    assert np.abs(np.subtract(alone(()), alone())).min() > 1e-4, "four bits are seen"


# --- what lives between the passes, and when ---


ODD = {"hidden_size": 48, "intermediate_size": 80, "head_dim": 12}  # sides that nothing else has


def residuals(run, view, capsys):
    """Kinds of the arrays that the backward pass reads, "f32[2,32,32]", as they come out of the scan of layers."""
    with sharding.use(run.mesh, run.parts.rules):
        denominators = run.parts.objective.denominators
        loss = lambda handle, view, batch: run.parts.objective(handles.held(view, handle), batch, denominators(batch))[
            0
        ]
        jax.ad_checkpoint.print_saved_residuals(loss, jax.eval_shape(handles.handles, view), view, run.batch())
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0] for line in lines if " output of scan " in line or "argument" in line}


def matrices(*stack):
    """Kinds that a matrix of the blocks, or a stack of them, would have in any float dtype."""
    d, f = ODD["hidden_size"], ODD["intermediate_size"]
    sides = ((d, d), (d, d // 2), (d, f))
    shapes = [",".join(map(str, (*stack, *one))) for pair in sides for one in (pair, pair[::-1])]
    return {f"{kind}[{shape}]" for shape in shapes for kind in ("f32", "bf16", "f16")}


@pytest.mark.parametrize("remat", ("none", "dots", "full"))
def test_nothing_dense_is_kept_for_the_backward_pass(capsys, remat):
    """Of the base: its codes, which are arguments. Decoded it would come out of the scan, as that of LoRA does where a
    product casts it."""
    run = qlora(remat=remat, **ODD)
    with sharding.use(run.mesh, run.parts.rules):
        view = jax.eval_shape(run.parts.numerics.view, run.parts.state.params, {})
    kinds = residuals(run, view, capsys)
    assert not kinds & (matrices() | matrices(L)), kinds
    assert any(kind.startswith(f"u8[{L},") for kind in kinds)
    dense = jax.tree.map(lambda x: jax.eval_shape(decode, x), view, is_leaf=lambda x: isinstance(x, NF4))
    assert residuals(run, dense, capsys) & matrices(L), "as it would be of weights in floats"


def test_a_layer_at_a_time_is_decoded():
    """In the compiled step no float array is as large as a stack of matrices; with a base in floats there are some."""

    def found(run):
        text = run.compiled_step()
        return {kind for kind in matrices(L) if kind in text}

    assert not found(qlora(remat="full", **ODD))
    assert found(run_of("none", lora=LORA, scan_layers=True, remat="full", precision="bf16", **ODD))


# --- rules ---


@pytest.mark.parametrize("transform", ("nf4", "nf4_double"))
def test_codes_do_not_learn(transform):
    with pytest.raises(UserError, match=rf"found '={transform}', which does not learn; expected numerics.lora with it"):
        run_of("none", rules=(f"layers={transform}",))


def test_some_weights_in_codes_and_others_not():
    run = qlora(rules=("mlp=nf4",), lora=("q_proj=4", "up_proj=2")).start()
    layers = run.state.params["layers"]
    assert isinstance(layers["mlp"]["up_proj"]["kernel"].base, NF4)
    assert isinstance(layers["mlp"]["down_proj"]["kernel"], NF4), "no adapter, and in codes all the same"
    assert layers["self_attn"]["q_proj"]["kernel"].base.dtype == jnp.bfloat16
    run.steps(1)


def test_a_model_that_is_only_used():
    """By rules; what is in codes already is not rounded again."""
    run = qlora(precision="float32")
    plain = jax.tree.map(jnp.asarray, run.parameters())
    coded = attach(plain, RULES)
    again = attach(coded, ("layers=nf4_double",))
    assert jax.tree.structure(coded) == jax.tree.structure(again) != jax.tree.structure(plain)
    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
    logits = lambda params: np.asarray(run.parts.model.apply({"params": params}, tokens))
    dense = jax.tree.map(decode, coded, is_leaf=lambda x: isinstance(x, NF4))
    np.testing.assert_allclose(logits(coded), logits(dense), atol=1e-5)
    assert np.abs(logits(coded) - logits(plain)).max() > 1e-2


def test_rules_of_a_run_for_its_use():
    """An average of a run's weights is not rounded to codes to be used, nor does a later rule take its place."""
    run = qlora(precision="float32")
    plain = jax.tree.map(jnp.asarray, run.parameters())
    rules = ("mlp=nf4", "layers=ternary")
    used, meant = attach(plain, for_use(rules)), attach(plain, rules)
    kind = lambda tree, part, name: type(tree["layers"][part][name]["kernel"]).__name__
    assert kind(meant, "mlp", "up_proj") == "NF4" and kind(used, "mlp", "up_proj") == "ArrayImpl"
    assert kind(meant, "self_attn", "q_proj") == kind(used, "self_attn", "q_proj") == "Ternary"


def test_adapters_beside_ternary_weights_are_used_as_they_learned():
    """The base alone is rounded, not base and adapter together."""
    run = run_of("none", lora=LORA, rules=("layers=ternary",), scan_layers=True, precision="float32").start()
    run.steps(2)
    with sharding.use(run.mesh, run.parts.rules):
        view = run.parts.numerics.view(run.state.params, {})
    learned = handles.held(view, handles.handles(view))
    used = attach(run.state.params, ("layers=ternary",))
    bases = [leaf.base for leaf in jax.tree.leaves(learned, is_leaf=is_kept) if isinstance(leaf, LowRank)]
    assert {type(base) for base in bases} == {TernaryCodes}
    together = attach(jax.tree.map(lambda x: decode(x) if isinstance(x, LowRank) else x, run.state.params,
                                   is_leaf=lambda x: isinstance(x, LowRank)), ("layers=ternary",))  # fmt: skip
    tokens = np.arange(12, dtype=np.int32).reshape(1, 12)
    logits = lambda params: np.asarray(run.parts.model.apply({"params": params}, tokens))
    np.testing.assert_allclose(logits(used), logits(learned), atol=1e-5)
    assert np.abs(logits(together) - logits(used)).max() > 1e-3


def test_a_ternary_base_is_not_rounded_twice():
    """First to the compute dtype, say, in which some codes are others."""
    run = run_of("none", lora=LORA, rules=("layers=ternary",), scan_layers=True, precision="bf16").start()
    latents, kept = run.parameters(), run.state.params
    for part, name in (("mlp", "up_proj"), ("self_attn", "q_proj")):
        leaf, latent = (tree["layers"][part][name]["kernel"] for tree in (kept, latents))
        expected = packed(jnp.asarray(latent))
        base = leaf.base if isinstance(leaf, LowRank) else leaf
        np.testing.assert_array_equal(packed(base).codes, expected.codes)
        narrow = packed(jnp.asarray(latent, jnp.bfloat16))
        assert (narrow.codes != expected.codes).any() or (narrow.scale != expected.scale).any()


def test_experts_in_codes():
    run = qlora(lora=("q_proj=4",), num_experts=4, experts_per_token=2, precision="float32").start()
    stack = run.state.params["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert isinstance(stack, NF4) and stack.shape == (L, 4, D, F)
    losses = run.steps(6)
    assert losses[-3:] < losses[:3]
