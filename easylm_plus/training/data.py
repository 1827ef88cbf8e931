"""From a config's `data` section to batches on devices. What the data *is* lives in data_pipelines."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from rich.table import Table

from data_pipelines.batches import training_data
from data_pipelines.batches.batch_stats import Batch, digest
from data_pipelines.batches.loader import Loader, merge_states
from data_pipelines.batches.packing import empty_arrays
from data_pipelines.batches.training_data import Data
from data_pipelines.prepare import prepare
from data_pipelines.templates.text_objective import TextObjective
from easylm_plus.errors import UserError
from easylm_plus.parallel.sharding import spec_of


def ensure_prepared(config: ConfigDict) -> bool:
    """Prepares the data folder if it is not there and the config says how; whether it is there now."""
    data = config.data
    if (Path(data.path) / "manifest.json").is_file():
        return True
    has_input = not data.prepare_input or Path(data.prepare_input).exists()
    if not data.prepare or not has_input:
        return False
    prepare(load_config_file(data.prepare), data.prepare_input or None, data.path)
    return True


def load_config_file(spec: str) -> ConfigDict:
    """ "configs/data/x.py:arg" -> its `get_config("arg")`."""
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"data.prepare = {spec!r}: found no file {path}")
    module_spec = importlib.util.spec_from_file_location("data_config", path)
    module = importlib.util.module_from_spec(module_spec)  # type: ignore[arg-type]
    module_spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.get_config(arg)


def open_data(config: ConfigDict) -> Data:
    """Opens the prepared folder that the config names."""
    data, vocabulary = training_data.open_data(config.data), config.model.vocab_size
    if data.tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"model.vocab_size = {vocabulary}: the tokenizer {data.tokenizer.path} has {data.tokenizer.vocab_size}"
        )
    if isinstance(data.learned, TextObjective) and data.learned.vocab_size > vocabulary:
        raise UserError(
            f"model.vocab_size = {vocabulary}: "
            f"data.corruption = {config.data.corruption!r} writes ids up to {data.learned.vocab_size - 1}"
        )
    return data


def where_tokens_are(data: Data) -> str:
    """Which sources are tokenised already, and which only seem to be."""
    unused = "of other data, another tokenizer, template, length, packing or version"
    lines = [("read from the store: ", data.tokens), (f"stored ones are {unused}: ", data.unused_tokens)]
    return "; ".join(f"{told}{', '.join(names)}" for told, names in lines if names)


def check_best(config: ConfigDict, data: Data) -> None:
    """Raises UserError if `checkpoint.keep_best` names a figure that no evaluation gives."""
    best, known = config.checkpoint.keep_best, ["eval/loss", *(f"eval/loss/{name}" for name in data.heldout)]
    if best and best not in known:
        raise UserError(f"checkpoint.keep_best = {best!r}: expected one of {', '.join(known)}")
    if best and not config.eval.every:
        raise UserError(f"checkpoint.keep_best = {best!r}: needs evaluations, but eval.every = 0")


def make_loader(config: ConfigDict, data: Data, rows: range | None = None) -> Loader:
    """The training data from its beginning; `rows` are those of this process."""
    return training_data.make_loader(config.data, data, config.train.seed, rows)


def heldout_batches(config: ConfigDict, data: Data, rows: range | None = None) -> Iterator[Batch]:
    """The held-out examples, each once; the same at every evaluation."""
    return training_data.heldout_batches(config.data, data, config.eval.examples, rows)


def total_steps(config: ConfigDict, data: Data) -> int:
    """The run's length in steps."""
    train = config.train
    length = {"steps": train.steps, "epochs": train.epochs, "tokens": train.tokens}
    return training_data.total_steps(config.data, data, train.seed, **length)


def batch_sharding(config: ConfigDict, mesh: Mesh) -> NamedSharding:
    """How a batch [B, T] lies on the mesh."""
    B, T = config.data.batch_size, config.data.length
    rows, columns = math.prod(mesh.shape[axis] for axis in ("replica", "fsdp", "expert")), mesh.shape["sequence"]
    if B // config.train.accumulate % rows:
        raise UserError(
            f"data.batch_size = {B} in train.accumulate = {config.train.accumulate} parts: "
            f"expected a multiple of mesh.replica x mesh.fsdp x mesh.expert = {rows} in each"
        )
    if T % columns:
        raise UserError(f"data.length = {T}: expected a multiple of mesh.sequence = {columns}")
    return NamedSharding(mesh, spec_of(("batch", "length"), (B, T), mesh))


def local_rows(sharding: NamedSharding, batch_size: int, length: int) -> range:
    """The rows of a batch that this process's devices hold."""
    indices: Any = sharding.addressable_devices_indices_map((batch_size, length)).values()
    slices = [index[0] for index in indices]
    starts, stops = zip(*(s.indices(batch_size)[:2] for s in slices))
    return range(min(starts), max(stops))


def put(batch: Batch, sharding: NamedSharding, rows: range, batch_size: int) -> dict[str, jax.Array]:
    """This process's rows -> arrays of the whole batch [B, T] on the mesh."""

    def place(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return local[start - rows.start : stop - rows.start, index[1]]

        return jax.make_array_from_callback((batch_size, local.shape[1]), sharding, shard)

    return {name: place(array) for name, array in batch.arrays.items()}


def told(batch: Batch, rows: range, batch_size: int) -> dict[str, str]:
    """What the log says of a batch: a hash of its examples, and of which rows it is where others have the rest."""
    part = {} if len(rows) == batch_size else {"examples_rows": f"{rows.start}:{rows.stop}"}
    return {"examples": digest(batch), **part}


def batch_shapes(config: ConfigDict, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch as the step is compiled for it."""
    shape = (config.data.batch_size, config.data.length)
    arrays = empty_arrays(1, 1)
    return {name: jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding) for name, x in arrays.items()}


def merged_state(state: dict[str, Any]) -> dict[str, Any]:
    """The loader's state with the positions of all processes, for a checkpoint that any number can resume."""
    if jax.process_count() == 1:
        return state
    from jax.experimental import multihost_utils

    own = np.array([p if p is not None else (-1, -1) for p in state["positions"]], np.int32)
    gathered = multihost_utils.process_allgather(own)  # [processes, shards, 2]
    states = [{**state, "positions": [p.tolist() if p[0] >= 0 else None for p in part]} for part in gathered]
    return merge_states(states)


def statistics_table(statistics: dict[str, Any]) -> Table:
    """What a loader has handed out in this process: examples, tokens and loss tokens of each source."""
    kinds = ("examples", "tokens", "loss_tokens", "examples_cut")
    show = Table("source", *(kind.replace("_", " ") for kind in kinds), "dropped", title="data read")
    for name, counts in [*statistics["sources"].items(), ("all", statistics)]:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in counts["dropped"].items())
        show.add_row(name, *(f"{counts[kind]:,}" for kind in kinds), dropped)
    show.caption = f"padding {statistics['padding_share']:.1%}"
    return show
