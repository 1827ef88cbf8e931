"""What convert --quantize does: calibration rows, the walk over the model, the checkpoint, and a table of what it cost.

Calibration reads training rows of the run's data, or of --data, mixed as in training; perplexity is that of held-out
examples, as evaluate measures it. Without data, rounding to nearest goes on, and the table says that perplexity was not
measured; methods that need calibration refuse.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

from data_pipelines import datasets
from data_pipelines.batches.loader import Loader, evaluation_batches
from data_pipelines.batches.training_data import chosen_sources, judged_by, learned_of, template_date
from data_pipelines.templates.template import load_template
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from easylm_plus.compression.schemes import Scheme
from easylm_plus.compression.walk import Batch, Result, walk
from easylm_plus.errors import UserError
from easylm_plus.interop.weights import Weights, holds_ternary
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.deploy import all_filed
from easylm_plus.numerics.leaves import KEPT
from easylm_plus.numerics.precision import precision
from easylm_plus.planning.memory import human
from easylm_plus.training.checkpoint import locate, read_meta, steps, write_parameters
from easylm_plus.training.source import open_source
from easylm_plus.training.stream import write_checkpoint

ROWS = 8  # of a batch
LONGEST = 2048  # tokens of a row, where the model came without a run that says


class Rows(NamedTuple):
    """What the model reads on the way."""

    calibration: Sequence[Batch] = ()
    heldout: Sequence[Batch] = ()
    told: str = ""  # what they are, or why there are none


def write_quantized(
    weights: Weights, scheme: Scheme, described: dict[str, Any], folder: Path, rows: Rows, show: Callable[[Any], None]
) -> None:
    """Writes the checkpoint `folder`/0.

    Args:
      described: what stands beside the arrays, of the model before.
      show: prints a line of progress, and at the end a table of what came out.
    """
    numerics = described["config"]["numerics"]
    if found := weights.packed_names:
        raise UserError(f"--quantize={scheme.text}: {weights.place}: {min(found)} is in ternary codes already")
    if (is_ternary := holds_ternary(weights)) and scheme.name != "ternary":
        told = "found a model that was trained ternary; expected --quantize=ternary, which is exactly it"
        raise UserError(f"--quantize={scheme.text}: {weights.place}: {told}")
    if scheme.calibrated and not rows.calibration:
        raise UserError(f"--quantize={scheme.text}: method={scheme.values['method']} needs calibration: {rows.told}")
    start = time.monotonic()
    tell = lambda line: show(f"{line}, {time.monotonic() - start:.0f} s")
    show(rows.told)
    calibration = rows.calibration if scheme.calibrated else ()
    after = {**numerics, "rules": [], "lora": []} | ({"fp8_level": "none"} if "fp8_level" in numerics else {})
    original = described["config.json"]
    if original and is_ternary:  # what it says of rounding is done
        original = {key: value for key, value in original.items() if key != "quantization_config"}
    meta = {"config": {**described["config"], "numerics": after}, "config.json": original, "quantized": scheme.text}
    with by_layer(weights, described, folder) as read:
        result = walk(read, precision(numerics["precision"]), scheme, scheme.ends, calibration, rows.heldout, tell)
        params = all_filed(result.params)
        write_parameters(folder, params, meta)
    show(table(result, scheme, sum(x.nbytes for x in jax.tree.leaves(params))))


@contextmanager
def by_layer(weights: Weights, described: Mapping[str, Any], folder: Path) -> Iterator[Weights]:
    """The same weights, to be read layer by layer. Where the arrays hold all layers, and are read as a whole, they are
    written piece by piece first, beside the result, and removed."""
    if not weights.whole or weights.config.num_layers == 1:
        yield weights
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_checkpoint(weights, Path(place), described, lambda _: None)
        yield open_source(Path(place)).weights


def check_source(path: Path, step: int | None, text: str) -> None:
    """An error if a checkpoint of ours holds weights in codes already."""
    if not path.is_dir() or not any(steps(place) for place in (path, path / "checkpoints")):
        return
    leaves = read_meta(*locate(path, step)).get("leaves", {})
    for name, info in leaves.items():
        if issubclass(KEPT.get(info["type"], object), Coded):
            expected = "the checkpoint that it was made from"
            raise UserError(f"--quantize={text}: {path}: {name} is {info['type']} already; expected {expected}")


def rows_of(described: Mapping[str, Any], tokenizer: Path, data: str, calibration: int, examples: int) -> Rows:
    """Batches of calibration and held-out rows.

    Args:
      described: a config's sections; `data` says where the data are, how they are cut and what is learned of them.
      tokenizer: a folder with the model's tokenizer.
      data: a prepared folder in the place of the config's.
      calibration: rows. examples: held-out ones a source.
    """
    section = dict(described["data"])
    folder = data or section.get("path", "")
    if not folder:
        return Rows(told="no data: perplexity is not measured; --data=FOLDER names a prepared folder")
    if not data and not (Path(folder) / "manifest.json").is_file():
        return Rows(told=f"{folder}, the run's data, is not here: perplexity is not measured; --data=FOLDER names it")
    words = load_tokenizer(tokenizer)
    if words.vocab_size > described["model"]["vocab_size"]:
        found = f"a tokenizer of {words.vocab_size} tokens"
        raise UserError(f"{tokenizer}: found {found}, expected at most the model's {described['model']['vocab_size']}")
    length = section["length"] if section.get("path") else min(section["length"], LONGEST)
    now = template_date(section.get("date", ""))
    template = load_template(section["template"], words, max_length=length + 1, now=now)
    encode = judged_by(learned_of(section, template))
    manifest = datasets.read_manifest(folder)
    names, mixed = chosen_sources(() if data else section.get("sources", ()), manifest)
    opened = lambda split: {
        name: datasets.open_source(folder, name, split)
        for name in names
        if split in manifest["sources"][name]["splits"]
    }
    batches = evaluation_batches(opened("heldout"), encode, batch_size=ROWS, length=length, limit_per_source=examples)
    heldout = [batch.arrays for batch in batches]
    seen: list[Batch] = []
    if calibration:
        size = min(ROWS, calibration)
        loader = Loader(opened("train"), mixed, encode, batch_size=size, length=length, seed=0)
        counts = [min(size, calibration - first) for first in range(0, calibration, size)]
        seen = [{key: x[:count] for key, x in next(loader).arrays.items()} for count in counts]
    tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in seen)
    learned = sum(int(batch["loss_weights"].sum()) for batch in heldout)
    told = f"{folder}: {tokens:,} tokens to calibrate with where a method does, {learned:,} held-out ones to measure"
    return Rows(seen, heldout, told)


def table(result: Result, scheme: Scheme, filed: int) -> Table:
    """What it was and what it is; `filed`: bytes of the arrays in the checkpoint."""
    show = Table(scheme.text, "before", "after")
    per_weight = lambda size: f"{8 * size / result.matrices:.2f}"
    show.add_row("matrices of the blocks", *map(human, result.matrix_bytes))
    show.add_row("their bits a weight", *map(per_weight, result.matrix_bytes))
    show.add_row("all weights", *map(human, result.total_bytes))
    overall = [f"{8 * size / result.weights:.2f}" for size in result.total_bytes]
    show.add_row("bits a weight overall", *overall)
    show.add_row("in the checkpoint", "", human(filed))
    if math.isnan(result.before):
        show.add_row("held-out perplexity", "not measured", "not measured")
    else:
        perplexity = [f"{math.exp(min(loss, 50)):.4f}" for loss in (result.before, result.after)]
        show.add_row("held-out loss", f"{result.before:.5f}", f"{result.after:.5f}")
        show.add_row("held-out perplexity", *perplexity)
    return show
