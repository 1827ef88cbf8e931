"""From a config to everything that a training step is made of, without allocating anything: what a run starts from, and
what is compiled ahead of time for machines that are not here (planning/compiled.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from easylm_plus.models.attend import resolve
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, abstract_parameters
from easylm_plus.numerics.grouped import resolve_grouped
from easylm_plus.numerics.levels import Numerics
from easylm_plus.numerics.precision import precision
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.parallel import sharding
from easylm_plus.training.optimizer import Optimizer
from easylm_plus.training.scaled_adam import make_optimizer
from easylm_plus.training.state import TrainState, new_state, relaid, state_shardings
from easylm_plus.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of a run on a mesh."""

    model: Transformer  # its attention and grouped products are those of the mesh's platform, never "auto"
    objective: LanguageModel
    numerics: Numerics
    optimizer: Optimizer
    rules: Mapping[str, Any]  # for sharding.use
    shapes: Any  # parameters, as the model has them: ShapeDtypeStruct
    axes: Any  # and their logical axes
    param_shardings: Any  # of parameters as the model has them
    make_state: Callable[[Any], TrainState]
    state: TrainState  # abstract, with shardings
    shardings: TrainState
    step: Any  # jitted (state, batch) -> (state, metrics); the state is donated
    saved: TrainState  # the state by name, as it is in a checkpoint: abstract, with shardings
    to_saved: Callable[[TrainState], TrainState]
    from_saved: Callable[[TrainState], TrainState]
    named: Callable[[Any], Any]  # of the state's parameters or their average: by name


def assemble(config: ConfigDict, mesh: Mesh, sources: int, steps: int) -> Assembly:
    """Everything of a config for a mesh, `sources` data sources and a run of so many steps.

    Lower the step, and make the state, inside `sharding.use(mesh, assembly.rules)`.
    """
    policy, platform = precision(config.numerics.precision), mesh.devices.flat[0].platform
    shape = ModelConfig(**config.model)
    attention = resolve(shape.attention, platform, policy.compute, shape.head_dim)
    grouped = resolve_grouped(shape.grouped, platform)
    model = Transformer(dataclasses.replace(shape, attention=attention, grouped=grouped), policy)
    rules = sharding.rules_for(mesh, shape.num_heads, shape.num_kv_heads, config.mesh.sequence_parallel)
    with sharding.use(mesh, rules):
        shapes, axes = abstract_parameters(model)
        param_shardings = sharding.shardings(axes, shapes, mesh)
        numerics = Numerics(config.numerics, config.optimizer, policy, shapes, axes, config.train.seed)
        if config.mesh.sequence_parallel:
            model = Transformer(dataclasses.replace(model.config, gather=numerics.gathers), policy)
        objective = LanguageModel(model, sources, **config.objective)
        optimizer = make_optimizer(config.optimizer, steps, numerics, config.train.seed)
        make_state = lambda params: new_state(params, optimizer, config.train.ema > 0, numerics)
        abstract = jax.eval_shape(make_state, shapes)
        stored = sharding.shardings(axes, shapes, mesh, sharding.stored_spec) if numerics.cut else param_shardings
        shardings = state_shardings(abstract, numerics.placed(stored, mesh), mesh)
        by_name = jax.eval_shape(partial(relaid, way=numerics.named), abstract) if numerics.deal else abstract
        saved_shardings = state_shardings(by_name, stored, mesh)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    def on_mesh(way: Callable[[Any], Any]) -> Callable[[Any], Any]:
        jitted = jax.jit(way)

        def run(tree: Any) -> Any:
            with sharding.use(mesh, rules):
                return jitted(tree)

        return run

    named = laid = to_saved = from_saved = lambda tree: tree
    if numerics.deal:
        named, laid = on_mesh(numerics.named), on_mesh(numerics.laid)  # tree by tree: each takes room for itself
        to_saved = partial(relaid, way=named)
        from_saved = lambda state: jax.device_put(relaid(state, laid), shardings)
    step = jax.jit(
        make_train_step(objective, optimizer, config.train, numerics),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    return Assembly(
        model, objective, numerics, optimizer, rules, shapes, axes, param_shardings, make_state,
        jax.tree.map(place, abstract, shardings), shardings, step,
        jax.tree.map(place, by_name, saved_shardings), to_saved, from_saved, named,
    )  # fmt: skip
