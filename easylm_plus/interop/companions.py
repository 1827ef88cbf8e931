"""What belongs to a model beside its weights: the tokenizer in all its forms, chat template, generation defaults."""

import shutil
from pathlib import Path

from easylm_plus.errors import UserError

COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
              "chat_template.*", "generation_config.json")  # fmt: skip


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies the files that travel with weights; returns their names.

    A published folder may hold links to anywhere, and what they lead to would be published with the next one: they are
    followed within the folder, and to the blobs/ that Hugging Face's cache keeps above it.
    """
    named = sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if not path.is_dir()})
    whole = source.resolve()
    for path in named:
        target = path.resolve()
        if whole not in target.parents and target.parent not in [place / "blobs" for place in whole.parents]:
            raise UserError(f"{path}: found a link to {target}, expected a file, or a link to one in the same folder")
        if not target.is_file():
            raise UserError(f"{path}: found a link to nothing, or no plain file; expected a file")
        shutil.copyfile(target, folder / path.name)
    return [path.name for path in named]
