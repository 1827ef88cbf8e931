"""Chinese web text alone, in the form of SkyPile-150B, with all filters on.

    python -m data_pipelines.prepare --config=configs/data/skypile.py --input=RAW --output=data/skypile

Reads RAW/zh_web/*.jsonl (data_pipelines/sources/zh_web.py says where from). SkyPile itself comes filtered and
deduplicated; this is what raw pages need:

    normalise      entities of HTML that were left in the text; never the width of punctuation
    filter         Chinese by its script, 200 characters or more (ChineseWebText, arXiv 2311.01149), no menus, footers
                   and mojibake, no repetition (Gopher, arXiv 2112.11446); boilerplate lines are taken out
    dedupe         exact and near duplicates, of which templated pages would be many at a lower similarity

    --config=configs/data/skypile.py:simplified     or :traditional, to keep one script alone

A core does about 450 pages of 1,400 characters a second up to deduplication, most of it on repetition.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import InputError

SCRIPTS = ("", "simplified", "traditional")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "", "simplified" or "traditional"."""
    if arg not in SCRIPTS:
        raise InputError(f"skypile.py: found {arg!r}; expected simplified or traditional")
    chinese = {"script": arg or None}
    return ConfigDict(
        {
            "sources": {"zh_web": {"kind": "zh_web"}},
            "stages": {
                "normalise": {"entities": True},
                "filter": {"languages": ("zh",), "min_chars": 200, "chinese": chinese, "repetition": True},
                "dedupe": {"exact": "whole", "near": "whole", "similarity": 0.8},
            },
            "heldout": 0.001,
            "policy": "skip",
            "missing": "error",
            "max_turn_chars": 1_000_000,
            "tokenizer": {"train": False},
        }
    )
