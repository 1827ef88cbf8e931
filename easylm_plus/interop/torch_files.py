"""Tensors in PyTorch's own files (.bin, .pth, .pt), read without torch and without running anything.

Such a file is a zip archive of raw storages and of one pickle, data.pkl, that says which tensor is which part of which
storage. torch_pickle.py runs that pickle; here it is held against the archive, before the first tensor is read: every
entry is stored as it is, uncompressed, so no entry is larger than the file, and every view ends inside its storage.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.interop.torch_pickle import Machine, Refused, View, shown

ENCRYPTED = 1  # a bit of a zip entry's flags


class TorchFiles:
    """The tensors of some files of torch.save({name: tensor}); each tensor is in one of them."""

    def __init__(self, paths: Sequence[Path], place: str):
        self.place = place
        self._views: dict[str, tuple[Path, zipfile.ZipFile, str, View]] = {}
        for path in paths:
            archive, prefix = _archive(path)
            for name, view in _state_dict(path, _read(path, archive, f"{prefix}data.pkl")).items():
                if name in self._views:
                    raise UserError(
                        f"{place}: found {shown(name)} in {self._views[name][0].name} and in {path.name}, "
                        "expected each tensor in one file"
                    )
                entry = f"{prefix}data/{view.storage.key}"
                _check(f"{path}: {shown(name)}", view, archive, entry)
                self._views[name] = path, archive, entry, view

    def names(self) -> Set[str]:
        return self._views.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name][-1].shape

    def dtype(self, name: str) -> np.dtype:
        return self._views[name][-1].storage.dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor, read-only; the archive's checksum of its storage is compared."""
        path, archive, entry, (storage, offset, shape, strides) = self._views[name]
        if not math.prod(shape):
            return np.empty(shape, storage.dtype)
        flat = np.frombuffer(_read(path, archive, entry), storage.dtype)
        # The stride of an axis of size 1 is never taken, and may be any number.
        steps = [stride * flat.itemsize if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)


def _check(place: str, view: View, archive: zipfile.ZipFile, entry: str) -> None:
    """Is the whole view inside its storage? numpy does not ask."""
    storage, offset, shape, strides = view
    if entry not in archive.NameToInfo:
        raise UserError(f"{place}: found no {entry} in the archive, expected its storage there")
    nbytes, itemsize = archive.getinfo(entry).file_size, storage.dtype.itemsize
    if nbytes % itemsize:
        raise UserError(f"{place}: found {nbytes} bytes in {entry}, expected a multiple of {itemsize}")
    if math.prod(max(size, 1) for size in shape) * itemsize >= 2**62:
        raise UserError(f"{place}: found a tensor of shape {list(shape)}, expected one that can be addressed")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= nbytes // itemsize:
        raise UserError(f"{place}: found a view of elements {offset} to {last}, of {nbytes // itemsize}")


def _archive(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The opened archive, and the folder in it."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: found no zip archive, expected what torch.save has written since PyTorch 1.6")
    with _damage_named(path):
        archive = zipfile.ZipFile(path)
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            how = "encrypted" if info.flag_bits & ENCRYPTED else "compressed"
            raise UserError(f"{path}: found {shown(info.filename)} {how}, expected it stored as torch.save does")
        if info.file_size > path.stat().st_size:
            raise UserError(f"{path}: damaged archive ({shown(info.filename)} is said to be larger than the archive)")
    found = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError(f"{path}: found {len(found)} entries data.pkl in the archive, expected 1")
    order = f"{found[0]}byteorder"
    if order in archive.NameToInfo and (told := _read(path, archive, order)) != b"little":
        raise UserError(f"{path}: found byte order {told[:20]!r}, expected little")
    return archive, found[0]


def _read(path: Path, archive: zipfile.ZipFile, entry: str) -> bytes:
    with _damage_named(path):
        return archive.read(entry)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What zipfile raises on a damaged archive becomes one error; RuntimeError: of features it does not know."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged archive ({shown(str(error) or type(error).__name__)})") from error


def _state_dict(path: Path, program: bytes) -> dict[str, View]:
    """The program's result, which must be a dict of tensors."""
    try:
        result = Machine().run(program)
    except Refused as error:
        raise UserError(f"{path}: found {error}, which plain tensors do not need; nothing was run") from None
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged pickle ({shown(str(error))})") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: found a {type(result).__name__}, expected a dict of tensors")
    for name, value in result.items():
        if not isinstance(value, View):
            found = f"{type(value).__name__} under {shown(name)}"
            raise UserError(f"{path}: found {found}, expected a tensor under a name")
    return result
