"""Permutations of range(size) that are functions: the image of an index is computed, nothing is stored or shuffled.

The generalised Feistel network on a x b >= size with cycle walking of J. Black and P. Rogaway, "Ciphers with
arbitrary finite domains" (CT-RSA 2002), with the finaliser of SplitMix64 (Steele, Lea, Flood 2014) as its round
function. Not for secrets. grain's index_shuffle does the same, but importing grain imports JAX.

The order of every run hangs on these functions: what they give may never change.
"""

import functools
import hashlib
import math

import numpy as np
import numpy.typing as npt

_ROUNDS = 8  # with 6, pairs of neighbours in 30 examples were still measurably uneven (chi² 1.7 per degree)
_MASK = (1 << 64) - 1
_OF_KEY, _OF_VALUE, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LARGEST = 1 << 62  # so that no sum of permute_many leaves 64 bits
_BLOCK = 1 << 14  # indices whose intermediate results stay in a core's cache

Words = npt.NDArray[np.uint64]


@functools.lru_cache(maxsize=4096)
def permutation_key(seed: int, name: str, number: int) -> int:
    """64 bits that look random: a function of the seed, of what is permuted and of a running number."""
    digest = hashlib.blake2b(f"{seed}/{number}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(index: int, size: int, key: int) -> int:
    """Image of index (0 <= index < size) under a permutation of range(size) that the 64-bit key selects."""
    left_size, right_size = _sides(size)
    while True:
        left, right = index % left_size, index // left_size
        for rounds in range(0, _ROUNDS, 2):
            left = (left + _mix(key + rounds, right)) % left_size
            right = (right + _mix(key + rounds + 1, left)) % right_size
        index = right * left_size + left
        if index < size:
            return index


def permute_many(index: npt.NDArray[np.int64], size: int, keys: Words) -> npt.NDArray[np.int64]:
    """`permute` of int64[n] indices, each with its own key of uint64[n]. Sizes up to 2^62."""
    if not 0 < size <= _LARGEST:
        raise ValueError(f"found size {size}; expected 1 to {_LARGEST}")
    image = index.astype(np.uint64)
    for start in range(0, len(image), _BLOCK):
        block, key = image[start : start + _BLOCK], keys[start : start + _BLOCK] * np.uint64(_OF_KEY)
        block[:] = _walk_once(block, size, key)
        outside = np.flatnonzero(block >= size)
        while len(outside):
            block[outside] = _walk_once(block[outside], size, key[outside])
            outside = outside[block[outside] >= size]
    return image.view(np.int64)


def _sides(size: int) -> tuple[int, int]:
    left_size = math.isqrt(size - 1) + 1
    return left_size, -(-size // left_size)


def _mix(key: int, value: int) -> int:
    mixed = (key * _OF_KEY + value * _OF_VALUE) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
    return mixed ^ (mixed >> 31)


def _walk_once(index: Words, size: int, spread: Words) -> Words:
    """The network applied once; spread: the keys times _OF_KEY."""
    left_size, right_size = map(np.uint64, _sides(size))
    right = index // left_size
    left = index - right * left_size
    for rounds in range(0, _ROUNDS, 2):
        left = _add(left, _mix_many(spread, rounds, right), left_size)
        right = _add(right, _mix_many(spread, rounds + 1, left), right_size)
    return right * left_size + left


def _mix_many(spread: Words, rounds: int, value: Words) -> Words:
    mixed = value * np.uint64(_OF_VALUE)
    mixed += spread
    mixed += np.uint64(rounds * _OF_KEY & _MASK)
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _add(value: Words, mixed: Words, modulus: np.uint64) -> Words:
    """(value + mixed) % modulus, without the carry that 64 bits would lose. NumPy divides by one number much faster
    than it takes remainders."""
    mixed -= mixed // modulus * modulus
    mixed += value
    mixed -= mixed // modulus * modulus
    return mixed
