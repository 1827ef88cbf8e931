"""A new folder that is written beside its place and moved there when it is whole, and what it may replace there.

A conversion takes minutes to hours and may replace a folder (`--force`). Nothing is deleted but what a conversion has
written, and that only when the new folder stands in its place.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from easylm_plus.errors import UserError
from easylm_plus.interop.beside import SUFFIX, beside, prefix
from easylm_plus.interop.companions import COMPANIONS
from easylm_plus.interop.difference import FILE
from easylm_plus.interop.peft import CONFIG
from easylm_plus.interop.tensor_files import INDEX, read_json
from easylm_plus.training.checkpoint import read_meta

GGUF = b"GGUF"  # what such files begin with


def checked(output: Path, inputs: Sequence[Path], force: bool, file: bool = False) -> Path:
    """The output's whole path, without links and `..`; an error if something there is in the way, or is an input.

    `file`: the output is a GGUF file, else a folder.

    An input is in the way at the output, in it, or around it; so is a file that a link in an input leads to.
    """
    if output.is_symlink():  # resolved, it would be the folder that the link leads to that is replaced
        raise UserError(f"{output}: found a link there; expected a new folder, or one that --force replaces")
    output = output.resolve()
    linked = [file for path in inputs if path.is_dir() for file in path.iterdir() if file.is_symlink()]
    for path in (*inputs, *linked):
        whole = path.resolve()
        if any(_same(output, place) for place in (whole, *whole.parents)):
            raise UserError(f"--output={output}: found the input {path} there; expected another place")
        if any(_same(whole, place) for place in output.parents):
            raise UserError(f"--output={output}: lies in the input {path}; expected another place")
    _replaceable(output, force, file)
    return output


def _same(a: Path, b: Path) -> bool:
    """The same place, also under two names (on file systems that ignore case, say)."""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _replaceable(output: Path, force: bool, file: bool = False) -> None:
    """An error if something is there that must stay."""
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError(f"{output}: found something there already; --force replaces it")
    if file:
        if output.is_symlink() or not output.is_file() or output.open("rb").read(len(GGUF)) != GGUF:
            raise UserError(f"{output}: found no GGUF file there; --force replaces only what a conversion has written")
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output}: found no folder there; --force replaces only what a conversion has written")
    if (found := _foreign(output)) is not None:
        raise UserError(f"{output}: found {found} there; --force replaces only what a conversion has written")


def _foreign(output: Path) -> str | None:
    """What speaks against a folder having been written by a conversion, and by nothing else; None: nothing."""
    if (output / "0").is_dir():
        others = [path.name for path in output.iterdir() if path.name not in ("0", "tokenizer")]
        if not others and not {"pieces", "quantized"} & read_meta(output, 0).keys():
            return "a checkpoint of a training run"
    else:
        described = ("config.json", FILE, CONFIG)
        known = {path for pattern in ("*.safetensors", INDEX, *described, *COMPANIONS)
                 for path in output.glob(pattern) if path.is_file()}  # fmt: skip
        others = [path.name for path in output.iterdir() if path not in known]
        keys = {key for name in described if output / name in known for key in read_json(output / name)}
        if not keys & {"architectures", "sha256", "peft_type"} or not any(
            path.suffix == ".safetensors" for path in known
        ):
            return "no model"
    return min(others) if others else None


@contextmanager
def replaced(output: Path, force: bool, needed: int) -> Iterator[Path]:
    """A folder beside `output` that takes its place if all goes well, and is gone if not.

    Args:
      output: as `checked` gave it.
      needed: bytes that will be written; an OSError (ENOSPC) if the disk has less.
    """
    _replaceable(output, force)
    _check_room(output, needed)
    with beside(output) as (new, old):
        yield new
        _replaceable(output, force)  # it took a while
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except BaseException:
            if old.exists():
                old.rename(output)
            raise


@contextmanager
def replaced_file(output: Path, force: bool, needed: int) -> Iterator[Path]:
    """As `replaced`, for a GGUF file: where to write what takes the output's place."""
    _replaceable(output, force, file=True)
    _check_room(output, needed)
    with beside(output) as (new, _):
        yield new / output.name
        _replaceable(output, force, file=True)
        (new / output.name).replace(output)


def _check_room(output: Path, needed: int) -> None:
    """An OSError (ENOSPC) if the disk has less than `needed` bytes; tells what other conversions have left."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < needed:
        place = f"{output} (takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free)"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
    for other in output.parent.glob(f"{prefix(output)}*{SUFFIX}"):
        print(f"{other} is of a conversion that still runs, or was killed: then remove it", file=sys.stderr)
