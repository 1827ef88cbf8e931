"""From a config's `data` section to batches on devices. What the data *is* lives in data_pipelines."""

import datetime
import hashlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from rich.table import Table

from data_pipelines import datasets
from data_pipelines.batch_stats import Batch
from data_pipelines.conversation import Conversation
from data_pipelines.loader import Loader, encode_draws, evaluation_batches, merge_states
from data_pipelines.mixture import Mixture
from data_pipelines.packing import empty_arrays, pack_pool
from data_pipelines.prepare import prepare
from data_pipelines.template import Template, load_template
from data_pipelines.text_objective import TextObjective, text_objective
from data_pipelines.tokenization import Tokenizer, load_tokenizer
from easylm_plus.errors import UserError
from easylm_plus.parallel.sharding import spec_of

# Keys of the data section that say what is learned of a text, the same as arguments of `text_objective`.
TEXT_OBJECTIVE = (
    "fim_rate", "fim_spm_rate", "corruption", "corruption_rate", "span_length", "sentinels", "mask_token",
)  # fmt: skip
LENGTH_SAMPLE = 2048  # examples whose lengths tell how many steps an epoch has


class Data(NamedTuple):
    """Opened sources, and what turns their conversations into tokens."""

    train: dict[str, Sequence[Conversation]]
    heldout: dict[str, Sequence[Conversation]]
    weights: dict[str, int] | None  # None: in proportion to the examples
    tokenizer: Tokenizer
    template: Template
    learned: Template | TextObjective  # what makes training examples of conversations
    hash: str  # of the data, the tokenizer and the template: what the order of batches depends on

    @property
    def sources(self) -> list[str]:
        """Names in the order of source_ids."""
        return list(self.train)


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


def tokenizer_path(config: ConfigDict) -> Path:
    """Where the tokenizer is looked for."""
    return Path(config.data.tokenizer or Path(config.data.path) / "tokenizer")


def open_data(config: ConfigDict) -> Data:
    """Opens the prepared folder that the config names."""
    manifest = datasets.read_manifest(config.data.path)
    names, weights = chosen_sources(config.data.sources, manifest)
    split = lambda name, part: datasets.open_source(config.data.path, name, part)
    heldout: Any = {n: split(n, "heldout") for n in names if "heldout" in manifest["sources"][n]["splits"]}
    tokenizer = load_tokenizer(tokenizer_path(config))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: the tokenizer {tokenizer.path} has {tokenizer.vocab_size}"
        )
    date = template_date(config.data.date)
    template = load_template(config.data.template, tokenizer, max_length=config.data.length + 1, now=date)
    learned = learned_of(config.data, template)
    if isinstance(learned, TextObjective) and learned.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: "
            f"data.corruption = {config.data.corruption!r} writes ids up to {learned.vocab_size - 1}"
        )
    identity = "\n".join((manifest["hash"], tokenizer.fingerprint, learned.fingerprint))
    digest = hashlib.sha256(identity.encode()).hexdigest()
    train: Any = {n: split(n, "train") for n in names}
    return Data(train, heldout, weights, tokenizer, template, learned, digest)


def learned_of(section: Mapping[str, Any], template: Template) -> Template | TextObjective:
    """What makes training examples by a `data` section; of one that an earlier version wrote, too."""
    return text_objective(template, **{key: section[key] for key in TEXT_OBJECTIVE if key in section})


def judged_by(learned: Template | TextObjective) -> Template | TextObjective:
    """What makes the held-out examples."""
    return learned.heldout if isinstance(learned, TextObjective) else learned


def template_date(date: str) -> datetime.datetime | None:
    """`data.date` as midnight of that day; None if it is empty."""
    try:
        return datetime.datetime.fromisoformat(date) if date else None
    except ValueError:
        raise UserError(f"data.date = {date!r}: expected YYYY-MM-DD") from None


def check_best(config: ConfigDict, data: Data) -> None:
    """Raises UserError if `checkpoint.keep_best` names a figure that no evaluation gives."""
    best, known = config.checkpoint.keep_best, ["eval/loss", *(f"eval/loss/{name}" for name in data.heldout)]
    if best and best not in known:
        raise UserError(f"checkpoint.keep_best = {best!r}: expected one of {', '.join(known)}")
    if best and not config.eval.every:
        raise UserError(f"checkpoint.keep_best = {best!r}: needs evaluations, but eval.every = 0")


def chosen_sources(wanted: Sequence[str], manifest: dict[str, Any]) -> tuple[list[str], dict[str, int] | None]:
    """ "name" and "name=weight" entries -> (names, weights); the manifest's own where there are none."""
    known = manifest["sources"]
    pairs = [item.partition("=") for item in wanted] or [(name, "", "") for name in known]
    for name, _, weight in pairs:
        if name not in known:
            raise UserError(f"data.sources: found {name!r}, expected one of {', '.join(known)}")
        if weight and not weight.isdecimal():
            raise UserError(f"data.sources: found weight {weight!r} of {name}, expected a whole number")
    weights = {name: int(weight or known[name].get("weight") or 0) for name, _, weight in pairs}
    return list(weights), weights if any(weights.values()) else None


def make_loader(config: ConfigDict, data: Data, rows: range | None = None) -> Loader:
    """The training data from its beginning; `rows` are those of this process."""
    section = config.data
    return Loader(
        data.train,
        data.weights,
        data.learned,
        batch_size=section.batch_size,
        length=section.length,
        packing=section.packing,
        shards=section.shards or None,
        pool=section.pool,
        seed=config.train.seed,
        rows=rows,
        manifest_hash=data.hash,
    )


def heldout_batches(config: ConfigDict, data: Data, rows: range | None = None) -> Iterator[Batch]:
    """The held-out examples, each once; the same at every evaluation."""
    return evaluation_batches(
        {name: data.heldout.get(name, ()) for name in data.sources},
        judged_by(data.learned),
        batch_size=config.data.batch_size,
        length=config.data.length,
        packing=config.data.packing,
        limit_per_source=config.eval.examples,
        rows=rows,
    )


def total_steps(config: ConfigDict, data: Data) -> int:
    """The run's length in steps. Tokens count positions, padding included; epochs are measured on a sample."""
    train, section = config.train, config.data
    if train.steps:
        return train.steps
    if train.tokens:
        return math.ceil(train.tokens / (section.batch_size * section.length))
    mixture = Mixture({n: len(s) for n, s in data.train.items()}, data.weights, train.seed)
    draws = mixture.draws_for_epochs(train.epochs)
    return max(1, math.ceil(draws * _rows_per_draw(mixture, data, config) / section.batch_size))


def _rows_per_draw(mixture: Mixture, data: Data, config: ConfigDict) -> float:
    """Rows that an example takes, padding included: the first draws of the run are packed as they will be."""
    section = config.data
    picked = [mixture.draw(k) for k in range(min(LENGTH_SAMPLE, sum(map(len, data.train.values()))))]
    items = encode_draws(data.learned, data.train, picked, config.train.seed)
    examples = [item.example for item in items if item is not None]
    pools = [examples[i : i + section.pool] for i in range(0, len(examples), section.pool)]
    return sum(len(pack_pool(pool, section.length, section.packing)) for pool in pools) / len(picked)


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


def digest(batch: Batch) -> str:
    """A short hash of which examples are in which row: equal runs log equal hashes."""
    return hashlib.sha256(repr(batch.examples).encode()).hexdigest()[:16]


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
