"""The real training step, compiled for the devices of a machine that need not be here: its memory and its text.

Memory comes from two sources, which do not add up to each other. Bytes by part are exact, from the shapes and shardings
of what a step keeps and makes: weights, optimizer, the step's own copies of weights, gradients. The compiler's figures
(`memory_analysis`) are of the whole program: its arguments, what it works in (temporary), and the peak, which is less
than their sum where donated arguments are used again. What the parts leave of the peak is activations, the loss and
workspace.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from easylm_plus.errors import UserError
from easylm_plus.parallel import sharding
from easylm_plus.parallel.mesh import make_mesh
from easylm_plus.planning.memory import human, sharded_bytes
from easylm_plus.training.assembly import Assembly, assemble
from easylm_plus.training.data import batch_shapes, batch_sharding
from easylm_plus.training.gradients import accumulate
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
    view: Any  # abstract: the weights as the step multiplies by them
    gradients: list[Any]  # abstract: of one micro-batch, and their sum so far where there are several

    @property
    def hlo(self) -> str:
        """The optimised program's text."""
        return self.executable.as_text()

    def memory(self) -> Memory:
        """By part."""
        a, found = self.assembly, self.executable.memory_analysis()
        trees = [
            self._kept(a.state.params),
            self._kept((a.state.opt_state, a.state.ema)),
            self._made(self.view, lambda name, leaf: (leaf.dtype, self._weights[name][1]) != self._stored[name]),
            np.sum([self._made(tree) for tree in self.gradients], axis=0),
        ]
        own, vocabulary = [int(tree[0]) for tree in trees], int(sum(tree[1] for tree in trees))
        peak = found.peak_memory_in_bytes
        return Memory(
            weights=own[0], optimizer=own[1], copies=own[2], gradients=own[3], vocabulary=vocabulary,
            rest=peak - sum(own) - vocabulary, peak=peak,
            arguments=found.argument_size_in_bytes, temporary=found.temp_size_in_bytes,
        )  # fmt: skip

    @functools.cached_property
    def _weights(self) -> dict[str, tuple[Any, Any]]:
        """Of each parameter as the model has it: (shape, sharding), by name."""
        leaves = jax.tree_util.tree_leaves_with_path(self.assembly.shapes)
        places = jax.tree.leaves(self.assembly.param_shardings)
        return {path_name(path): (leaf.shape, place) for (path, leaf), place in zip(leaves, places, strict=True)}

    @functools.cached_property
    def _stored(self) -> dict[str, tuple[Any, Any]]:
        """Of each parameter as it is kept: (dtype, sharding)."""
        leaves = jax.tree_util.tree_leaves_with_path(self.assembly.state.params)
        arrays = [(path, leaf) for path, leaf in leaves if not path_name(path).endswith("/scale_inv")]
        return {self._parameter(path): (leaf.dtype, leaf.sharding) for path, leaf in arrays}

    def _parameter(self, path: Any) -> str:
        """The parameter that an array belongs to: ".../kernel/code" -> ".../kernel"."""
        name = path_name(path)
        return next(own for own in self._weights if f"{name}/".startswith(f"{own}/"))

    def _kept(self, tree: Any) -> np.ndarray:
        """[bytes, bytes of the vocabulary] of a part of the state."""
        total = np.zeros(2, int)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            total[_of_vocabulary(path)] += sharded_bytes(leaf, leaf.sharding)
        return total

    def _made(self, tree: Any, counts: Callable[[str, Any], bool] = lambda name, leaf: True) -> np.ndarray:
        """The same of arrays that a step makes and that lie as the model's weights do, if `counts` says so.

        Scales and the like are left out: a few bytes a matrix.
        """
        total = np.zeros(2, int)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = self._parameter(path)
            shape, place = self._weights[name]
            if leaf.shape == shape and counts(name, leaf):
                total[_of_vocabulary(path)] += sharded_bytes(leaf, place)
        return total


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


def _of_vocabulary(path: Any) -> int:
    return int(any(name in f"{path_name(path)}/" for name in VOCABULARY))


def compile_step(
    config: ConfigDict, devices: Sequence[Any], options: dict[str, Any] | None = None, sources: int = 1
) -> Compiled:
    """Compiles the training step of a config for a mesh of these devices (a Machine's, or `jax.devices()`).

    Raises DoesNotFit where the compiler refuses for want of memory: that for TPUs does, that for GPUs never.
    """
    parts, started = config.train.accumulate, time.perf_counter()
    mesh = make_mesh(config.mesh, list(devices))

    def made(state: Any, batch: Any) -> Any:
        view = a.numerics.view(state.params, state.numerics)
        grads = lambda parts: accumulate(
            a.objective, view, batch, a.objective.denominators(batch), parts, a.numerics.sums
        )[0]
        return view, [grads(1), grads(parts)] if parts > 1 else [grads(1)]

    with _told():
        a = assemble(config, mesh, sources, STEPS)
        with sharding.use(mesh, a.rules):
            batch = batch_shapes(config, batch_sharding(config, mesh))
            executable = a.step.lower(a.state, batch).compile(options or None)
            view, gradients = jax.eval_shape(made, a.state, batch)
    return Compiled(a, executable, time.perf_counter() - started, view, gradients)
