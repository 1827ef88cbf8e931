"""Checkpoints: orbax for the arrays, one JSON beside them for what orbax does not check.

    <dir>/<step>/state     parameters, optimizer, guard (orbax, written in the background)
    <dir>/<step>/data      where the data order stands (JSON)
    <dir>/<step>/meta      names, shapes and dtypes of all arrays, which of them make up a typed leaf, the resolved
                           config, the data's hash (JSON)
    <dir>/tokenizer/       the tokenizer's file, so that a checkpoint can be talked to

Orbax takes a leaf's type and static fields from the restore target and casts dtypes without a word, so `restore`
compares meta with what the run expects before it reads a byte. A save is a temporary folder until it is whole; what
a killed process leaves behind is swept away at the next start.
"""

import datetime
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from easylm_plus.errors import UserError
from easylm_plus.numerics.lora import LowRank
from easylm_plus.training.contents import compare_arrays, compare_leaves, declared, describe, leaf_types, put_together
from easylm_plus.tree import at

SCHEMA = 1
SPARE = 1 << 20  # bytes that a save takes beside the arrays, for names and indices


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are, made if it is not there.
      config: the `checkpoint` section: every, keep, keep_best.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any]):
        self.directory = Path(directory).absolute()
        best = config["keep_best"]
        policies: list[Any] = [keep_policy.LatestN(1)]  # a temporary one lives until the next
        policies.append(keep_policy.EveryNSteps(config["every"], max_to_keep=config["keep"] or None))
        if best:
            policies.append(
                keep_policy.BestN(get_metric_fn=lambda m: -m[best], n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            best_fn=(lambda m: m[best]) if best else None,  # without it orbax does not write the metrics to disk
            best_mode="min",
        )
        self._best = best
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The last finished step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any, meta: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts writing; returns when the arrays may be overwritten. Waits for a save still in progress first."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave({"schema": SCHEMA, "arrays": describe(state), "leaves": leaf_types(state), **meta}),
        )
        scores = {self._best: metrics[self._best]} if self._best in metrics else None
        self.wait()
        _check_room(self.directory, state)
        with _full_disk_told(self.directory):
            self._manager.save(step, args=items, metrics=scores, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON beside a checkpoint."""
        return read_meta(self.directory, step)

    def restore(self, step: int, target: Any) -> tuple[Any, Any]:
        """(state, data state). `target` is a tree of ShapeDtypeStruct with shardings, of any mesh."""
        meta, place = self.meta(step), f"{self.directory}/{step}"
        compare_arrays(meta["arrays"], describe(target), place)
        compare_leaves(meta.get("leaves", {}), leaf_types(target), place)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"{place}: found a damaged checkpoint ({reason}); move it away to continue from the one before"
            ) from error
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        with _full_disk_told(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _full_disk_told(self.directory):
            self._manager.close()


def _check_room(directory: Path, state: Any) -> None:
    """Raises OSError before a save rather than in its middle, if this process's part of the arrays will not fit."""
    shards = (shard for x in jax.tree.leaves(state) for shard in x.addressable_shards)
    needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0) + SPARE
    free = shutil.disk_usage(directory).free
    if free < needed:
        place = f"{directory} (a checkpoint takes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free)"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)


@contextmanager
def _full_disk_told(directory: Path) -> Iterator[None]:
    """Turns what orbax and tensorstore make of a full disk back into the OSError that it was."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if "RESOURCE_EXHAUSTED" in str(error) or os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
        raise


def steps(directory: str | Path) -> list[int]:
    """The finished steps in a folder of checkpoints."""
    names = (p.name for p in Path(directory).iterdir()) if Path(directory).is_dir() else ()
    return sorted(int(name) for name in names if name.isdecimal())


def locate(directory: str | Path, step: int | None = None) -> tuple[Path, int]:
    """A run's folder or its checkpoint folder -> (checkpoint folder, step), the last step by default."""
    for place in (Path(directory), Path(directory) / "checkpoints"):
        if found := steps(place):
            if step is not None and step not in found:
                raise UserError(f"{place} has no step {step}; it has {', '.join(map(str, found))}")
            return place.absolute(), found[-1] if step is None else step
    raise UserError(f"{directory}: found no checkpoint; expected a run's log.dir or its checkpoint folder")


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """The JSON beside a checkpoint; an error if it is not one of ours."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(directory / str(step) / "meta")
        schema, _, _ = meta["schema"], meta["arrays"], meta["config"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/{step}: found no readable meta; expected a checkpoint of easylm_plus") from error
    if schema != SCHEMA:
        raise UserError(f"{directory}/{step}: found checkpoint schema {schema}, expected {SCHEMA}")
    return meta


def read_parameters(directory: Path, step: int, shardings: Any = None, only: str = "") -> Any:
    """Only the parameters of a checkpoint, in the dtypes and shapes that its meta names; the EMA's if it has one.

    NumPy arrays where no sharding is given. A weight that was kept in codes is a formats.Scaled of them, to be decoded
    matrix by matrix where it is used. `only`: the name of a single weight, to which the tree leads.
    """
    meta = read_meta(directory, step)
    part = parameters_part(meta["arrays"])
    arrays = _read(directory, step, declared(meta["arrays"], f"{part}/{only}" if only else part, shardings), shardings)
    return put_together(arrays, meta.get("leaves", {}))[part]


def read_adapters(directory: Path, step: int) -> dict[str, LowRank]:
    """name -> the adapter (lora.py) of a run's weight, without its base: NumPy arrays. Raises UserError for none."""
    meta = read_meta(directory, step)
    found = {name: info for name, info in meta.get("leaves", {}).items() if info["type"] == "LowRank"}
    place = f"{directory}/{step}"
    if not found:
        raise UserError(f"{place}: found no adapters, expected a run with numerics.lora")
    if parameters_part(meta["arrays"]) == "ema":
        raise UserError(f"{place}: found an average of the weights (train.ema), of which there are no adapters")
    factors = {f"{name}/{factor}" for name in found for factor in "ab"}  # beside them lies the base
    arrays = {name: info for name, info in meta["arrays"].items() if name in factors}
    tree = _read(directory, step, declared(arrays, "params"), None)
    adapter = lambda name: LowRank(None, at(tree, f"{name}/a"), at(tree, f"{name}/b"), found[name]["scale"])
    return {name.removeprefix("params/"): adapter(name) for name in sorted(found) if name.startswith("params/")}


def _read(directory: Path, step: int, target: Any, shardings: Any) -> Any:
    """The declared arrays of a checkpoint; NumPy's where there is no sharding."""
    how = ocp.checkpoint_utils.construct_restore_args(target)
    if shardings is None:
        how = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        return reader.restore(directory / str(step) / "state", args=args)


def write_parameters(directory: str | Path, params: Any, meta: Mapping[str, Any]) -> None:
    """Writes `directory`/0 with parameters, typed leaves among them, as a checkpoint that is used and not resumed.

    `meta` is what stands beside their description, `config` at least; it is written last, so that an interrupted write
    does not open.
    """
    state, place = {"params": params}, Path(directory).absolute() / "0"
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(place / "state", args=ocp.args.StandardSave(state))
    described = {"schema": SCHEMA, "arrays": describe(state), "leaves": leaf_types(state), "data_hash": "", **meta}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(place / "meta", args=ocp.args.JsonSave(described))


def parameters_part(arrays: Mapping[str, Any]) -> str:
    """Which part of a checkpoint's arrays is the model to use: the average of the parameters if there is one."""
    return "ema" if any(name.startswith("ema/") for name in arrays) else "params"


def due(last: datetime.datetime, minutes: float, step: int) -> bool:
    """Whether a temporary checkpoint is due: the same answer on all processes, so asked seldom where there are many."""
    late = minutes > 0 and datetime.datetime.now() - last > datetime.timedelta(minutes=minutes)
    if jax.process_count() == 1:
        return late
    return step % 100 == 0 and bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
