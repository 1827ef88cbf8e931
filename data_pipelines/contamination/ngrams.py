"""Runs of words in a text as 64-bit numbers: what texts have in common is found by comparing these.

A text is brought to NFKC (Unicode Standard Annex 15) and case-folded, and what is neither letter, mark nor digit ends a
word: "Don't  PANIC!" and "don’t panic" are the same three words. Scripts that are written without spaces (Chinese,
Japanese, Thai, Lao, Khmer, Burmese) give a word per character. Invisible characters (soft hyphens, joiners) are left
out, and a zero character is a word that equals no other, which keeps runs from crossing from one text into the next.

All of it is array arithmetic. The hash of a run t[0..n) is the sum of t[i] B^i modulo 2^64 for an odd B, which is the
difference of two running sums, scaled by a power of B's inverse (Karp and Rabin, "Efficient randomized
pattern-matching algorithms", 1987), and is then mixed by the finaliser of SplitMix64 (Steele, Lea and Flood 2014). So
runs of any length cost the same. A word is such a run of its characters. Equal hashes are taken for equal runs: among
10^7 runs looked for and 10^10 looked at, 0.005 coincidences are expected. It is not a hash for secrets.
"""

import functools
import unicodedata

import numpy as np
import numpy.typing as npt

UInts = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

BOUNDARY = "\0"

_OUTSIDE, _INSIDE, _ALONE, _NOTHING = range(4)  # between words; of a word; a word of its own; as if not there
_WITHOUT_SPACES = (
    (0x0E01, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # Chinese and Japanese from here on
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)

_OF_WORDS, _OF_CHARACTERS = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # the base B of either sum
_INVERSE = {base: pow(base, -1, 1 << 64) for base in (_OF_WORDS, _OF_CHARACTERS)}


class Words:
    """The words of a text.

    codes: uint32[C], the normal form as code points. starts, ends: int64[W], where words lie in it. hashes: uint64[W].
    alone: bool[W], whether a word is a character of a script without spaces.
    """

    def __init__(self, text: str):
        codes = _codes(text)
        kinds = _kinds()[codes]
        if (kinds == _NOTHING).any():
            codes, kinds = codes[kinds != _NOTHING], kinds[kinds != _NOTHING]
        inside, alone = kinds == _INSIDE, kinds == _ALONE
        begins, stops = inside.copy(), inside.copy()
        begins[1:] &= ~inside[:-1]
        stops[:-1] &= ~inside[1:]
        self.codes = codes
        self.starts, self.ends = np.flatnonzero(begins | alone), np.flatnonzero(stops | alone) + 1
        self.alone: npt.NDArray[np.bool_] = alone[self.starts]
        self.hashes = Runs(codes.astype(np.uint64), _OF_CHARACTERS).between(self.starts, self.ends)

    def __len__(self) -> int:
        return len(self.starts)

    def quote(self, first: int, last: int) -> str:
        """The normal form from one word to another."""
        return self.codes[self.starts[first] : self.ends[last]].tobytes().decode("utf-32-le", "replace")


class Characters:
    """The characters of the words of a text, as `Words` has words: places int64[N] in its codes, hashes uint64[N]."""

    def __init__(self, words: Words):
        kinds = _kinds()[words.codes]
        self.places = np.flatnonzero((kinds == _INSIDE) | (kinds == _ALONE))
        self.hashes = _mixed(words.codes[self.places].astype(np.uint64))

    def __len__(self) -> int:
        return len(self.places)


class Runs:
    """Hashes of runs of `values` uint64[N]."""

    def __init__(self, values: UInts, base: int = _OF_WORDS):
        self.inverse = _powers(_INVERSE[base], len(values) + 1)
        self.sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * _powers(base, len(values)), out=self.sums[1:])

    def of(self, length: int) -> UInts:
        """All runs of a length: uint64[max(0, N - length + 1)]."""
        if length >= len(self.sums):
            return np.zeros(0, np.uint64)
        sums = (self.sums[length:] - self.sums[:-length]) * self.inverse[:-length]
        return _mixed(sums + np.uint64(length))

    def between(self, starts: Ints, ends: Ints) -> UInts:
        """The runs values[start:end)."""
        sums = (self.sums[ends] - self.sums[starts]) * self.inverse[starts]
        return _mixed(sums + (ends - starts).astype(np.uint64))


def _codes(text: str) -> npt.NDArray[np.uint32]:
    normal = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return np.frombuffer(normal.encode("utf-32-le", "surrogatepass"), np.uint32)


def _powers(base: int, count: int) -> UInts:
    """1, base, base², … uint64[count]"""
    return _first_powers(base, count.bit_length())[:count]


@functools.lru_cache(maxsize=64)
def _first_powers(base: int, bits: int) -> UInts:
    powers = np.full(1 << bits, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _mixed(x: UInts) -> UInts:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """What each of Unicode's characters does to words: uint8[0x110000]."""
    kinds = np.fromiter(map(_kind, range(0x110000)), np.uint8, 0x110000)
    for first, last in _WITHOUT_SPACES:
        span = kinds[first : last + 1]
        span[span == _INSIDE] = _ALONE
    kinds[ord(BOUNDARY)] = _ALONE
    return kinds


def _kind(code: int) -> int:
    category = unicodedata.category(chr(code))
    if category == "Cf" or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:  # the last two vary an emoji
        return _NOTHING
    return _INSIDE if category[0] in "LMN" else _OUTSIDE
