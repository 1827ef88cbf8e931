"""FP8-LM's levels on a small model: gradients against an oracle of a few lines, what is kept, rules and refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tiny_fp8 import by_name, codes, flat, run_of, sqnr

from easylm_plus.errors import UserError
from easylm_plus.models.transformer import unstack_layers
from easylm_plus.numerics import verbs
from easylm_plus.numerics.formats import E4M3, E5M2, FP16, Scaled, decode, encode, scale_of
from easylm_plus.numerics.fp8 import Fp8
from easylm_plus.numerics.rules import assign
from easylm_plus.numerics.stored import Copy
from easylm_plus.parallel import sharding
from easylm_plus.tree import path_name

NAMES = ["mlp/down_proj", "mlp/gate_proj", "mlp/up_proj", "self_attn/k_proj", "self_attn/o_proj", "self_attn/q_proj",
         "self_attn/v_proj"]  # fmt: skip
KERNELS = [f"layers/{name}/kernel" for name in NAMES]

# --- an oracle: products of rounded float32 arrays ---

FORMATS = {"x": ("float8_e4m3fn", 448), "w": ("float8_e4m3fn", 448), "dy": ("float8_e5m2", 57344)}


@struct.dataclass
class Rounded:
    """A weight whose products are those of FP8, by definition; `formats` changes FORMATS."""

    weight: jax.Array
    formats: tuple = struct.field(pytree_node=False, default=())


def rounded(a, dtype, largest):
    """To the nearest value of a format that is scaled by the largest power of two that keeps all of it in range."""
    _, exponent = jnp.frexp(largest / jnp.abs(a).max())
    scale = jnp.ldexp(1.0, exponent - 1)
    return jnp.clip(a * scale, -largest, largest).astype(dtype).astype(jnp.float32) / scale


def product(w, x):
    formats = FORMATS | dict(w.formats)

    @jax.custom_vjp
    def y(x, weight):
        return rounded(x, *formats["x"]) @ rounded(weight, *formats["w"])

    def backward(kept, dy):
        x, weight = (rounded(a, *formats[name]) for a, name in zip(kept, ("x", "w")))
        dy = rounded(dy, *formats["dy"])
        dw = x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
        return dy @ weight.T, rounded(dw, "float8_e4m3fn", 448)

    y.defvjp(lambda x, weight: (y(x, weight), (x, weight)), backward)
    return y(x, w.weight)


verbs._project.register(Rounded)(product)


@functools.cache
def oracle(masters=None, parts=1, rules=(), formats=()):
    """(loss, {name: gradient}) of the first batch: the sum of its micro-batches, each rounded by itself."""
    run = run_of("O1", scan_layers=True, rules=rules)
    matrices, objective = run.parts.numerics.assigned, run.parts.objective
    kept = lambda path, p: decode(encode(p, masters)) if masters and matrices[path_name(path)] != "plain" else p
    params = jax.tree_util.tree_map_with_path(kept, run.parameters())

    def loss(params, batch, denominators):
        typed = lambda path, p: Rounded(p, formats) if matrices[path_name(path)] == "fp8" else p
        return objective(jax.tree_util.tree_map_with_path(typed, params), batch, denominators)[0]

    with sharding.use(run.mesh, run.parts.rules):
        batch, of_part = run.batch(), jax.jit(jax.value_and_grad(loss))
        denominators = objective.denominators(batch)
        pick = lambda i: jax.tree.map(lambda x: x[i::parts], batch)
        value, gradients = jax.tree.map(
            lambda *xs: sum(xs), *(of_part(params, pick(i), denominators) for i in range(parts))
        )
    return float(value), by_name(gradients)


@functools.cache
def first_step(level, scan=True, parts=1, window=1):
    """(loss, {name: gradient}, {name: what was seen}) of the same batch."""
    return run_of(level, scan_layers=scan, accumulate=parts, window=window).start().gradients()


MASTERS = {"O1": None, "O2": FP16, "O3": FP16}
WAYS = list(itertools.product((True, False), (1, 2), (1, 16)))
CASES = {(level, *way) for level in MASTERS for way in WAYS}
FAST = {(level, True, 1, 1) for level in MASTERS}
FAST |= {("O1", True, 1, 16), ("O2", False, 2, 16), ("O3", True, 2, 1), ("O3", False, 1, 16)}
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in sorted(CASES - FAST)]


@pytest.mark.parametrize(("level", "scan", "parts", "window"), [*sorted(FAST), *SLOW])
def test_gradients_are_those_of_rounded_arrays(level, scan, parts, window):
    """The same codes, and all else to the precision of float32: what is left of the signal is the formats' doing."""
    loss, gradients, _ = first_step(level, scan, parts, window)
    expected_loss, expected = oracle(MASTERS[level], parts)
    assert loss == pytest.approx(expected_loss, abs=2e-6)
    assert [name for name, g in gradients.items() if isinstance(g, Scaled)] == (KERNELS if parts == 1 else [])
    for name in KERNELS:
        # sums in another order decide a value that is just between two codes otherwise, rarely
        different = np.asarray(decode(gradients[name])) != np.asarray(expected[name])
        assert different.mean() <= 0.001 * parts
    assert sqnr(flat(gradients), flat(expected)) > 60


@pytest.mark.parametrize(
    "change", (("x", ("float8_e5m2", 57344)), ("dy", ("float8_e4m3fn", 448)), ("w", ("float16", 65504))), ids=str
)
def test_another_format_is_seen(change):
    """Negative controls of the test above: 11, 19 and 13 dB where it asks for 60."""
    _, other = oracle(formats=(change,))
    assert sqnr(flat(first_step("O1")[1]), flat(other)) < 25


def test_other_masters_are_seen():
    assert sqnr(flat(first_step("O1")[1]), flat(oracle(FP16)[1])) < 40
    assert sqnr(flat(first_step("O2")[1]), flat(oracle()[1])) < 40


@pytest.mark.parametrize("level", MASTERS)
def test_what_is_left_of_the_gradient(level):
    """Against float32, 14 dB in this model of two layers; the oracle's is no other.

    The budget: rounding is 31 dB below E4M3 values (0.026 of them, rms) and 25 below E5M2's (0.052). A gradient that
    has come through 8 products in a row forwards, as many backwards and its own, all errors adding up and no residual
    leading around them, would be left with 12 dB.
    """
    (loss, gradients, _), (exact_loss, exact, _) = first_step(level), first_step("none")
    e4m3, e5m2 = 0.026**2, 0.052**2
    budget = 8 * 2 * e4m3 + 8 * (e4m3 + e5m2) + 2 * e4m3 + e5m2
    assert -10 * np.log10(budget) < sqnr(flat(gradients), flat(exact)) < 20
    assert 0 < abs(loss - exact_loss) < 0.02


def test_o2_and_o3_begin_alike():
    """They differ in what travels, FP16 or E4M3 codes of the same masters; O1's are other masters."""
    (loss, o2, _), (other_loss, o3, _), (_, o1, _) = map(first_step, ("O2", "O3", "O1"))
    assert loss == other_loss
    for name in KERNELS:
        np.testing.assert_array_equal(codes(o2[name].code), codes(o3[name].code))
        np.testing.assert_array_equal(o2[name].scale_inv, o3[name].scale_inv)
        assert (codes(o1[name].code) != codes(o3[name].code)).any()


@functools.cache
def trained(level, window=1):
    """(a run after 12 steps, its losses)."""
    run = run_of(level, scan_layers=True, window=window).start()
    return run, run.steps(12)


@pytest.mark.parametrize(("level", "window"), (("O1", 4), ("O3", 1)))
def test_levels_learn(level, window):
    """Three batches again and again: FP8 fits them as float32 does, within a twentieth of what was learned."""
    (_, exact), (_, losses) = trained("none"), trained(level, window)
    learned = exact[0] - exact[-1]
    assert learned > 0.3
    np.testing.assert_allclose(losses, exact, atol=0.02 + 0.05 * learned)


# --- what is kept, and what a step multiplies by ---


@functools.cache
def kept_and_viewed(level, **options):
    """(parameters, what is kept of them, what a step multiplies by), {name: leaf} each."""
    run = run_of(level, scan_layers=True, **options).start()
    numerics, typed = run.parts.numerics, lambda x: isinstance(x, Scaled | Copy | Fp8)
    with sharding.use(run.mesh, run.parts.rules):
        view = numerics.view(run.state.params, run.state.numerics)
    named = lambda tree: {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=typed)
    }
    return named(run.parameters()), named(run.state.params), named(view)


@pytest.mark.parametrize("level", ("O2", "O3"))
def test_masters_are_in_fp16(level):
    """Each layer with a scale of its own; within half of 2^-10 of the value. Everything else is as it was."""
    params, kept, _ = kept_and_viewed(level)
    assert [name for name, x in kept.items() if isinstance(x, Scaled)] == KERNELS
    for name, x in kept.items():
        if name in KERNELS:
            assert x.code.dtype == jnp.float16 and x.scale_inv.shape == (2,)
            assert (np.abs(decode(x) - params[name]) <= 2.0**-11 * np.abs(params[name])).all()
            assert (decode(x) != params[name]).any()
        else:
            np.testing.assert_array_equal(x, params[name])


@pytest.mark.parametrize("level", ("none", "O1"))
def test_masters_are_in_float32(level):
    params, kept, _ = kept_and_viewed(level)
    for name, x in kept.items():
        np.testing.assert_array_equal(x, params[name])


@pytest.mark.parametrize("level", MASTERS)
def test_weights_are_the_codes_of_their_masters(level):
    """Whatever travels becomes the same codes: those of the master. The rest multiplies as it is."""
    _, kept, view = kept_and_viewed(level)
    travels = {"O1": jnp.float32, "O2": jnp.float16, "O3": jnp.float8_e4m3fn}[level]
    assert [name for name, x in view.items() if isinstance(x, Fp8)] == KERNELS
    for name, leaf in view.items():
        if name not in KERNELS:
            np.testing.assert_array_equal(leaf, kept[name])
            continue
        expected = encode(decode(kept[name]), E4M3)
        assert leaf.weight.dtype == travels
        np.testing.assert_array_equal(leaf.scale_inv, expected.scale_inv)
        values = leaf.weight.astype(jnp.float32) * leaf.scale[:, None, None]
        np.testing.assert_array_equal(values.astype(jnp.float8_e4m3fn).view(jnp.uint8), codes(expected.code))


def test_the_wire_of_o1_is_the_compute_dtype():
    _, _, view = kept_and_viewed("O1", precision="bf16")
    assert view[KERNELS[0]].weight.dtype == jnp.bfloat16


def test_names_and_numbers_do_not_depend_on_stacking():
    run, other = (run_of("O2", scan_layers=scan).start() for scan in (True, False))
    unstacked = unstack_layers({**run.state.params})
    jax.tree.map(np.testing.assert_array_equal, unstacked, other.state.params)


# --- what is remembered between steps ---


def test_windows_remember_what_steps_saw():
    """One window a matrix, in a stack; a step that does not count leaves them as they are."""
    numerics, seen = run_of("O1", scan_layers=True, window=4).parts.numerics, first_step("O1")[2]
    state = numerics.state()
    assert sorted(state) == ["input", "output_grad"] and sorted(state["input"]) == KERNELS
    after = numerics.observe(state, seen, jnp.bool_(True))
    for kind, row, fmt in (("input", 0, E4M3), ("output_grad", 1, E5M2)):
        for name, window in after[kind].items():
            assert window.history.shape == (2, 4)
            np.testing.assert_array_equal(window.scale, scale_of(seen[name][:, row, 0], fmt))
            np.testing.assert_array_equal(window.history[:, 1], seen[name][:, row, 0])
            assert (window.count == 1).all() and (seen[name][:, row, 0] > 0).all()
    skipped = numerics.observe(state, jax.tree.map(lambda x: x * jnp.nan, seen), jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, skipped, state)
    assert run_of("O1").parts.numerics.state() == {}


def test_mu_follows_the_saturated_share():
    """Of each matrix of a stack by itself: half of it above 1e-5, a little more of it below."""
    numerics = run_of("O3", scan_layers=True, reduction="ring").parts.numerics
    state = numerics.state()
    assert sorted(state) == ["mu"] and sorted(state["mu"]) == KERNELS
    mu = state["mu"][KERNELS[0]]
    np.testing.assert_array_equal(mu, [1, 1])  # 1 / sqrt(ranks)
    seen = {name: jnp.zeros((2, 3, 3)).at[1, 2, 1].set(1e-4) for name in KERNELS}  # of gradients, in the second layer
    after = numerics.observe(state, seen, jnp.bool_(True))["mu"]
    for moved in after.values():
        np.testing.assert_allclose(moved, [2**0.001, 0.5], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, numerics.observe(state, seen, jnp.bool_(False)), state)


def test_steps_move_the_windows():
    """After 12 steps of three batches the last four are remembered, and scales are those of the largest of them."""
    for windows in trained("O1", 4)[0].state.numerics.values():
        for window in windows.values():
            assert (
                (window.count == 12).all() and (window.history[:, 0] == 0).all() and (window.history[:, 1:] > 0).all()
            )
            assert (window.scale == 2.0 ** np.round(np.log2(window.scale))).all() and (window.scale != 1).all()


def test_micro_batches_remember_the_largest():
    """What the first matrix reads has come through no product, so that its largest value is that of the whole batch."""
    whole, parts = first_step("O3")[2], first_step("O3", True, 2)[2]
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"layers/self_attn/{name}/kernel"
        assert parts[name].shape == whole[name].shape == (2, 3, 3)
        assert parts[name][0, 0, 0] == whole[name][0, 0, 0] > 0
        assert (parts[name][:, 2, 0] < whole[name][:, 2, 0]).all()  # gradients: of half of the tokens each


# --- rules ---


def test_a_rule_excludes():
    """Kept in float32, multiplied as an array, with a gradient that is one."""
    name = "layers/mlp/down_proj/kernel"
    run = run_of("O2", scan_layers=True, rules=("layers/.*/down_proj=plain",)).start()
    _, gradients, seen = run.gradients()
    assert [n for n, g in gradients.items() if isinstance(g, Scaled)] == [n for n in KERNELS if n != name]
    assert name not in seen and run.state.params["layers"]["mlp"]["down_proj"]["kernel"].dtype == jnp.float32
    _, expected = oracle(FP16, rules=("layers/.*/down_proj=plain",))
    assert sqnr(flat(gradients), flat(expected)) > 60
    assert "plain by rule" in run.parts.numerics.describe()


def test_ternary_latents_are_kept_narrow_and_learn():
    run = run_of("O2", scan_layers=True, rules=(r"mlp/.*_proj=ternary",), rate=1e-2).start()
    latents = lambda: run.state.params["layers"]["mlp"]["up_proj"]["kernel"]
    before = np.asarray(decode(latents()))
    assert latents().code.dtype == jnp.float16
    losses = run.steps(12)
    moved = np.abs(np.asarray(decode(latents())) - before)
    assert (moved > 0).mean() > 0.9 and losses[-1] < losses[0] - 0.2
    assert latents().code.dtype == jnp.float16


@pytest.mark.parametrize(
    ("level", "options", "message"),
    (
        ("O4", {}, "numerics.fp8_level = 'O4': expected one of none, O1, O2, O3"),
        ("O1", {"window": 0}, "numerics.fp8_window = 0: expected 1"),
        ("O1", {"rules": ("no_such_weight=plain",)}, "found 'no_such_weight=plain', which matches no weight"),
        ("O1", {"rules": ("embed_tokens=fp8",)}, "found 'embed_tokens=fp8', which matches no weight"),
        ("O1", {"rules": ("down_proj=int3",)}, "expected 'regular expression=transform' with one of plain, ternary"),
        ("O1", {"rules": ("down_proj",)}, "expected 'regular expression=transform'"),
        ("O1", {"rules": ("(=plain",)}, r"found '\(=plain', not a regular expression"),
        ("O1", {"rules": ("down_proj=fp8",), "intermediate_size": 40}, "matches .*down_proj.*no multiples of 16"),
        ("O1", {"rules": ("layers=plain",)}, "numerics.fp8_level = 'O1': found no matrix"),
        ("none", {"rules": ("down_proj=fp8",)}, "found '=fp8', expected numerics.fp8_level = O1, O2 or O3"),
        ("O2", {"master": "fp17"}, "optimizer.master = 'fp17': expected one of e4m3, e5m2, fp16, bf16, float32"),
        ("O1", {"rounding": "up"}, "optimizer.rounding = 'up': expected one of nearest, stochastic"),
        ("none", {"zero": "all"}, "optimizer.zero = 'all': expected one of none, sharded"),
        ("none", {"first_moment": "bf16"}, "optimizer.first_moment = 'bf16': found no matrix that it concerns"),
        ("O2", {"second_moment": "bf16", "lora": ("q_proj=4",)}, "'bf16': found adapters are kept in float32"),
    ),
)
def test_what_cannot_be_is_one_clear_error(level, options, message):
    with pytest.raises(UserError, match=message):
        run_of(level, **options)


@pytest.mark.parametrize(
    ("level", "options", "gathers"),
    (
        ("O3", {}, "e4m3"),
        ("O2", {}, "compute"),
        ("O3", {"rules": ("down_proj=plain",)}, "e4m3"),  # reads what its own device has made
        ("O3", {"rules": ("up_proj=plain",)}, "compute"),
        ("O3", {"num_experts": 4, "experts_per_token": 2}, "compute"),
    ),
)
def test_activations_are_gathered_as_codes_where_all_that_read_them_read_codes(level, options, gathers):
    model = run_of(level, sequence_parallel=True, **options).parts.model
    assert model.config.gather == gathers
    assert run_of(level, **options).parts.model.config.gather == "compute"  # nothing is gathered


def test_matrices_that_fit_and_that_do_not():
    """By default: embeddings, the head, norms and biases are left; sides have to be multiples of 16."""
    run = run_of("O1", scan_layers=True, intermediate_size=40, qkv_bias=True, num_kv_heads=1)
    assigned = run.parts.numerics.assigned
    assert [name for name, transform in assigned.items() if transform == "fp8"] == [
        f"layers/self_attn/{name}_proj/kernel" for name in ("o", "q")
    ]
    text = run.parts.numerics.describe()
    assert "sides that are no multiples of 16" in text and "embedding or head" in text and "norm, bias" in text
    shares = [float(word.strip("%,")) for word in text.split() if "%" in word]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_first_rule_that_matches_decides():
    kernel = {"kernel": jax.ShapeDtypeStruct((2, 32, 64), jnp.float32)}
    shapes = {"layers": {"mlp": {"gate_proj": kernel, "up_proj": kernel}}}
    decided = lambda *rules: [transform[0] for transform in assign(shapes, rules, "fp8").values()]
    assert decided() == ["f", "f"]
    assert decided("up_proj=plain", "layers=ternary") == ["t", "p"]
    assert decided(r"layers/\*/mlp/gate=ternary") == ["t", "f"]
    with pytest.raises(UserError, match="'up_proj=plain', which matches no weight"):  # the first one has them all
        decided("layers=ternary", "up_proj=plain")
