"""Signatures of texts by MinHash: how much of what two texts consist of they share, from some bytes of each.

A text is the set of its shingles, here all runs of 5 characters. The share of shingles that two texts have in common
(the Jaccard similarity of the sets) is the chance that a random order of all shingles puts the same one first in both;
so the share of P such orders in which the first ones agree estimates it, with a standard deviation of
sqrt(J(1 - J)/P) (A. Broder, "On the resemblance and containment of documents", 1997). Of each first one 8 bits are kept
for the estimate (P. Li and C. König, "b-Bit Minwise Hashing", WWW 2010): other shingles agree in them once in 256, which
`estimate` takes out again. All 32 bits go into the bands: P = bands x rows values are cut into bands, each band is
hashed to one key, and only texts that share a key are ever compared. That finds a pair with the probability
1 - (1 - J^rows)^bands (J. Leskovec, A. Rajaraman, J. Ullman, "Mining of Massive Datasets", chapter 3).

Characters and not words, because words of 5 in a row rarely survive noise: with 2 % of the characters changed, word
5-grams with 14 bands of 8 (as FineWeb has them) find 1 to 2 % of the copies, character 5-grams with the numbers here all
but a few in a thousand. Characters need no word boundaries either, which Chinese and Japanese do not write. Why these
numbers and no others: benchmarks/dedupe.py.

The orders are h -> a·h + b modulo 2^32 with odd a, of mixed hashes; not min-wise independent in theory, and in practice
as good as random orders (a test measures bias and deviation). It is plain arithmetic on integers, and has to be:
signatures are kept and compared with those of later runs, so they may not depend on a machine, a process or a version.
What else there is: rensa (Rust) takes our hashes and is 20 times as fast at the one step that it could replace, the
minima, which would make the stage three times as fast; but its numbers changed with 0.5, it picks code by processor, and
the step is six lines here. datasketch has the same orders and calls Python for every shingle: a tenth of the speed.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Uint8, Uint32, Uint64 = npt.NDArray[np.uint8], npt.NDArray[np.uint32], npt.NDArray[np.uint64]

NO_KEY = 0  # of a band, or of an exact key: this one is never equal to another
_BATCH = 1 << 16  # characters hashed at once, and
_BLOCK = 1 << 11  # shingles put into all orders at once: both small enough for a core's cache
_PRIME = np.uint32(0x85EBCA77)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What two signatures must have been made with to be compared: characters of a shingle, bands, rows of a band."""

    shingle: int = 5
    bands: int = 22
    rows: int = 5

    @property
    def permutations(self) -> int:
        return self.bands * self.rows


SCHEME = Scheme()


@dataclasses.dataclass
class Signatures:
    """Of n samples: `exact` uint64[n], `bands` uint64[n, B], `sketches` uint8[n, P]. A key of NO_KEY is none."""

    exact: Uint64
    bands: Uint64
    sketches: Uint8

    def __len__(self) -> int:
        return len(self.exact)

    def save(self, file: BinaryIO | Path) -> None:
        np.savez(file, exact=self.exact, bands=self.bands, sketches=self.sketches)

    @classmethod
    def load(cls, file: BinaryIO | Path) -> "Signatures":
        with np.load(file, allow_pickle=False) as arrays:
            return cls(arrays["exact"], arrays["bands"], arrays["sketches"])


def sketch(texts: Sequence[str], salt: int = 0, scheme: Scheme = SCHEME) -> tuple[Uint64, Uint8]:
    """(bands uint64[n, B], sketches uint8[n, P]) of normalised texts.

    `salt` keeps texts of different kinds apart: their keys are never equal. A text shorter than a shingle has no keys.
    """
    minima = np.empty((len(texts), scheme.permutations), np.uint32)
    multipliers, offsets = orders(scheme.permutations)
    for row, hashes in enumerate(shingles(texts, scheme.shingle)):
        minima[row] = smallest(hashes, multipliers, offsets)
    return of_minima(minima, np.array([len(text) >= scheme.shingle for text in texts], bool), salt, scheme)


def of_minima(minima: Uint32, valid: npt.NDArray[np.bool_], salt: int, scheme: Scheme) -> tuple[Uint64, Uint8]:
    """Bands and sketches of uint32[n, P] smallest values; rows that are not `valid` get NO_KEY in every band."""
    keys = np.arange(scheme.bands, dtype=np.uint64) + np.uint64(salt & (1 << 64) - 1)
    keys = np.broadcast_to(_mix64(keys), (len(minima), scheme.bands))
    for row in range(scheme.rows):
        keys = _mix64(keys ^ minima[:, row :: scheme.rows])
    keys = np.where(valid[:, None], np.maximum(keys, 1), NO_KEY).astype(np.uint64)
    return keys, (minima * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def estimate(matches: npt.ArrayLike, permutations: int) -> npt.NDArray[np.float32]:
    """The Jaccard similarity of two texts whose sketches agree in `matches` of their bytes, from 0 to 1."""
    by_chance = 1 / 256
    share = (np.asarray(matches, np.float64) / permutations - by_chance) / (1 - by_chance)
    return np.maximum(share, 0).astype(np.float32)


def orders(count: int) -> tuple[Uint32, Uint32]:
    """a, b of the orders a·h + b mod 2^32: uint32[count, 1] each, always the same ones; a is odd."""
    drawn = np.frombuffer(hashlib.shake_256(b"orders of shingles").digest(8 * count), "<u4").astype(np.uint32)
    multipliers, offsets = drawn.reshape(count, 2, 1).transpose(1, 0, 2)
    return np.ascontiguousarray(multipliers | np.uint32(1)), np.ascontiguousarray(offsets)


def smallest(hashes: Uint32, multipliers: Uint32, offsets: Uint32) -> Uint32:
    """uint32[P]: the smallest value under each order of uint32[m] hashes; the largest number there is if m is 0."""
    found = np.full(len(multipliers), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(hashes), _BLOCK):
        values = hashes[start : start + _BLOCK] * multipliers
        values += offsets
        np.minimum(found, values.min(axis=1), out=found)
    return found


def shingles(texts: Sequence[str], size: int) -> Iterator[Uint32]:
    """For each text the mixed hashes uint32[max(0, characters - size + 1)] of its runs of `size` characters."""
    for batch in _batches(texts):
        codes = np.frombuffer("".join(batch).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)
        hashes = _mix32(_rolled(codes, size))
        start = 0
        for text in batch:
            yield hashes[start : start + max(0, len(text) - size + 1)]
            start += len(text)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= _BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _rolled(codes: Uint32, size: int) -> Uint32:
    """uint32[max(0, m - size + 1)]: a polynomial in the codes of each run."""
    count = max(0, len(codes) - size + 1)
    hashes = codes[:count].copy()
    for shift in range(1, size):
        hashes *= _PRIME
        hashes += codes[shift : shift + count]
    return hashes


def _mix32(hashes: Uint32) -> Uint32:
    """MurmurHash3's finaliser: every bit depends on every bit."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = (hashes ^ hashes >> np.uint32(shift)) * np.uint32(multiplier)
    return hashes ^ hashes >> np.uint32(16)


def _mix64(keys: Uint64) -> Uint64:
    """The same for 64 bits."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        keys = (keys ^ keys >> np.uint64(33)) * np.uint64(multiplier)
    return keys ^ keys >> np.uint64(33)
