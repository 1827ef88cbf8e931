"""Rows of text to train small models on: one file each, every token learned, the same on every run of a machine."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from package_text import Document, documents

ONE_IN, HELDOUT_ONE_IN, HELDOUT_ROWS = 6, 20, 256


@dataclasses.dataclass(frozen=True)
class Piece:
    """As many tokens of one file as a row has, and one."""

    id: str
    ids: Any


class Text:
    """The pieces for training and those held out, and what tells them from other text."""

    def __init__(self, folder: Path, vocab: int, length: int):
        """`folder`: of the tokenizer, trained if it is not there; `length`: tokens that a row predicts."""
        from data_pipelines.tokenizers.tokenizer import load_tokenizer
        from data_pipelines.tokenizers.training import train

        train_documents, heldout_documents = documents(ONE_IN, HELDOUT_ONE_IN)
        path = folder / "tokenizer"
        if not path.exists():
            train((document.text for document in train_documents), vocab, (), path)
        self.tokenizer, self.length = load_tokenizer(path), length
        self.train = list(self._pieces(train_documents))
        self.heldout = list(self._pieces(heldout_documents))
        # from all files, not the first ones by name, which are of one package
        self.heldout = self.heldout[:: max(1, len(self.heldout) // HELDOUT_ROWS)][:HELDOUT_ROWS]
        size = lambda documents: sum(len(document.text.encode()) for document in documents)
        self.bytes = {"train": size(train_documents), "heldout": size(heldout_documents)}
        digest = hashlib.sha256()
        for piece in (*self.train, *self.heldout):
            digest.update(piece.ids.tobytes())
        self.hash = digest.hexdigest()[:16]

    def _pieces(self, found: Sequence[Document]) -> Iterator[Piece]:
        """Whole rows only: without packing no filter can look into another document, and no row has padding."""
        import numpy as np

        bos, eos = [self.tokenizer.bos_id], [self.tokenizer.eos_id]
        for document, ids in zip(found, self.tokenizer.encode_batch([d.text for d in found]), strict=True):
            ids = np.concatenate([bos, ids, eos]).astype(np.int32)
            for start in range(0, len(ids) - self.length, self.length):
                yield Piece(f"{document.name}:{start}", ids[start : start + self.length + 1])


def encode(piece: Piece) -> Any:
    """A piece as the loader takes it: every token is learned."""
    import numpy as np

    from data_pipelines.batches.packing import Example

    return Example(piece.ids, np.ones(len(piece.ids), np.float32))
