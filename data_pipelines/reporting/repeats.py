"""How often each of many keys comes, in bounded memory.

Up to a number of different keys all of them are counted. When there are more, only those stay whose hash is divisible
by 2, then by 4, by 8 …: a sample of the keys, each with its exact count (P. B. Gibbons, "Distinct sampling for
highly-accurate answers to distinct values queries and event reports", VLDB 2001). Which keys these are does not depend
on the order in which they come, so counts of parts of the data can be merged.
"""

import hashlib
from collections import Counter
from typing import NamedTuple

CAPACITY = 1 << 17  # keys, about 25 MB


class Repeated(NamedTuple):
    """Different keys, those of them that came more than once, and which share of all that came these make up."""

    keys: int
    repeated: int
    share: float


class Repeats:
    """`place` of a key: the smallest number that came with it, such as the row it first stands in."""

    def __init__(self, capacity: int = CAPACITY):
        self.capacity, self.level = capacity, 0
        self._found: dict[int, tuple[int, int]] = {}  # hash -> (count, place)

    def add(self, key: str, place: int) -> None:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._add(int.from_bytes(digest, "little"), 1, place)

    def merge(self, other: "Repeats") -> None:
        self._rise(other.level)
        for hashed, (count, place) in other._found.items():
            self._add(hashed, count, place)

    @property
    def one_in(self) -> int:
        """Of how many keys one is counted; 1: all are."""
        return 1 << self.level

    def repeated(self) -> "Repeated":
        """Of the keys that are counted."""
        sizes = self.sizes()
        often = {count: keys for count, keys in sizes.items() if count > 1}
        came = sum(count * keys for count, keys in sizes.items())
        again = sum(count * keys for count, keys in often.items())
        return Repeated(sizes.total(), sum(often.values()), again / came if came else 0.0)

    def sizes(self) -> Counter[int]:
        """How many keys came once, twice, …; of the keys that are counted."""
        return Counter(count for count, _ in self._found.values())

    def top(self, number: int) -> list[tuple[int, int]]:
        """(count, place) of the keys that came most often, at least twice."""
        repeated = sorted((-count, place) for count, place in self._found.values() if count > 1)
        return [(-count, place) for count, place in repeated[:number]]

    def _add(self, hashed: int, count: int, place: int) -> None:
        if hashed & (self.one_in - 1):
            return
        before, first = self._found.get(hashed, (0, place))
        self._found[hashed] = (before + count, min(first, place))
        while len(self._found) > self.capacity:
            self._rise(self.level + 1)

    def _rise(self, level: int) -> None:
        if level > self.level:
            self.level = level
            self._found = {h: found for h, found in self._found.items() if not h & (self.one_in - 1)}
