"""Questions and answers in Yuan 2.0's own form, one a line (data_pipelines/sources/yuan.py).

    python -m data_pipelines.prepare --config=configs/data/yuan.py --input=RAW --output=data/yuan

Reads RAW/yuan/*.txt.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import InputError


def get_config(arg: str = "") -> ConfigDict:
    """No arguments."""
    if arg:
        raise InputError(f"configs/data/yuan.py takes no arguments, found {arg!r}")
    config = ConfigDict()
    config.sources = ConfigDict({"yuan": {"kind": "yuan"}})
    config.heldout = 0.01
    config.policy = "skip"
    config.missing = "error"
    config.max_turn_chars = 200_000
    config.tokenizer = ConfigDict({"train": False})
    return config
