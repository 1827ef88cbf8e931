"""Runs of a tiny model whose weights multiply in FP8, as train.py makes them, without the door."""

import jax
import numpy as np
import tiny
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from tiny_fp8 import parameters

from easylm_plus.config import base
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.training.assembly import Assembly, assemble

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "max_length": 64, "init": "fan_in", "attention": "xla", "scan_layers": True,
}  # fmt: skip
ROWS, LENGTH = 8, 16


def config(level: str = "O3", **values: object) -> ConfigDict:
    """A config of that level; `values` are keys with "__" for the dot; sides are multiples of 16: all matrices fit.

    Those of attention are plain unless `values` have other rules: a step is compiled a third sooner.
    """
    made = base("debug", **SHAPE)
    made.numerics.update({"precision": "float32", "fp8_level": level, "rules": ("self_attn=plain",)})
    made.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "constant"})
    made.objective.chunk = 64
    for key, value in values.items():
        section, name = key.split("__")
        made[section][name] = value
    return made


class Run:
    """A config on a mesh of these sizes: its assembly, and functions that call it in the mesh."""

    def __init__(self, config: ConfigDict, sizes: dict[str, int]):
        count = int(np.prod(list(sizes.values()) or [1]))
        self.mesh = make_mesh(sizes, jax.devices()[:count])
        self.assembly: Assembly = assemble(config, self.mesh, 2, 100)

        self._make_state = jax.jit(self.assembly.make_state, out_shardings=self.assembly.shardings)

    def start(self):
        """The state before the first step."""
        with sharding.use(self.mesh, self.assembly.rules):
            return self._make_state(jax.device_put(parameters(self.assembly.model, 0), self.assembly.param_shardings))

    def batch(self, seed: int, **more: np.ndarray):
        """A batch of random tokens on the mesh; `more` are fields [ROWS] beside the usual ones."""
        with sharding.use(self.mesh, self.assembly.rules):
            cut = lambda x: NamedSharding(
                self.mesh, sharding.spec_of(("batch", "length")[: x.ndim], x.shape, self.mesh)
            )
            fields = tiny.random_batch(ROWS, LENGTH, SHAPE["vocab_size"], seed) | more
            return {name: jax.device_put(x, cut(x)) for name, x in fields.items()}

    def step(self, state, batch):
        """(state, metrics) after a batch; the state given is donated."""
        with sharding.use(self.mesh, self.assembly.rules):
            return self.assembly.step(state, batch)

    def steps(self, state, first: int, last: int):
        """(state, losses) after batches `first` to `last` - 1; the state given is donated."""
        losses = []
        for number in range(first, last):
            state, metrics = self.step(state, self.batch(number))
            losses.append(float(metrics["loss"]))
        return state, losses


def bits(tree) -> list[bytes]:
    """Every bit of a tree."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
