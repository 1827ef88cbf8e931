"""What was in step N of a run: its batch, made again from the run's own configuration.

A run's checkpoints have the resolved configuration and the state of its loader in JSON, so this needs no JAX. The
loader goes from the last state before the step, or from the beginning, by the lengths of the examples alone: at once
where tokens are stored (tokens.py), else it has to tokenise what lies between. The hash of the step's examples is the
one that the run logged, if the data are those that it read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.batches.batch_stats import Batch, Item, digest, make_batch
from data_pipelines.batches.training_data import Data, make_loader, open_data
from data_pipelines.errors import InputError


class Run(NamedTuple):
    """A run's folders and configuration. `states`: step -> the loader's state in the checkpoint after it."""

    folder: Path
    config: dict[str, Any]
    data_hash: str
    states: dict[int, dict[str, Any]]


class Step(NamedTuple):
    """A step's batch; `rows`: the segments of each row. `logged`: what the log says of it, {} where it has no row."""

    batch: Batch
    rows: list[list[Item]]
    logged: dict[str, Any]


def open_run(folder: Path | str) -> Run:
    """Opens a run's log.dir or its checkpoint folder. Raises InputError where there is no checkpoint."""
    folder = Path(folder)
    for place in (folder, folder / "checkpoints"):
        numbers = [int(path.name) for path in place.glob("[0-9]*") if path.name.isdecimal()] if place.is_dir() else []
        if numbers:
            meta = _read(place / str(max(numbers)) / "meta" / "metadata")
            states = {number: _read(place / str(number) / "data" / "metadata") for number in sorted(numbers)}
            try:
                loaders = {number: state["loader"] for number, state in states.items()}
                return Run(folder, meta["config"], meta["data_hash"], loaders)
            except (KeyError, TypeError) as error:
                raise InputError(f"{place}: found no {error} in a checkpoint; expected a run of easylm_plus") from error
    raise InputError(f"{folder}: found no checkpoint; expected a run's log.dir or its checkpoint folder")


def open_run_data(run: Run, directory: str = "") -> tuple[dict[str, Any], Data]:
    """(the run's data section, its data); `directory` stands for data.path. Raises InputError for other data."""
    section = dict(run.config["data"]) | ({"path": directory} if directory else {})
    data = open_data(section)
    if data.hash != run.data_hash:
        told = f"found data, tokenizer or template with the hash {data.hash[:12]}; expected {run.data_hash[:12]}"
        raise InputError(f"{section['path']}: {told}, which {run.folder} read")
    return section, data


def at_step(run: Run, section: dict[str, Any], data: Data, step: int, progress: Callable[[int, int], None]) -> Step:
    """Step `step`, from 1. progress: see Loader.seek."""
    if step < 1:
        raise InputError(f"step {step}: expected 1 or more")
    loader = make_loader(section, data, run.config["train"]["seed"])
    before = [number for number in run.states if number < step]
    nearest = max(before) if before else min(run.states)
    state = run.states[nearest]
    if before:
        loader.set_state(state)
    loader.seek(step - 1 - nearest + state["step"], progress)  # the data may have begun later than the run
    try:
        rows = loader.next_rows()
    except StopIteration:
        raise InputError(f"step {step}: the data of {run.folder} end before it") from None
    return Step(make_batch(rows, loader.length, data.sources), rows, logged(run, step))


def logged(run: Run, step: int) -> dict[str, Any]:
    """The row of the metrics log that names the step's examples; {} if it has none (log.every)."""
    for place in (run.folder, run.folder.parent):
        if (place / "metrics.jsonl").is_file():
            for line in (place / "metrics.jsonl").read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # cut off by a crash
                    break
                if row.get("step") == step and "examples" in row:
                    return dict(row)
            return {}
    return {}


def agrees(step: Step) -> bool | None:
    """Whether the log has the same examples; None if it says nothing. A process that made a part of the rows logged
    the hash of these."""
    if not step.logged:
        return None
    start, stop = map(int, step.logged.get("examples_rows", f"0:{len(step.rows)}").split(":"))
    return digest(Batch({}, step.batch.examples[start:stop])) == step.logged["examples"]


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a checkpoint of easylm_plus") from error
