"""Convert weights between formats, one matrix at a time: host memory stays far below the size of the model.

    python -m easylm_plus.convert --from=hf --input=Llama-2-7b-hf --output=checkpoints/llama2-7b
    python -m easylm_plus.convert --to=hf --input=runs/koala13b --output=koala13b-hf
    python -m easylm_plus.convert --from=easylm --model=koala-13b --input=streaming_params --output=koala-13b
    python -m easylm_plus.convert --to=gguf --gguf_type=q8_0 --input=runs/koala13b --output=koala13b.gguf

Low-rank adapters as PEFT has them, from a run with numerics.lora, and merged into a base:

    python -m easylm_plus.convert --to=peft --input=runs/koala13b_qlora --output=koala13b-lora
    python -m easylm_plus.convert --adapter=koala13b-lora --input=llama-13b-hf --output=koala-13b

A difference that only owners of the base can use, and the model again:

    python -m easylm_plus.convert --input=runs/koala13b --diff_base=llama-13b-hf --output=koala13b-diff
    python -m easylm_plus.convert --recover --input=koala13b-diff --diff_base=llama-13b-hf --output=koala-13b

Fewer bits a weight (compression/schemes.py lists the schemes and their keys):

    python -m easylm_plus.convert --quantize=int4:group=128,method=gptq --input=runs/koala13b --output=koala13b-int4

The output is a checkpoint that chat, evaluate and training's init_from open, or (--to=hf) a Hugging Face folder, or
(--to=gguf) one file that llama.cpp runs. The tokenizer, its chat template and generation_config.json come along.
"""

import dataclasses
import math
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags

from data_pipelines.templates.template import jinja_source
from easylm_plus.compression.quantize import check_source, rows_of, write_quantized
from easylm_plus.compression.schemes import scheme
from easylm_plus.door import console, run
from easylm_plus.errors import UserError
from easylm_plus.interop import difference, gguf_files, peft
from easylm_plus.interop.bitnet import FORMS, PACKED
from easylm_plus.interop.companions import copy_companions
from easylm_plus.interop.configs import stated_form, stated_rules
from easylm_plus.interop.gguf_tokenizer import open_tokenizer, tokenizer_keys
from easylm_plus.interop.huggingface import export_keys, ternary_form, write_folder
from easylm_plus.interop.tensor_files import read_json
from easylm_plus.interop.weights import Cast, ternary_names
from easylm_plus.numerics.rules import for_use
from easylm_plus.planning.memory import human
from easylm_plus.training.output import checked, replaced, replaced_file
from easylm_plus.training.source import KINDS, Source, kind_of, open_source, with_ternary
from easylm_plus.training.stream import total_bytes, write_checkpoint

DEFAULT_SHARD_GB = 5.0
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

FROM = flags.DEFINE_enum("from", None, KINDS, "format of --input; by default what it looks like")
TO = flags.DEFINE_enum("to", None, ("hf", "easylm_plus", "gguf", "peft"), "format of --output; by default easylm_plus")
INPUT = flags.DEFINE_string("input", None, "folder or file to convert", required=True)
OUTPUT = flags.DEFINE_string("output", None, "new folder; with --to=gguf a new file", required=True)
STEP = flags.DEFINE_integer("step", None, "of a run of ours; the last by default")
DTYPE = flags.DEFINE_enum("dtype", None, list(DTYPES), "of the output; by default each weight keeps its own")
MODEL = flags.DEFINE_string("model", "", "preset that --from=easylm holds, such as koala-13b")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "file or folder that takes the place of the input's tokenizer")
DIFF_BASE = flags.DEFINE_string("diff_base", "", "write the difference from this model, or with --recover add to it")
RECOVER = flags.DEFINE_boolean("recover", False, "--input is a difference; make the model from it and --diff_base")
HF_TERNARY = flags.DEFINE_enum("hf_ternary", None, list(FORMS), "how --to=hf has ternary weights; by default as the "
                               "Hugging Face model that they came from, or packed as autobitlinear")  # fmt: skip
ADAPTER = flags.DEFINE_string("adapter", "", "folder of PEFT's adapters, to be merged into --input")
ALLOW_PICKLE = flags.DEFINE_boolean("allow_pickle", False, "read PyTorch's own .bin and .pth, without running them")
MAX_SHARD_GB = flags.DEFINE_float("max_shard_gb", None, "largest safetensors file, in 10^9 bytes; by default 5")
QUANTIZE = flags.DEFINE_string("quantize", "", "write fewer bits a weight: a scheme, as int4:group=128,method=gptq")
DATA = flags.DEFINE_string("data", "", "prepared folder to calibrate with and measure on; that of the run by default")
CALIBRATION_ROWS = flags.DEFINE_integer("calibration_rows", None, "rows that a method may look at; by default 128")
EXAMPLES = flags.DEFINE_integer("examples", None, "held-out examples a source for the perplexity; by default 200")
GGUF_TYPE = flags.DEFINE_enum("gguf_type", None, gguf_files.TYPES, "of the blocks' matrices in a GGUF file")
GGUF_ENDS = flags.DEFINE_enum("gguf_ends", None, gguf_files.END_TYPES, "of its embedding and head; default by type")
FORCE = flags.DEFINE_boolean("force", False, "replace what a conversion has written at --output")


def main() -> int:
    """Opens the input, writes the output beside its place, and moves it there when it is whole."""
    inputs = [Path(flag.value) for flag in (INPUT, DIFF_BASE, TOKENIZER, ADAPTER) if flag.value]
    output, target = checked(Path(OUTPUT.value), inputs, FORCE.value, file=TO.value == "gguf"), _target()
    _all_flags_count()
    if target == "quantized":
        check_source(Path(INPUT.value), STEP.value, scheme(QUANTIZE.value).text)
    source = _recovered() if RECOVER.value else _open(INPUT.value, FROM.value, STEP.value)
    if ADAPTER.value:
        adapters = peft.read_adapters(ADAPTER.value, source.weights.config, source.original)
        source = source._replace(weights=peft.Adapted(source.weights, adapters))
    if DTYPE.value:
        source = source._replace(weights=Cast(source.weights, np.dtype(DTYPES[DTYPE.value])))
    show = Progress(_size(source, target))
    if target == "gguf":
        _write_gguf(source, output, show)
        return 0
    # a run's arrays hold all layers; --quantize takes them apart beside the result
    apart = total_bytes(source.weights) if target == "quantized" and source.weights.whole else 0
    with replaced(output, FORCE.value, show.total + apart) as folder:
        WRITERS[target](source, folder, show)
    if target != "quantized":  # which shows its layers
        show.done()
    return 0


def _target() -> str:
    """What is written: a format of --to, or "difference", or "quantized"."""
    if DIFF_BASE.value and not RECOVER.value:
        return "difference"
    return "quantized" if QUANTIZE.value else TO.value or "easylm_plus"


def _size(source: Source, target: str) -> int:
    """Bytes that are written, for progress and to see whether there is room; of fewer bits a weight, at most."""
    if source.adapters is not None:
        return sum(leaf.a.nbytes + leaf.b.nbytes for leaf in source.adapters.values())
    packed = target == "hf" and _form(source) in PACKED
    return total_bytes(source.weights, ternary_names(source.weights) if packed else source.weights.packed_names)


def _open(path: str, kind: str | None = None, step: int | None = None) -> Source:
    apart = TO.value == "peft"
    return open_source(Path(path), kind, step, model=MODEL.value, pickled=ALLOW_PICKLE.value, apart=apart)


def _write_difference(source: Source, folder: Path, show: "Progress") -> None:
    if found := source.weights.packed_names:
        raise UserError(f"{source.weights.place}: found {min(found)} in packed ternary codes; a difference has none")
    base = _open(DIFF_BASE.value).weights
    rules = for_use((source.run or {}).get("numerics", {}).get("rules", ()))
    difference.write_difference(base, source.weights, folder, source.original, _shard_bytes(), show, rules)
    _companions(source, folder)


def _write_hf(source: Source, folder: Path, show: "Progress") -> None:
    _companions(source, folder)
    keys = export_keys(source.weights, source.original, folder, _form(source))
    write_folder(source.weights, keys, folder, _shard_bytes(), show)


def _form(source: Source) -> str:
    """What --to=hf writes ternary weights as; "" where there are none."""
    stated = stated_form(source.original, source.weights.place) if source.original else ""
    form = ternary_form(source.weights, HF_TERNARY.value or stated or "autobitlinear")
    if HF_TERNARY.value and not form:
        raise UserError(f"--hf_ternary={HF_TERNARY.value}: found no ternary weights in {INPUT.value}")
    return form


def _write_own(source: Source, folder: Path, show: "Progress") -> None:
    (folder / "tokenizer").mkdir()
    _companions(source, folder / "tokenizer")
    write_checkpoint(source.weights, folder, describe(source, folder / "tokenizer"), show)


def _write_quantized(source: Source, folder: Path, show: "Progress") -> None:
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    _companions(source, tokenizer)
    described = describe(source, tokenizer)
    calibration = 128 if CALIBRATION_ROWS.value is None else CALIBRATION_ROWS.value
    examples = 200 if EXAMPLES.value is None else EXAMPLES.value
    rows = rows_of(described["config"], tokenizer, DATA.value, calibration, examples)
    write_quantized(source.weights, scheme(QUANTIZE.value), described, folder, rows, console.print)


def _write_gguf(source: Source, output: Path, show: "Progress") -> None:
    """Writes one file, and prints its size."""
    chosen = Path(TOKENIZER.value) if TOKENIZER.value else source.companions
    if chosen is None:
        raise UserError(f"{INPUT.value}: found no tokenizer; expected --tokenizer=FILE, which a GGUF file has to have")
    words, ours = open_tokenizer(chosen), "data" in (source.run or {})
    template = jinja_source(source.run["data"]["template"] if ours else "tokenizer", words)  # type: ignore[index]
    keys = tokenizer_keys(words, source.weights.config.vocab_size, template, ours)
    kind, ends = GGUF_TYPE.value or "f16", GGUF_ENDS.value or ""
    needed = gguf_files.needed_bytes(gguf_files.plan(source.weights, kind, ends))
    with replaced_file(output, FORCE.value, needed) as path:
        written = gguf_files.write_gguf(source.weights, path, kind, keys, ends=ends, name=output.stem, progress=show)
    show.done()
    print(
        f"{output}: llama.cpp's {written.architecture}, {human(written.bytes)}, {written.weights:,} weights of "
        f"{written.bits:.2f} bits; {kind} in the blocks, {written.block_bits:.2f} bits with scales"
    )


def _write_peft(source: Source, folder: Path, show: "Progress") -> None:
    assert source.adapters is not None
    _companions(source, folder)
    base = (source.run or {}).get("init_from", {}).get("path", "")
    config, place = source.weights.config, source.weights.place
    peft.write_adapters(peft.by_piece(source.adapters, config), config, source.original, base, folder, place)
    show(show.total)


WRITERS = {
    "hf": _write_hf,
    "easylm_plus": _write_own,
    "peft": _write_peft,
    "difference": _write_difference,
    "quantized": _write_quantized,
}


def _shard_bytes() -> int:
    """--max_shard_gb in bytes."""
    size = DEFAULT_SHARD_GB if MAX_SHARD_GB.value is None else MAX_SHARD_GB.value
    if not (0 < size < math.inf):
        raise UserError(f"--max_shard_gb={size}: expected a positive number")
    return int(size * 1e9)


def _all_flags_count() -> None:
    """An error if a flag is given that would change nothing."""
    writes_difference = bool(DIFF_BASE.value) and not RECOVER.value
    kind = FROM.value or kind_of(Path(INPUT.value))
    kinds = {kind, kind_of(Path(DIFF_BASE.value))} if DIFF_BASE.value else {kind}
    ours = "where a checkpoint of ours is written"
    for flag, given, counts, where in (
        (GGUF_TYPE, GGUF_TYPE.value, TO.value == "gguf", "with --to=gguf"),
        (GGUF_ENDS, GGUF_ENDS.value, TO.value == "gguf", "with --to=gguf"),
        (DTYPE, DTYPE.value, TO.value != "gguf", "without --to=gguf, where --gguf_type says it"),
        (TO, TO.value, not writes_difference, "where a model is written: without --diff_base, or with --recover"),
        (QUANTIZE, QUANTIZE.value, not writes_difference and TO.value in (None, "easylm_plus"), ours),
        (DATA, DATA.value, QUANTIZE.value, "with --quantize"),
        (CALIBRATION_ROWS, CALIBRATION_ROWS.value, QUANTIZE.value, "with --quantize"),
        (EXAMPLES, EXAMPLES.value, QUANTIZE.value, "with --quantize"),
        (MAX_SHARD_GB, MAX_SHARD_GB.value, writes_difference or TO.value == "hf", "with --to=hf and for differences"),
        (DTYPE, DTYPE.value, TO.value != "peft", "where whole weights are written, not with --to=peft"),
        (ADAPTER, ADAPTER.value, TO.value != "peft", "where whole weights are written, not with --to=peft"),
        (HF_TERNARY, HF_TERNARY.value, TO.value == "hf" and not writes_difference, "with --to=hf"),
        (MODEL, MODEL.value, "easylm" in kinds, f"with --from=easylm; {INPUT.value} is {kind}"),
        (TO, TO.value, TO.value != "peft" or kind == "easylm_plus", f"for runs of ours; {INPUT.value} is {kind}"),
        (STEP, STEP.value, kind == "easylm_plus", f"for runs of ours; {INPUT.value} is {kind}"),
    ):
        if given not in (None, "") and not counts:
            raise UserError(f"--{flag.name}={given} counts only {where}")
    _shard_bytes()


def _recovered() -> Source:
    """What a difference and its base make."""
    if not DIFF_BASE.value:
        raise UserError("--recover needs --diff_base: expected the model that the difference was made with")
    path, base = Path(INPUT.value), _open(DIFF_BASE.value)
    if FROM.value is None and (path / difference.FILE).is_file():
        weights, told = difference.open_difference(path, base.weights)
        stated = stated_rules(told.original, f"{path}: config.json") if told.original else ()
        run = {"numerics": {"rules": told.rules}} if told.rules else None
        return Source(with_ternary(weights, stated or told.rules), told.original, path, run)
    if FROM.value != "easylm":
        raise UserError(f"{path}: found no {difference.FILE}; expected one and no --from, or --from=easylm")
    print("a difference of EasyLM's carries no checksum: a wrong base is not noticed", file=sys.stderr)
    return base._replace(weights=difference.Sum(base.weights, _open(INPUT.value, "easylm").weights))


def _companions(source: Source, folder: Path) -> None:
    """Copies the tokenizer and what belongs to it."""
    chosen = Path(TOKENIZER.value) if TOKENIZER.value else source.companions
    if chosen is not None and chosen.is_file():
        shutil.copyfile(chosen, folder / f"tokenizer{chosen.suffix}")
    elif chosen is not None and not copy_companions(chosen, folder) and TOKENIZER.value:
        raise UserError(f"--tokenizer={chosen}: found no tokenizer there; expected its file or folder")


def describe(source: Source, tokenizer: Path) -> dict[str, Any]:
    """What stands beside the arrays of a checkpoint: how to run the model, and where it came from."""
    config, run = source.weights.config, source.run or {}
    template = "tokenizer" if _has_chat_template(tokenizer) else "text"
    data = run.get("data") or {"path": "", "length": config.max_length, "date": "", "template": template}
    numerics = {key: value for key, value in run.get("numerics", {}).items() if key != "lora"}  # merged
    if "rules" in numerics:  # and no longer in codes
        numerics["rules"] = for_use(numerics["rules"])
    if DTYPE.value or "precision" not in numerics:
        exact = source.weights.dtype("embed_tokens/embedding") == np.float32
        numerics["precision"] = "float32" if exact else "bf16_pure"
    described = {"model": dataclasses.asdict(config), "numerics": numerics, "data": dict(data)}
    return {"config": described, "config.json": source.original}


def _has_chat_template(tokenizer: Path) -> bool:
    settings = tokenizer / "tokenizer_config.json"
    return (tokenizer / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(read_json(settings).get("chat_template"))
    )


class Progress:
    """A line on stderr: renewed on a terminal, every ten seconds elsewhere."""

    def __init__(self, total: int):
        self.total, self._done, self._told = total, 0, 0.0
        self._start, self._lock, self._terminal = time.monotonic(), threading.Lock(), sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        """Counts bytes that were written."""
        with self._lock:
            self._done += count
            if time.monotonic() - self._told > (0.2 if self._terminal else 10.0):
                self._told = time.monotonic()
                self._tell("\r" if self._terminal else "\n")

    def done(self) -> None:
        """The last line."""
        self._tell("\n")

    def _tell(self, end: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-3)
        speed = human(int(self._done / seconds))
        line = f"{human(self._done)} of {human(self.total)}, {speed}/s, {seconds:.0f} s"
        print(line, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
