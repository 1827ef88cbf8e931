"""Examples that are token ids already: how a conversation keeps them.

Such a conversation has turns of the role "ids" alone. A turn is a run of ids that weigh the same, as decimal numbers
with single spaces between them and without leading zeros, "12 5 1023", so that equal ids are equal text; its weight is
that of predicting these ids. Text rather than a structure of its own, because most of what handles a conversation
wants to count, hash or show text. What reads words must not take these for some: see `stages.base.NOT_TEXT`.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipelines.conversation import Turn
from data_pipelines.errors import InputError, shown

ROLE = "ids"
LARGEST = 2**31 - 1  # of an id: what int32 holds
FORM = f"whole numbers from 0 to {LARGEST:,} with single spaces between them"

_TEXT = re.compile(r"(?:0|[1-9][0-9]{0,9})(?: (?:0|[1-9][0-9]{0,9}))*+")


def ids_turns(ids: Sequence[int], weights: Sequence[float]) -> tuple[Turn, ...]:
    """A turn for each run of ids that weigh the same. `ids`, as many as weights, are from 0 to LARGEST."""
    runs = itertools.groupby(zip(ids, weights), key=lambda pair: pair[1])
    return tuple(Turn(ROLE, " ".join([str(i) for i, _ in run]), float(weight)) for weight, run in runs)


def read_ids(text: str) -> npt.NDArray[np.int32]:
    """int32[n >= 1]: the ids of a turn. Raises InputError for any other text."""
    if not _TEXT.fullmatch(text):
        raise InputError(f"found {shown(text)} as token ids; expected {FORM}")
    ids = np.fromstring(text, np.int64, sep=" ")
    if (largest := int(np.max(ids))) > LARGEST:
        raise InputError(f"found the token id {largest}; expected {FORM}")
    return ids.astype(np.int32)


def all_ids(turns: Sequence[Turn]) -> str:
    """The ids of all turns as one text, whatever they weigh; empty where no turn is of this role."""
    return " ".join([turn.text for turn in turns if turn.role == ROLE])
