"""The real training step, compiled for the devices of a machine that need not be here: its memory and its text.

Memory by part comes from two sources that do not add up to each other. The state's bytes are exact, from its shapes.
The compiler's own figures (`memory_analysis`) say what the whole program takes: arguments, what it works in (temp), and
the peak; arguments and temp do not sum to the peak, since donated arguments are reused.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning.memory import human, sharded_bytes
from easylm_plus.training.assembly import Assembly, assemble
from easylm_plus.training.data import batch_shapes, batch_sharding
from easylm_plus.tree import path_name

STEPS = 1000  # of the schedule; a number in the program
VOCABULARY = ("embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for a mesh."""

    assembly: Assembly
    executable: Any  # jax.stages.Compiled
    seconds: float

    @property
    def hlo(self) -> str:
        """The optimised program's text."""
        return self.executable.as_text()

    def memory(self) -> dict[str, int]:
        """Bytes on one device, by part."""
        found = self.executable.memory_analysis()
        state, shardings = self.assembly.state, self.assembly.shardings
        return {
            "parameters": sharded_bytes(state.params, shardings.params),
            "optimizer": sharded_bytes(state.opt_state, shardings.opt_state),
            "vocabulary": self._vocabulary_bytes(),
            "arguments": found.argument_size_in_bytes,
            "temporary": found.temp_size_in_bytes,
            "peak": found.peak_memory_in_bytes,
        }

    def _vocabulary_bytes(self) -> int:
        """Embedding and head, and what the optimizer keeps for them."""
        leaves = jax.tree_util.tree_leaves_with_path((self.assembly.state.params, self.assembly.state.opt_state))
        mine = [leaf for path, leaf in leaves if any(name in path_name(path) for name in VOCABULARY)]
        return sum(sharded_bytes(leaf, leaf.sharding) for leaf in mine)


def compile_step(
    config: ConfigDict, devices: Sequence[Any], options: dict[str, Any] | None = None, sources: int = 1
) -> Compiled:
    """Compiles the training step of a config for a mesh of these devices (a Machine's, or `jax.devices()`)."""
    mesh = make_mesh(config.mesh, list(devices))
    assembly = assemble(config, mesh, sources, STEPS)
    started = time.perf_counter()
    with sharding.use(mesh, assembly.rules):
        batch = batch_shapes(config, batch_sharding(config, mesh))
        executable = assembly.step.lower(assembly.state, batch).compile(options or None)
    return Compiled(assembly, executable, time.perf_counter() - started)


def describe(memory: dict[str, int]) -> str:
    """ "parameters 1.0 GiB, ..." """
    return ", ".join(f"{name} {human(count)}" for name, count in memory.items())
