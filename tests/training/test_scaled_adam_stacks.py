"""FP8-LM's optimizer on stacks of matrices: each by itself, in place, cut over devices, in 6 bytes a parameter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easylm_plus.config import base
from easylm_plus.numerics.formats import E4M3, FP16, Scaled, encode
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training import scaled_adam
from easylm_plus.training.optimizer import global_norm
from easylm_plus.training.scaled_adam import Formats, scaled_adamw

OK = jnp.array(True)


def built(rounding="nearest"):
    config = base().optimizer
    config.update(learning_rate=1e-3, schedule="constant", weight_decay=0.1, clip_norm=1.0)
    return scaled_adamw(config, 50, lambda name: True, rounding=rounding)


def nested(name, leaf):
    """{"a": {"b": leaf}} of "a/b"."""
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    return leaf


def three_steps(name, weights, grads, rounding="nearest", seed_of_norm=7.0):
    """Codes and factors of p, m and v after three steps from weights with grads, both [..., D, F]."""
    optimizer = built(rounding)
    params = nested(name, encode(weights, FP16))
    state, step = optimizer.init(params), jax.jit(optimizer.step)
    for t in range(1, 4):
        gradient = nested(name, encode(grads * t, E4M3))
        params, state, _ = step(gradient, state, params, jnp.float32(seed_of_norm), OK)
    return [np.asarray(x) for x in jax.tree.leaves((params, state.m, state.v))]


def stacks(*shape):
    """Weights and gradients of which one matrix has 1000 times larger ones."""
    weights, grads = (jax.random.normal(jax.random.key(i), shape) for i in (0, 1))
    outlier = jnp.ones(shape).at[(1,) * (len(shape) - 2)].set(1000.0)
    return weights * outlier, grads * outlier


def each_alone(name, weights, grads):
    """The same, of a stack, matrix by matrix."""
    at = list(np.ndindex(weights.shape[:-2]))
    alone = [three_steps(name, weights[i], grads[i]) for i in at]
    return [np.stack(column).reshape(*weights.shape[:-2], *column[0].shape) for column in zip(*alone)]


def same(found, wanted):
    return [a.shape for a in found] == [a.shape for a in wanted] and all(
        a.tobytes() == b.tobytes() for a, b in zip(found, wanted)
    )


@pytest.mark.parametrize(
    "name, shape",
    (("layers/mlp/kernel", (3, 8, 6)), ("layers/experts/kernel", (2, 3, 8, 6)), ("layers/0/experts/kernel", (3, 8, 6))),
)
def test_each_matrix_of_a_stack_is_as_if_alone(name, shape, monkeypatch):
    """So layers that are stacked for a scan give the bits of layers that are not."""
    weights, grads = stacks(*shape)
    alone = each_alone("kernel", weights, grads)
    assert same(three_steps(name, weights, grads), alone)
    monkeypatch.setattr(scaled_adam, "amax", lambda x: jnp.full(x.shape[:-2], jnp.abs(x).max()))
    monkeypatch.setattr(scaled_adam, "loop_axis", lambda *_: None)
    assert not same(three_steps(name, weights, grads), alone), "one scale a stack"


def test_the_loop_goes_along_layers_and_not_along_experts():
    wide, narrow = jnp.ones((2, 3, 4, 4)), Scaled(jnp.ones((2, 3, 4, 4), jnp.float16), jnp.ones((2, 3)))
    axis = lambda name, *shape: scaled_adam.loop_axis(name, (jax.tree.map(lambda x: x[shape], narrow),) * 3)
    assert axis("layers/experts/up_proj/kernel") == 0
    assert axis("layers/0/experts/up_proj/kernel", 0) is None
    assert axis("layers/up_proj/kernel", 0) == 0
    assert axis("layers/up_proj/kernel") == 1, "behind the axis of pipeline stages"
    assert axis("lm_head/kernel", 0, 0) is None
    assert scaled_adam.loop_axis("layers/up_proj/kernel", (wide, wide, wide)) is None
    assert scaled_adam.loop_axis("layers/up_proj/kernel", (wide, narrow, wide)) == 1


# --- memory ---

LAYERS, D, F = 12, 64, 96


def abstract(fmt):
    shape = jax.ShapeDtypeStruct
    return Scaled(shape((LAYERS, D, F), fmt.dtype), shape((LAYERS,), jnp.float32))


def compiled(rounding):
    """The step with donated parameters and state, over one stack in the default formats; the gradient comes as bytes.

    (XLA:CPU copies an argument that is bitcast; within a training step the gradient is no argument.)
    """
    optimizer, params, grads = built(rounding), {"kernel": abstract(FP16)}, abstract(E4M3)
    whole = (params, jax.eval_shape(optimizer.init, params))

    def step(whole, bytes_, scale_inv, norm, ok):
        grads = {"kernel": Scaled(jax.lax.bitcast_convert_type(bytes_, E4M3.dtype), scale_inv)}
        return optimizer.step(grads, whole[1], whole[0], norm, ok)[:2]

    shape = jax.ShapeDtypeStruct
    arguments = shape(grads.shape, jnp.uint8), grads.scale_inv, shape((), jnp.float32), shape((), jnp.bool_)
    return jax.jit(step, donate_argnums=0).lower(whole, *arguments).compile()


@pytest.mark.parametrize("rounding, most", (("nearest", 4), ("stochastic", 7)))
def test_temporaries_are_those_of_one_layer_and_the_stacks_are_updated_in_place(rounding, most, monkeypatch):
    """In float32 matrices, and the first moment as bytes, which only XLA:CPU copies.

    (For an H100, ahead of time, at 32 x 4096 x 11008: 1.5 and 2.5 matrices, and no copy.)
    """
    program = compiled(rounding)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes <= most * 4 * D * F + LAYERS * D * F
    assert memory.alias_size_in_bytes >= 5 * LAYERS * D * F, "p, m and v are written where they were"
    assert not re.findall(rf"\[{LAYERS},{D},{F}\]\S* (?:copy|convert)\(", program.as_text())
    monkeypatch.setattr(scaled_adam, "loop_axis", lambda *_: None)
    assert compiled(rounding).memory_analysis().temp_size_in_bytes > 2 * LAYERS * 4 * D * F, "all layers at once"


def test_a_loop_over_fp8_itself_is_widened(monkeypatch):
    """Why stacks are carried as bytes."""
    monkeypatch.setattr(scaled_adam, "as_bytes", lambda tree: tree)
    assert re.findall(rf"f16\[{LAYERS},{D},{F}\]\S* convert\(", compiled("nearest").as_text())


def test_six_bytes_a_parameter():
    """Master 2, gradient 1, first moment 1, second 2 (equation 8); of float32, 16 (equation 7)."""

    def bytes_a_parameter(optimizer, params, grads):
        trees = (params, grads, jax.eval_shape(optimizer.init, params))
        codes = [x for x in jax.tree.leaves(trees) if len(x.shape) == 3]
        rest = [x for x in jax.tree.leaves(trees) if len(x.shape) < 3]
        assert sum(x.size for x in rest) <= 4 * LAYERS + 1, "a scale a matrix, and the count"
        return sum(x.size * x.dtype.itemsize for x in codes) / (LAYERS * D * F)

    assert bytes_a_parameter(built(), {"kernel": abstract(FP16)}, {"kernel": abstract(E4M3)}) == 6
    wide = {"kernel": jax.ShapeDtypeStruct((LAYERS, D, F), jnp.float32)}
    plain = scaled_adamw(base().optimizer, 50, lambda name: True, Formats("float32", "float32", "float32"))
    assert bytes_a_parameter(plain, wide, wide) == 16


# --- devices ---


def cut(tree, mesh):
    """Matrices over fsdp and tensor, all else on every device."""
    spec = lambda x: PartitionSpec(*(None,) * (x.ndim - 2), "fsdp", "tensor") if x.ndim > 1 else PartitionSpec()
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)


@pytest.mark.parametrize("rounding", ("nearest", "stochastic"))
def test_eight_devices_give_the_bits_of_one(rounding):
    mesh, optimizer = make_mesh({"fsdp": 4, "tensor": 2}), built(rounding)
    weights, grads = stacks(3, 16, 12)
    params = {"layers": {"kernel": encode(weights, FP16)}, "kernel": encode(weights[1], FP16)}
    gradient = {"layers": {"kernel": encode(grads, E4M3)}, "kernel": encode(grads[1], E4M3)}
    norm, step = global_norm(gradient), jax.jit(optimizer.step)
    results, program = [], None
    for place in (lambda tree: tree, lambda tree: cut(tree, mesh)):
        whole, g = place((params, optimizer.init(params))), place(gradient)
        program = step.lower(g, whole[1], whole[0], norm, OK).compile().as_text()
        for _ in range(3):
            whole = step(g, whole[1], whole[0], norm, OK)[:2]
        results.append([np.asarray(x) for x in jax.tree.leaves(whole)])
    assert same(*results)
    assert [x.sharding.spec for x in jax.tree.leaves(whole) if x.ndim > 1] == [
        x.sharding.spec for x in jax.tree.leaves(place((params, optimizer.init(params)))) if x.ndim > 1
    ]
    found = set(
        re.findall(r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", program)
    )
    assert found and {kind for _, kind in found} == {"all-reduce"}
    assert all(re.fullmatch(r"f32\[\]|\((f32\[\](, )?)+\)", shape) for shape, _ in found), found
