"""The smallest hashes as rensa and as datasketch find them, for `dedupe.py`: uint32[n, P] from each text's hashes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Uint32 = npt.NDArray[np.uint32]


def rensa(hashes: Sequence[Uint32], permutations: int) -> Uint32:
    from rensa import RMinHash

    flat = np.concatenate(hashes).astype(np.uint64)
    offsets = np.cumsum([0, *map(len, hashes)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, permutations, 42)
    return np.array(matrix.to_rows(), np.uint32)


def datasketch(hashes: Sequence[Uint32], permutations: int) -> Uint32:
    """`bulk` makes the orders once for all texts; `hashfunc` is called for every hash, which it returns as it is."""
    from datasketch import MinHash

    made = MinHash.generator((h.tolist() for h in hashes), num_perm=permutations, hashfunc=lambda value: value)
    return np.array([sketch.hashvalues for sketch in made], np.uint32)


PEERS = {"rensa": rensa, "datasketch": datasketch}
