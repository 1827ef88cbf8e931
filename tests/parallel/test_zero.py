"""Algorithm 1 as released, and whole matrices dealt out so that every rank runs the same program on its own."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_fp8 import run_of, sqnr

from easylm_plus.errors import UserError
from easylm_plus.numerics.formats import E4M3, FP16, decode, encode, is_scaled
from easylm_plus.numerics.reduction import encode_shared, owned_sum_of_slot
from easylm_plus.parallel import sharding, zero
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning import wire
from easylm_plus.training import scaled_adam
from easylm_plus.tree import path_name

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8" / "d_zero_greedy.npz")
SETS = [key.removesuffix("_sizes") for key in GOLDEN.files if key.endswith("_sizes") and not key.startswith("ds_")]
SHAPES = {"a": {"b": (3, 16, 32), "c": (5, 2, 32, 16)}, "d": (32, 16), "e": (64,), "f": (4, 16, 16)}
DEALT = {"a/b": "x", "a/c": "y", "d": "x", "f": "x"}
RANKS = (1, 3, 8, 16)


def golden_plan(name):
    return zero.plan(GOLDEN[f"{name}_sizes"].tolist(), int(GOLDEN[f"{name}_n"]))


def tree(seed=0, matrix=lambda x: x):
    """Of the shapes above, each matrix of another magnitude, over several orders."""

    def fill(path, shape):
        key = jax.random.fold_in(jax.random.key(seed), len(str(path)) * len(shape))
        x = jax.random.normal(key, shape)
        if path_name(path) not in DEALT:
            return x
        return matrix(x * 10.0 ** jax.random.randint(key, (*shape[:-2], 1, 1), -5, 3))

    return jax.tree_util.tree_map_with_path(fill, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def deal(ranks):
    return zero.Deal(jax.eval_shape(tree), DEALT, ranks)


# --- who owns what ---


@pytest.mark.parametrize("name", SETS)
def test_owners_are_those_of_the_released_code(name):
    plan = golden_plan(name)
    np.testing.assert_array_equal(plan.owner, GOLDEN[f"{name}_rank"])
    np.testing.assert_array_equal(plan.load, GOLDEN[f"{name}_load"])
    np.testing.assert_array_equal(np.bincount(plan.owner, minlength=len(plan.load)), GOLDEN[f"{name}_count"])
    assert max(plan.load) == GOLDEN[f"{name}_shard"]


def test_a_second_group_is_dealt_to_those_with_least_of_the_first():
    sizes = [GOLDEN[f"ds_group{i}_sizes"].tolist() for i in (0, 1)]
    first = zero.plan(sizes[0], int(GOLDEN["ds_n"]))
    second = zero.plan(sizes[1], int(GOLDEN["ds_n"]), before=first.load)
    np.testing.assert_array_equal(first.owner, GOLDEN["ds_group0_rank"])
    np.testing.assert_array_equal(second.owner, GOLDEN["ds_group1_rank"])
    assert zero.plan(sizes[1], int(GOLDEN["ds_n"])).owner != second.owner
    assert sum(second.load) == sum(sizes[1])  # its own row holds its own tensors only


@pytest.mark.parametrize(
    "name, imbalance", (("llama7b_n32", 1.0), ("gpt13b_tp2_n16", 1.0), ("gpt125m_n32", 4 / 3), ("lpt_worst_n3", 11 / 9))
)
def test_loads_are_even_where_there_are_tensors_enough(name, imbalance):
    plan = golden_plan(name)
    even = sum(plan.load) / len(plan.load)
    assert max(plan.load) / even == pytest.approx(imbalance, abs=1e-9)
    sizes = GOLDEN[f"{name}_sizes"]
    dealt_in_turn = np.bincount(np.arange(len(sizes)) % len(plan.load), sizes)
    assert dealt_in_turn.max() >= max(plan.load)


# --- the stacks ---


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("fmt", (None, FP16))
def test_laying_out_and_naming_are_inverse(ranks, fmt):
    """Of arrays, and of codes with their factors."""
    named = tree(matrix=(lambda x: encode(x, fmt)) if fmt else lambda x: x)
    laid = jax.jit(deal(ranks).lay)(named)
    assert sorted(laid[zero.DEALT]) == ["x_256", "x_512", "y_512"]
    assert laid["a"] == {"b": None, "c": None} and laid["d"] is None and (laid["e"] == named["e"]).all()
    back = jax.jit(deal(ranks).named)(laid)
    assert jax.tree.structure(back) == jax.tree.structure(named)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(named)))


@pytest.mark.parametrize("ranks", RANKS)
def test_each_matrix_is_once_with_its_owner(ranks):
    """In the order of the tree they are those of Algorithm 1; the rest of a stack is zeros, with factors of 1."""
    dealt = deal(ranks)
    owner = iter(zero.plan([512] * 3 + [512] * 10 + [512] + [256] * 4, ranks).owner)
    for key, name, count in (("x_512", "a/b", 3), ("y_512", "a/c", 10), ("x_512", "d", 1), ("x_256", "f", 4)):
        stack = dealt.stacks[key]
        for number in range(stack.first[name], stack.first[name] + count):
            assert np.nonzero(stack.matrix == number)[1].tolist() == [next(owner)]
    packed = dealt.pack({name: encode(jnp.ones(shape), E4M3) for name, shape in dealt.shapes.items()})
    for key, count in (("x_256", 4), ("x_512", 4), ("y_512", 10)):
        values, numbers = decode(packed[key]), dealt.stacks[key].matrix
        assert numbers.shape[1] == ranks and ((values == 1).all((-2, -1)) == (numbers < count)).all()
        assert ((values == 0).all((-2, -1)) == (numbers == count)).all() and (numbers < count).sum() == count
        assert (packed[key].scale_inv[numbers == count] == 1).all()


def test_what_is_said_of_a_weight_is_said_of_its_matrices():
    dealt = deal(3)
    layers = {"a/b": np.arange(3), "a/c": np.arange(10).reshape(5, 2), "d": 7, "f": np.arange(4)}
    named = {name: jnp.broadcast_to(jnp.asarray(x)[..., None, None], dealt.shapes[name]) for name, x in layers.items()}
    for key, stack in dealt.pack(named).items():
        assert stack.shape[2:] == {"x_256": (16, 16), "x_512": (16, 32), "y_512": (32, 16)}[key]
        np.testing.assert_array_equal(dealt.of_matrices(key, layers), stack[..., 0, 0])


def of_layers(D, F, layers, gated):
    """The matrices of a LLaMA, or of a GPT."""
    shapes = dict.fromkeys("qkvo", (layers, D, D)) | {"up": (layers, D, F), "down": (layers, F, D)}
    shapes |= {"gate": (layers, D, F)} if gated else {}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "sizes, padding",
    (
        ((4096, 11008, 32, True), (0, 0)),  # LLaMA 7B
        ((5120, 13824, 40, True), (0, 0.177)),  # 13B
        ((4096, 16384, 32, False), (0, 0)),  # FP8-LM's GPT 7B
        ((5120, 20480, 40, False), (0, 0.267)),  # 13B
    ),
)
def test_the_padding_that_the_documentation_names(sizes, padding):
    """On 8 ranks and on 32."""
    shapes = of_layers(*sizes)
    found = [zero.Deal(shapes, dict.fromkeys(shapes, "fp8"), ranks).padding for ranks in (8, 32)]
    assert found == pytest.approx(padding, abs=5e-4)


# --- one program on all ranks ---


def test_gradients_are_summed_by_their_owners():
    """Each matrix with a scale of its own; a byte an element travels, and no float but the scales."""
    dealt, axis = deal(8), "replica"
    per_rank = [tree(seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *per_rank)
    named = lambda t: {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(t) if path_name(p) in DEALT}

    def region(own):
        of_owner = lambda grads: dealt.pack({name: g[0] for name, g in grads.items()}, own)
        mesh = make_mesh({axis: 8})
        return jax.jit(jax.shard_map(of_owner, mesh=mesh, in_specs=P(axis), out_specs=P(None, axis), check_vma=False))

    def quality(own):
        """Of the matrices' sums, in dB."""
        sums = dealt.unpack(region(own)(named(stacked)))
        both = [(np.asarray(decode(sums[name])), np.asarray(g.sum(0))) for name, g in named(stacked).items()]
        matrices = [zip(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *x.shape[-2:])) for x, y in both]
        return np.array([sqnr(x, y) for pairs in matrices for x, y in pairs])

    summed = lambda slot: owned_sum_of_slot(encode_shared(slot, (axis,)), axis)
    assert (quality(summed) > 27).all(), "matrix by matrix"
    alone = lambda slot: encode_shared(slot[jax.lax.axis_index(axis)][None], ())
    assert (quality(alone) < 27).any(), "what the owner has of its own would be seen"
    program = region(summed)
    text = program.lower(named(stacked)).compile().as_text()
    sent = {key: traffic.wire for key, traffic in wire.wire_bytes(text).items() if key[1] == "u8"}
    slots = sum(stack.matrix.shape[0] * (256 if key == "x_256" else 512) for key, stack in dealt.stacks.items())
    assert sent == {("all-to-all", "u8"): 7 * slots}
    assert all(np.prod(dims) <= 8 for _, dims, _, _ in wire.float_collectives(text)), "an amax of each of a slot's"


# --- runs ---

SHARDED, WHOLE = {"zero": "sharded"}, {"zero": "whole_tensor"}


def run(level, zero, **options):
    values = {"scan_layers": True, "clip": 0.0, **zero, **options}
    return run_of(level, {"replica": 4}, **values).start()


def by_name(run):
    """{name: leaf} of everything that is kept between steps."""
    with sharding.use(run.mesh, run.parts.rules):
        saved = run.parts.to_saved(run.state)
    trees = {"params": saved.params, "m": saved.opt_state.m, "v": saved.opt_state.v, "ema": saved.ema}
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(trees)}


TRANSFORMS = {"rules": ("gate_proj=plain", "k_proj=narrow"), "decay": "mlp/.*kernel"}
FEW = {"rules": ("self_attn=plain",)}  # with fewer matrices in FP8: compiled sooner
LEARNING = {
    "nearest": {"rounding": "nearest", **FEW},
    "accumulated": {"accumulate": 2, "ema": 0.9},
    "other transforms": TRANSFORMS,
    "accumulated, other transforms": {"accumulate": 2, "ema": 0.9, **TRANSFORMS},
    "experts": {"num_experts": 4, "experts_per_token": 2, **FEW},
}
SLOW = pytest.mark.slow
QUICK = {("nearest", "O3"), ("accumulated, other transforms", "O3"), ("experts", "O2")}


def four_steps(run):
    """Losses; the first batch is there twice."""
    return run.steps(1) + run.steps(3)


@functools.cache
def learned(name, level, how):
    """(losses of four steps, {name: leaf} of all that is kept after the first of them, and after the last)."""
    started = run(level, {"zero": how}, **LEARNING[name])
    losses = started.steps(1)
    early = by_name(started)
    return losses + started.steps(3), early, by_name(started)


@pytest.mark.parametrize(
    ("name", "level"),
    [case if case in QUICK else pytest.param(*case, marks=SLOW) for case in itertools.product(LEARNING, ("O2", "O3"))],
)
def test_whole_matrices_learn_what_parts_of_them_learn(name, level):
    """Bit for bit, random numbers included: nothing but the places differ. Without clipping, whose norm is a sum in
    another order."""
    (losses, _, ours), (others, _, theirs) = (learned(name, level, how) for how in ("whole_tensor", "sharded"))
    assert losses == others
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype and x.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("level", (pytest.param("O2", marks=SLOW), "O3"))
def test_ternary_matrices_too(level):
    """Where masters are cut, mean |W| is a sum in another order: the first loss is the same to float32, and later ones
    as near as a code leaves them that was turned."""
    ours, theirs = (run(level, how, rules=("gate_proj=ternary", *FEW["rules"])).steps(4) for how in (WHOLE, SHARDED))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    np.testing.assert_allclose(ours, theirs, atol=0.02 * (ours[0] - ours[3]))
    plain = learned("nearest", level, "whole_tensor")[0]
    assert abs(plain[0] - ours[0]) > 1e-3


def test_layers_of_their_own():
    """Of a model that is not scanned. Parts are not updated in a loop there, but by another program, whose float32 sums
    may round differently: a master in a thousand, by a place."""
    ours, theirs = (run("O3", how, scan_layers=False, window=16, **FEW) for how in (WHOLE, SHARDED))
    np.testing.assert_allclose(ours.steps(4), theirs.steps(4), rtol=1e-6)
    ours, theirs = (by_name(r) for r in (ours, theirs))
    masters = [name for name, x in ours.items() if x.dtype == np.float16 and name.startswith("params")]
    flat = lambda kept: np.concatenate([kept[name].ravel() for name in masters]).astype(np.float64)
    apart = np.abs(flat(ours) - flat(theirs)) / np.abs(flat(theirs)).clip(2.0**-14)
    assert len(masters) == 6 and (apart > 0).mean() < 1e-3 and apart.max() < 2.0**-9


@pytest.mark.parametrize("what", ("weight", pytest.param("matrix", marks=SLOW)))
def test_other_random_numbers_are_seen(what, monkeypatch):
    """If they came from another number of the weight, or of the matrix: a good part of the masters would differ."""
    of_stack = scaled_adam.of_stack
    other = lambda *args: (own := of_stack(*args))._replace(**{what: getattr(own, what) + 1})
    name = "accumulated, other transforms"
    theirs = learned(name, "O3", "sharded")[1]
    monkeypatch.setattr(scaled_adam, "of_stack", other)
    ours = run("O3", WHOLE, **LEARNING[name])
    ours.steps(1)
    ours = by_name(ours)
    masters = [name for name, x in ours.items() if x.dtype == np.float16 and name.startswith("params")]
    assert min((ours[name] != theirs[name]).mean() for name in masters) > 0.1


def test_norm_of_gradients_clips_alike():
    ours, theirs = (four_steps(run("O3", how, clip=0.1, **LEARNING["nearest"])) for how in (WHOLE, SHARDED))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert abs(np.subtract(ours, learned("nearest", "O3", "sharded")[0])).max() > 1e-3, "what is not clipped is seen"


def test_what_lies_on_a_device():
    """Its own matrices, and of the rest a fourth."""
    ours = run("O3", WHOLE)
    dealt = ours.state.params[zero.DEALT]
    assert all(is_scaled(x) and x.code.sharding.spec[1] == "replica" for x in dealt.values())
    assert all(x.scale_inv.sharding.spec[1] == "replica" for x in dealt.values()), "and nobody has another's scales"
    elements = sum(x.code.size for x in dealt.values())
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert matrices < elements < 1.5 * matrices  # few matrices of a few sizes: there is padding
    assert all(x.code.addressable_shards[0].data.size == x.code.size / 4 for x in dealt.values())
    assert sum((decode(x) != 0).sum() for x in dealt.values()) > 0.99 * matrices
    table = ours.state.params["embed_tokens"]["embedding"]
    assert table.addressable_shards[0].data.size == table.size / 4


def test_weights_travel_once_and_gradients_once_in_bytes():
    ours = run("O3", WHOLE, accumulate=2)
    text = ours.compiled_step()
    table = wire.wire_bytes(text)
    elements = sum(x.code.size for x in ours.state.params[zero.DEALT].values())
    assert table["all-gather", "u8"].payload == elements
    assert table["all-to-all", "u8"].payload == elements
    trips = {c.trips for c in wire.collectives(text) if c.kind == "all-to-all"}
    assert trips == {1}, "not in loops, of which XLA:CPU mixes up several (jax 0.12)"
    table_of_words = ours.state.params["embed_tokens"]["embedding"].size  # in float32 here, as is the head
    wide = [dims for _, dims, _, _ in wire.float_collectives(text) if np.prod(dims) > 64]
    assert wide and all(np.prod(dims) in (table_of_words, table_of_words / 4) for dims in wide), wide


@pytest.mark.parametrize(
    "level, sizes, options, words",
    (
        ("O2", {"replica": 2, "fsdp": 2}, {}, "no mesh axis but mesh.replica larger than 1"),
        ("O1", {"replica": 2}, {"master": "fp16"}, "numerics.fp8_level = O2 or O3"),
        ("none", {"replica": 2}, {"master": "fp16", "rules": ("mlp=ternary",)}, "numerics.fp8_level = O2 or O3"),
        ("O2", {"replica": 2}, {"lora": ("q_proj=4",)}, "and no adapters"),
        ("O2", {"replica": 2}, {"master": "float32"}, "a master with a scale"),
        ("O2", {"replica": 2}, {"reduction": "ring"}, "fp8_reduction = two_shot"),
    ),
)
def test_where_whole_tensors_cannot_be(level, sizes, options, words):
    with pytest.raises(UserError, match=f"optimizer.zero = 'whole_tensor': expected .*{words}"):
        run_of(level, sizes, zero="whole_tensor", **options)


def test_one_device_owns_all():
    """Nothing is dealt out, and nothing else is done."""
    assert run_of("O2", {}, zero="whole_tensor").parts.numerics.deal is None
