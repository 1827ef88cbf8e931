"""Signatures of texts by MinHash: how much of what two texts consist of they share, from some bytes of each.

A text is the set of its shingles, here all runs of 5 characters. The share of shingles that two texts have in common
(the Jaccard similarity J of the sets) is the chance that a random order of all shingles puts the same one first in
both; so the share of P such orders in which the first ones agree estimates it, with a standard deviation of
sqrt(J(1 - J)/P) (A. Broder, "On the resemblance and containment of documents", 1997). Of each first one 8 bits are
kept for the estimate (P. Li and C. König, "b-Bit Minwise Hashing", WWW 2010): other shingles agree in them once in 256,
which `estimate` takes out again. All 32 bits go into the bands: the P values are cut into bands of some rows, each band
is hashed to one key, and only texts that share a key are ever compared. That finds a pair with the probability
1 - (1 - J^rows)^bands (J. Leskovec, A. Rajaraman, J. Ullman, "Mining of Massive Datasets", chapter 3).

Characters and not words, because five words in a row rarely survive noise: with 2 % of the characters changed, word
5-grams in 14 bands of 8 (as FineWeb has them) bring 1 % of the copies together with their originals, character 5-grams
in 22 bands of 5 all of them. Characters need no word boundaries either, which Chinese and Japanese do not write. 28
bands of 4 find no more, and bring five times as many unrelated texts together. Measured by benchmarks/dedupe.py.

The orders are h -> a·h + b modulo 2^32 with odd a, of mixed hashes: not min-wise independent in theory, as good as that
in practice (a test measures bias and deviation). It is plain arithmetic on integers, and has to be: signatures are kept
and compared with those of later runs, so they may not depend on a machine, a process or the version of a package. What
else there is: rensa (Rust) takes our hashes and needs a fifth of the time for the one step that it could replace, the
minima, which would make the stage twice as fast; but what it gives changed with its version 0.5, it takes other code
on other processors, and the step is ten lines here. datasketch has the same orders, calls Python for every shingle and
takes two and a half times as long; its buckets are for the memory of one process.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

Uint8 = npt.NDArray[np.uint8]
Uint32 = npt.NDArray[np.uint32]
Uint64 = npt.NDArray[np.uint64]

NO_KEY = 0  # of a band, or of an exact key: nothing else has it
_NOTHING = np.uint32(0xFFFFFFFF)  # the smallest value of no shingles
_BATCH = 1 << 16  # characters hashed at once, and
_BLOCK = 1 << 11  # shingles put into all orders at once: both small enough for a core's cache


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What two signatures must both have been made with: characters of a shingle, bands, rows of a band."""

    shingle: int = 5
    bands: int = 22
    rows: int = 5

    @property
    def permutations(self) -> int:
        """P, at most 255."""
        return self.bands * self.rows


SCHEME = Scheme()


@dataclasses.dataclass
class Signatures:
    """Of n samples: `exact` uint64[n] and `bands` uint64[n, B], keys of which equal ones are compared, and NO_KEY;
    `sketches` uint8[n, P], and `needed` uint8[n], in how many bytes an earlier sketch has to agree with a sample's for
    the sample to be a duplicate."""

    exact: Uint64
    bands: Uint64
    sketches: Uint8
    needed: Uint8

    def __len__(self) -> int:
        return len(self.exact)

    def save(self, file: BinaryIO | Path) -> None:
        np.savez(file, exact=self.exact, bands=self.bands, sketches=self.sketches, needed=self.needed)

    @classmethod
    def load(cls, file: BinaryIO | Path) -> "Signatures":
        with np.load(file, allow_pickle=False) as arrays:
            return cls(*(arrays[field.name] for field in dataclasses.fields(cls)))


def sketch(texts: Sequence[str], salt: int = 0, scheme: Scheme = SCHEME) -> tuple[Uint64, Uint8]:
    """(bands uint64[n, B], sketches uint8[n, P]) of normalised texts.

    `salt`, 64 bits, keeps texts of different kinds apart: their keys differ. A text shorter than a shingle has none.
    """
    return bands_and_sketches(minima(shingles(texts, scheme.shingle), len(texts), scheme.permutations), salt, scheme)


def estimate(matches: npt.ArrayLike, permutations: int) -> npt.NDArray[np.float64]:
    """The Jaccard similarity, from 0 to 1, of two texts whose sketches agree in `matches` of their bytes."""
    by_chance = 1 / 256
    return np.maximum(0, (np.asarray(matches) / permutations - by_chance) / (1 - by_chance))


def needed(similarity: float, permutations: int) -> int:
    """In how many bytes, one at least, two sketches agree whose estimate is `similarity` (0 to 1) or more."""
    reached = estimate(np.arange(permutations + 1), permutations) >= similarity
    return max(1, int(np.argmax(reached)))


def shingles(texts: Iterable[str], size: int) -> Iterator[Uint32]:
    """For each text the mixed hashes uint32[max(0, characters - size + 1)] of its runs of `size` characters."""
    for batch in _batches(texts):
        codes = np.frombuffer("".join(batch).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)
        hashes, start = _mix32(_rolled(codes, size)), 0
        for text in batch:
            yield hashes[start : start + max(0, len(text) - size + 1)]
            start += len(text)


def minima(hashes: Iterable[Uint32], count: int, permutations: int) -> Uint32:
    """uint32[count, P]: the smallest value under each of P orders of each text's hashes uint32[m]."""
    found = np.full((count, permutations), _NOTHING, np.uint32)
    multipliers, offsets = _orders(permutations)
    for row, shingled in zip(found, hashes):
        for start in range(0, len(shingled), _BLOCK):
            values = shingled[start : start + _BLOCK] * multipliers
            values += offsets
            np.minimum(row, values.min(axis=1), out=row)
    return found


def bands_and_sketches(smallest: Uint32, salt: int, scheme: Scheme) -> tuple[Uint64, Uint8]:
    """(uint64[n, B], uint8[n, P]) of uint32[n, P]; where there are no shingles the keys are NO_KEY."""
    keys = _mix64(np.arange(scheme.bands, dtype=np.uint64) + np.uint64(salt))
    for row in range(scheme.rows):
        keys = _mix64(keys ^ smallest[:, row :: scheme.rows])
    empty = (smallest == _NOTHING).all(axis=1, keepdims=True)
    keys = np.where(empty, np.uint64(NO_KEY), np.maximum(keys, np.uint64(NO_KEY + 1)))
    return keys, (smallest * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= _BATCH:
            yield batch
            batch, length = [], 0
    yield batch


def _rolled(codes: Uint32, size: int) -> Uint32:
    """uint32[max(0, m - size + 1)]: a polynomial in the codes of each run."""
    count = max(0, len(codes) - size + 1)
    hashes = codes[:count].copy()
    for shift in range(1, size):
        hashes *= np.uint32(0x85EBCA77)
        hashes += codes[shift : shift + count]
    return hashes


def _orders(count: int) -> tuple[Uint32, Uint32]:
    """a and b of `count` orders, uint32[count, 1] each: always the same ones."""
    drawn = hashlib.shake_256(b"orders of shingles").digest(8 * count)
    multipliers, offsets = np.frombuffer(drawn, "<u4").astype(np.uint32).reshape(2, count, 1)
    return multipliers | np.uint32(1), offsets


def _mix32(hashes: Uint32) -> Uint32:
    """MurmurHash3's finaliser: every bit comes to depend on every bit."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = (hashes ^ hashes >> np.uint32(shift)) * np.uint32(multiplier)
    return hashes ^ hashes >> np.uint32(16)


def _mix64(keys: Uint64) -> Uint64:
    """The same for 64 bits."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        keys = (keys ^ keys >> np.uint64(33)) * np.uint64(multiplier)
    return keys ^ keys >> np.uint64(33)
