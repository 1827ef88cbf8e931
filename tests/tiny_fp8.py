"""Parts of tests with FP8: one weight, and runs of a model of two layers whose matrices all multiply in FP8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import Mesh, NamedSharding

from easylm_plus.config import base
from easylm_plus.models.transformer import init_parameters
from easylm_plus.numerics import handles
from easylm_plus.numerics.formats import E4M3, Scaled, decode, encode
from easylm_plus.numerics.fp8 import Fp8
from easylm_plus.numerics.verbs import project
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training.assembly import Assembly, assemble
from easylm_plus.training.gradients import gradients
from easylm_plus.training.optimizer import global_norm
from easylm_plus.tree import path_name

ROWS, LENGTH, VOCAB, STEPS = 16, 32, 64, 100
MODEL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4,
         "num_kv_heads": 2, "head_dim": 8, "max_length": 64, "init": "fan_in", "attention": "xla"}  # fmt: skip

KEYS = {
    "level": "numerics.fp8_level",
    "precision": "numerics.precision",
    "window": "numerics.fp8_window",
    "reduction": "numerics.fp8_reduction",
    "rules": "numerics.rules",
    "accumulate": "train.accumulate",
    "zero": "optimizer.zero",
    "rate": "optimizer.learning_rate",
    "master": "optimizer.master",
    "first_moment": "optimizer.first_moment",
    "second_moment": "optimizer.second_moment",
    "rounding": "optimizer.rounding",
    "clip": "optimizer.clip_norm",
    "decay": "optimizer.decay",
    "ema": "train.ema",
    "sequence_parallel": "mesh.sequence_parallel",
    "chunk": "objective.chunk",
    "lora": "numerics.lora",
    "warmup": "numerics.ternary_warmup",
}


def sqnr(got, expected):
    """Signal to error, in dB."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    error = np.square(got - expected).sum()
    return 10 * np.log10(np.square(expected).sum() / error) if error else np.inf


def codes(x):
    """As bytes, for comparing bit for bit."""
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


# --- one weight ---


def leaf(w, axes=("embed", "mlp"), **fields):
    """w[..., D, F], or a Scaled of E4M3 codes, as a weight that multiplies in FP8."""
    w = w if isinstance(w, Scaled) else encode(jnp.asarray(w), E4M3)
    empty = dict.fromkeys(field.name for field in dataclasses.fields(Fp8))
    parts = {"weight": w.code, "scale": jnp.ones_like(w.scale_inv), "scale_inv": w.scale_inv, "axes": axes}
    return Fp8(**(empty | parts | fields))


def forward_and_backward(w, x, dy, jit=jax.jit):
    """(y, dx, the cotangent of the handle) of a product."""

    def run(handle, x, dy):
        y, backward = jax.vjp(lambda handle, x: project(x, handles.hold(w, handle)), handle, x)
        handle, dx = backward(dy)
        return y, dx, handle

    return jit(run)(handles.handle_of(w), x, dy)


# --- a run ---


@dataclasses.dataclass(eq=False)
class Run:
    """A run on a mesh, before its first step."""

    parts: Assembly
    mesh: Mesh
    accumulate: int
    state: object = None

    def start(self, seed=0):
        """With fresh parameters."""
        with sharding.use(self.mesh, self.parts.rules):
            params = jax.device_put(self.parameters(seed), self.parts.param_shardings)
            self.state = jax.jit(self.parts.make_state, out_shardings=self.parts.shardings)(params)
        return self

    def parameters(self, seed=0):
        """Fresh ones, on the host."""
        return parameters(self.parts.model, seed)

    def batch(self, seed=0):
        """The same on every mesh."""
        cut = NamedSharding(self.mesh, sharding.spec_of(("batch", "length"), (ROWS, LENGTH), self.mesh))
        return jax.device_put(tiny.random_batch(ROWS, LENGTH, VOCAB, seed), cut)

    def gradients(self, seed=0):
        """(loss, {name: gradient as the optimizer gets it}, {name: what was seen}) of a batch."""
        with sharding.use(self.mesh, self.parts.rules):
            grads, seen, loss, _ = self.gradients_program(self.state, self.batch(seed))
        return float(loss), by_name(grads), seen

    @functools.cached_property
    def gradients_program(self):
        """(state, batch) -> what training.gradients.gradients gives, the making of the view included."""
        numerics = self.parts.numerics

        def run(state, batch):
            view = numerics.view(state.params, state.numerics)
            return gradients(self.parts.objective, view, batch, self.accumulate, numerics)

        with sharding.use(self.mesh, self.parts.rules):
            return jax.jit(run).lower(self.parts.state, self.batch()).compile()

    def steps(self, count):
        """Losses of that many steps; the state is that after them."""
        losses = []
        with sharding.use(self.mesh, self.parts.rules):
            for number in range(count):
                self.state, metrics = self.parts.step(self.state, self.batch(number % 3))
                losses.append(float(metrics["loss"]))
        return losses

    def compiled_step(self):
        """The optimised program of a step, as text."""
        with sharding.use(self.mesh, self.parts.rules):
            return self.parts.step.lower(self.parts.state, self.batch()).compile().as_text()


@functools.cache
def parameters(model, seed):
    """Fresh, on the host: the same whatever the run does with them."""
    with jax.set_mesh(jax.make_mesh((), ())):
        return jax.tree.map(np.asarray, jax.jit(lambda: init_parameters(model, jax.random.key(seed)))())


def run_of(level, sizes=None, **options):
    """A run at a level on a mesh of these axes; `options` are names in KEYS, or change MODEL."""
    sizes = sizes or {}
    config = base("debug", **(MODEL | {name: value for name, value in options.items() if name not in KEYS}))
    config.optimizer.update({"learning_rate": 3e-3, "weight_decay": 0.1, "schedule": "constant"})
    for name, value in ({"level": level, "precision": "float32", "chunk": 64} | options).items():
        if name in KEYS:
            section, key = KEYS[name].split(".")
            config[section][key] = value
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    return Run(assemble(config, mesh, 2, STEPS), mesh, config.train.accumulate)


def by_name(tree):
    """{name: leaf}, with the layers of an unrolled model stacked as those of a scanned one."""
    is_leaf = lambda x: isinstance(x, Scaled)
    named = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}
    names = {name.replace("layers/0/", "layers/") for name in named if not name.startswith("layers/1/")}
    layers = lambda name: [named[name.replace("layers/", f"layers/{i}/", 1)] for i in range(MODEL["num_layers"])]
    stack = lambda name: jax.tree.map(lambda *xs: jnp.stack(xs), *layers(name))
    return {name: named[name] if name in named else stack(name) for name in sorted(names)}


def flat(grads):
    """All gradients as one vector."""
    return np.concatenate([np.asarray(decode(g), np.float64).ravel() for g in grads.values()])


def norm_of(grads):
    return float(global_norm(grads))
