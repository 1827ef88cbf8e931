"""Every type of leaf that a weight may be kept as, in a state or a checkpoint, under the name that a checkpoint has."""

from typing import Any

from easylm_plus.numerics import stored  # noqa: F401 how a Scaled multiplies
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.formats import Scaled
from easylm_plus.numerics.int8_rows import Int8Rows
from easylm_plus.numerics.integer import Integers
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.nf4 import NF4
from easylm_plus.numerics.packed_ternary import PackedTernary
from easylm_plus.numerics.sparsity import Sparse, TwoFour
from easylm_plus.numerics.trits import Trits

KINDS = (Scaled, LowRank, PackedTernary, Trits, Integers, NF4, Int8Rows, TwoFour, Sparse)
KEPT: dict[str, type] = {kind.__name__: kind for kind in KINDS}


def is_kept(x: Any) -> bool:
    """For tree functions: what is kept of a weight is one leaf, if it is more than an array."""
    return isinstance(x, Scaled | LowRank | Coded)
