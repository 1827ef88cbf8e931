"""What FP8 makes of the estimate: weights, moments, copies and gradients by arithmetic, and codes that are kept."""

import fp8_runs
import jax
import jax.numpy as jnp
import pytest
from fp8_runs import LENGTH, ROWS, SHAPE, Run

from easylm_plus.models.families import preset
from easylm_plus.numerics.handles import handles, held
from easylm_plus.numerics.precision import precision
from easylm_plus.parallel import sharding
from easylm_plus.planning.memory import estimate, kept_per_token

D, F, L, V = (SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_layers", "vocab_size"))
MATRICES = L * (2 * D * D + 2 * D * D // 2 + 3 * D * F)  # k and v have half the heads
VOCABULARY, NORMS = 2 * V * D, (2 * L + 1) * D
OTHERS = VOCABULARY + NORMS
FACTORS = 4 * 7 * L  # one float32 a matrix and array of codes


def estimated(level, sizes=None, rows=ROWS, **values):
    """(the estimate, the run) in bfloat16."""
    config = fp8_runs.config(level, **{"numerics__precision": "bf16", "numerics__rules": (), **values})
    run = Run(config, sizes or {})
    a = run.assembly
    with sharding.use(run.mesh, a.rules):
        found = estimate(
            a.state, a.shardings, a.model.config, a.model.precision, rows * LENGTH, config.train.accumulate, 64,
            a.numerics, config.mesh.sequence_parallel,
        )  # fmt: skip
    return found, run


WHOLE = {  # bytes a weight of the matrices: masters, moments, copies, gradients of a micro-batch, their sum
    "none": (4, 8, 0, 4, 4),
    "O1": (4, 8, 2, 1, 4),
    "O2": (2, 3, 0, 1, 4),
    "O3": (2, 3, 1, 1, 4),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("level", WHOLE)
def test_bytes_by_arithmetic(level, accumulate):
    """Vocabulary and norms are float32 throughout. (At O1 the compute dtype of matrices is what travels.)"""
    found, _ = estimated(level, train__accumulate=accumulate)
    master, moments, copies, gradient, total = WHOLE[level]
    factors = FACTORS if level in ("O2", "O3") else 0
    assert found.parameters == master * MATRICES + 4 * OTHERS + factors
    assert abs(found.optimizer - (moments * MATRICES + 8 * OTHERS + 2 * factors)) <= 8, "and counts"
    assert found.copies == copies * MATRICES
    both = accumulate > 1
    assert found.gradients == (gradient + both * total) * MATRICES + (1 + both) * 4 * OTHERS


def test_ternary_weights_are_copied_as_codes():
    """Four a byte, where a step that turns them over time has none: there latents multiply as they are kept."""
    keys = {"numerics__rules": (r"layers/.*_proj=ternary",), "model__remat": "none"}
    found, _ = estimated("none", **keys)
    assert found.copies == MATRICES // 4
    assert found.parameters == 4 * (MATRICES + OTHERS) and found.gradients == 4 * (MATRICES + OTHERS)
    turning, _ = estimated("none", numerics__ternary_warmup=10, **keys)
    assert turning.copies == 0
    wide = [estimated("none", model__intermediate_size=256, **more)[0].activations
            for more in ({**keys, "numerics__ternary_warmup": 10}, keys)]  # fmt: skip
    # codes of a byte instead of 2: of queries, keys and values 3 for 2, of gate and up 2 for 2, of o 3 for 2
    assert wide[0] - wide[1] == L * ROWS * LENGTH * (256 - D - D)


def test_sums_in_e4m3_take_a_byte():
    found, _ = estimated("O3", train__accumulate=2, numerics__fp8_accumulate="e4m3")
    assert found.gradients == (1 + 1) * MATRICES + (4 + 4) * OTHERS


def test_gradients_are_no_longer_as_large_as_weights():
    """As they would be by the rule for plain weights: one tree like the parameters, and one more for the sum."""
    one, two = (estimated("O3", train__accumulate=parts)[0] for parts in (1, 2))
    assert one.gradients < one.parameters and two.gradients > 2 * two.parameters


@pytest.mark.parametrize(("level", "matrices"), [("none", 2), ("O2", 2), ("O3", 1)])
def test_what_is_cut_over_replicas_has_to_be_brought_together(level, matrices):
    """Masters and moments a quarter each; embedding and head are gathered in bfloat16, gradients are whole."""
    found, _ = estimated(level, {"replica": 4}, optimizer__zero="sharded")
    whole, _ = estimated(level)
    cut = (whole.parameters - found.parameters) / (whole.parameters - 4 * NORMS - FACTORS * (level != "none"))
    assert cut == 3 / 4
    assert found.copies == matrices * MATRICES + 2 * VOCABULARY, "but norms, which are whole on all"
    in_bf16 = VOCABULARY + (MATRICES if level == "none" else 0)  # a copy's gradient has the copy's dtype
    assert found.gradients == whole.gradients - 2 * in_bf16
    assert estimated(level, {"fsdp": 4})[0].copies == (MATRICES / 4 if level == "O3" else 0), "fsdp gathers by layer"


def test_whole_tensors_that_are_dealt_out():
    """As where each is cut, but for the padding; with two owners there is none here."""
    parts, whole = (estimated("O3", {"replica": 2}, optimizer__zero=zero)[0] for zero in ("sharded", "whole_tensor"))
    scales = 3 * FACTORS // 2  # of masters and moments: where tensors are whole, a device has its own only
    assert whole.total == parts.total - scales and whole.copies == parts.copies
    parts, whole = (estimated("O2", {"replica": 8}, optimizer__zero=zero)[0] for zero in ("sharded", "whole_tensor"))
    assert whole.copies == parts.copies and whole.gradients == parts.gradients
    assert parts.parameters < whole.parameters < 2 * parts.parameters


def test_the_state_of_a_run_with_windows_is_exact():
    found, run = estimated("O3", {"replica": 2, "fsdp": 2}, optimizer__zero="sharded", numerics__fp8_window=16)
    state, first = run.start(), jax.devices()[0]
    on_first = lambda tree: sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards
                                if s.device == first)  # fmt: skip
    assert found.parameters == on_first(state.params)
    assert found.optimizer == on_first((state.opt_state, state.numerics)) > on_first(state.opt_state)


def test_adapters_take_gradients_of_their_own_only():
    """Rank 4 beside every matrix: sides of D and D / 2 or F."""
    found, _ = estimated("O3", numerics__lora=("layers=4",))
    pairs = 4 * L * (2 * 2 * D + 2 * (D + D // 2) + 3 * (D + F))
    assert found.gradients == 4 * pairs and found.copies == 0, "the frozen base is kept in codes"
    assert found.optimizer < 2 * 4 * pairs + 100


# --- activations ---


def test_inputs_of_fp8_products_are_kept_in_codes():
    """LLaMA 7B: by hand for a block that keeps everything, in bfloat16."""
    own, wide = 4096, 11008
    fp8 = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    kept = lambda remat, names: kept_per_token(preset("llama-7b", remat=remat), precision("bf16"), coded=names)
    residual, norms = 2 * 2 * own, 2 * 2 * own
    assert kept("none", ()) == tuple(32 * x for x in (residual, norms, 2 * (4 * own + 3 * wide)))
    codes = 5 * own  # q, k, v, gate and up each have their own
    inside = 2 * (3 * own + 2 * wide) + (2 + 1) * own + wide  # attention's output is kept by attention, too
    assert kept("none", fp8) == tuple(32 * x for x in (residual, codes, inside))
    assert sum(kept("none", fp8)) < sum(kept("none", ()))
    for remat in ("dots", "full"):
        one = [a - b for a, b in zip(kept(remat, fp8), kept(remat, ()), strict=True)]
        assert one == [0, codes - norms, inside - 2 * (4 * own + 3 * wide)], "but for the block at hand"


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_the_gradient_keeps_is_in_codes(remat):
    """Of the real objective: arrays of a byte are kept only where a block keeps all, one for each product."""
    run = Run(fp8_runs.config("O3", numerics__precision="bf16", numerics__rules=(), model__remat=remat), {})
    a, state = run.assembly, run.start()
    batch = {name: jnp.asarray(x) for name, x in run.batch(0).items()}
    view = a.numerics.view(state.params, state.numerics)
    loss = lambda h: a.objective(held(view, h), batch, a.objective.denominators(batch))[0]
    kept = jax.tree.leaves(jax.eval_shape(lambda h: jax.vjp(loss, h)[1], handles(view)))
    tokens = ROWS * LENGTH
    stacked = [x for x in kept if x.shape[:2] in ((L, ROWS), (L, tokens))]
    narrow = sum(x.size // (L * tokens) for x in stacked if x.dtype == jnp.uint8)
    assert narrow == (6 * D + F if remat == "none" else 0)
