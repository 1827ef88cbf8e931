"""The real training step, compiled for the devices of a machine that need not be here: its memory and its text.

Memory comes from two sources, which do not add up to each other. Bytes by part are exact, from the shapes and shardings
of what a step keeps and makes: weights, optimizer, the step's own copies of weights, gradients. The compiler's figures
(`memory_analysis`) are of the whole program: its arguments, what it works in (temporary), and the peak, which is less
than their sum where donated arguments are used again. What the parts leave of the peak is activations, the loss and
workspace.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from easylm_plus.errors import UserError
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning.memory import Made, human, made_by_a_step, sharded_bytes
from easylm_plus.training.assembly import Assembly, assemble
from easylm_plus.training.data import batch_shapes, batch_sharding
from easylm_plus.tree import path_name

STEPS = 1_000_000  # of the schedule: a number in the program
VOCABULARY = ("embed_tokens/", "lm_head/")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. Those of embedding and head are in `vocabulary`, whatever they are."""

    weights: int  # masters, as they are kept between steps
    optimizer: int  # moments, and the weights' running mean
    copies: int  # weights as this step multiplies by them, where that is not as they are kept
    gradients: int  # of one micro-batch, and their sum so far
    vocabulary: int
    rest: int  # of the peak: activations, logits, workspace
    peak: int  # by the compiler, as are the next two; that for CPUs leaves out what it works in
    arguments: int
    temporary: int

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {human(getattr(self, field.name))}" for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for a mesh."""

    assembly: Assembly
    executable: Any  # jax.stages.Compiled
    seconds: float
    parts: int  # micro-batches
    made: list[Made]  # what the step makes of and for each weight

    @property
    def hlo(self) -> str:
        """The optimised program's text."""
        return self.executable.as_text()

    def memory(self) -> Memory:
        """By part."""
        a, found = self.assembly, self.executable.memory_analysis()
        own = np.zeros((4, 2), int)  # by part: bytes, and those of the vocabulary
        for part, tree in enumerate((a.state.params, (a.state.opt_state, a.state.ema))):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                own[part, _of_vocabulary(path_name(path))] += sharded_bytes(leaf, leaf.sharding)
        for weight in self.made:
            own[2:, _of_vocabulary(weight.name)] += weight.copies, weight.gradients(self.parts)
        (weights, optimizer, copies, gradients), vocabulary = own[:, 0].tolist(), int(own[:, 1].sum())
        peak = found.peak_memory_in_bytes
        return Memory(
            weights, optimizer, copies, gradients, vocabulary, rest=peak - int(own.sum()), peak=peak,
            arguments=found.argument_size_in_bytes, temporary=found.temp_size_in_bytes,
        )  # fmt: skip


class DoesNotFit(UserError):
    """The step needs more memory than a device has."""


@contextmanager
def _told() -> Iterator[None]:
    """What a person can mend is a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "cuDNN not found" in str(error):
            raise UserError(
                "model.attention = 'cudnn': cuDNN is not installed; expected: pip install --no-deps nvidia-cudnn-cu13 "
                "(beside the CUDA plugin; 900 MB), or model.attention = xla or blocked"
            ) from None
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit(str(error).splitlines()[0]) from None
        raise


def _of_vocabulary(name: str) -> int:
    return int(any(part in f"{name}/" for part in VOCABULARY))


def compile_step(
    config: ConfigDict, devices: Sequence[Any], options: dict[str, Any] | None = None, sources: int = 1
) -> Compiled:
    """Compiles the training step of a config for a mesh of these devices (a Machine's, or `jax.devices()`).

    Raises DoesNotFit where the compiler refuses for want of memory: that for TPUs does, that for GPUs never.
    """
    started = time.perf_counter()
    mesh = make_mesh(config.mesh, list(devices))

    with _told():
        a = assemble(config, mesh, sources, STEPS)
        with sharding.use(mesh, a.rules):
            batch = batch_shapes(config, batch_sharding(config, mesh))
            executable = a.step.lower(a.state, batch).compile(options or None)
            made = made_by_a_step(a.state, a.shardings.params, a.numerics)
    return Compiled(a, executable, time.perf_counter() - started, config.train.accumulate, made)
