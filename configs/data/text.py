"""Plain text for pre-training: every .txt, .txt.gz and .jsonl file ("text" key) under the input folder.

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text

A document longer than a row keeps its beginning only, unless a run has data.packing=concat_split.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import InputError


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise InputError(f"configs/data/text.py takes no arguments, found {arg!r}")
    config = ConfigDict()
    config.sources = ConfigDict(
        {
            "text": {"kind": "text", "patterns": ("**/*.txt", "**/*.txt.gz")},
            "jsonl": {"kind": "jsonl", "patterns": ("**/*.jsonl", "**/*.jsonl.gz")},
        }
    )
    config.heldout = 0.01
    config.policy = "skip"
    config.missing = "skip"
    config.max_turn_chars = 10_000_000
    config.tokenizer = ConfigDict({"train": False})
    return config
