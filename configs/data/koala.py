"""The data of Koala, from its seven public sources.

    python -m data_pipelines.prepare --config=configs/data/koala.py --input DIR --output DIR

DIR has one folder a source (sharegpt, hc3, oig, alpaca, hh_rlhf, webgpt, summarize or summarize_from_feedback) with
the files as they are published; data_pipelines/sources/<source>.py says where to get them and under which licence.
Any of them may be left out with --config.missing=skip. It takes about a minute per 100 MB of packed files on one
core, and writes about as much.

Koala mixed its sources in proportion to their examples (weight 0) and trained for two epochs. The sizes below are
those of Koala's announcement (bair.berkeley.edu/blog/2023/04/03/koala). Koala-Distill is ShareGPT and HC3 alone;
Koala-All is all of them.

The stages are those that Koala is known to have used: for ShareGPT dropping chats that name their origin, "Copy code",
English alone and one chat a query (announcement, and koala_data_pipeline of young-geng), for the others none. What we
add: all text is normalised (HC3 was learned with the spaces of its tokenizer in it), chats end before an error of the
page (Vicuna), and tools have no place in Koala's prompt format. What Koala did in reading its sources is said in
data_pipelines/sources.
"""

from typing import Any

from ml_collections import ConfigDict

from data_pipelines.errors import InputError
from data_pipelines.stages.filter import ORIGINS


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "" or "all" for Koala-All, "distill" for Koala-Distill."""
    sources: dict[str, dict[str, Any]] = {
        # 30,000 of about 60,000 conversations, after removing repeated queries and other languages than English
        "sharegpt": {
            # identity and oasst_* have other formats; tool calls have no place in Koala's prompt format
            "patterns": ("sharegpt/*.json*", "!sharegpt/identity*", "!sharegpt/oasst_*", "!sharegpt/*toolcall*"),
            "stages": {
                "tools": {},
                "normalise": {"page_leftovers": True},
                "filter": {"origins": ORIGINS, "languages": ("en",), "page_errors": True},
                "dedupe": {"exact": "query", "near": ""},
            },
        },
        # 60,000 answers of people and 27,000 of ChatGPT, to 24,000 questions
        "hc3": {
            "patterns": ("hc3/*.jsonl*", "hc3/*.csv*", "!hc3/hc3plus_*", "!hc3/upstream_*"),  # no questions; repeats
            "stages": {"normalise": {"detokenise": True, "escaped_newlines": True}},
        },
        # 30,000: unified_basic, grade_school_math_instructions, plot_screenplay_books_dialog, poetry_2_song
        "oig": {},
        # 52,002 instructions
        "alpaca": {"patterns": ("alpaca/*.json*", "!alpaca/seed_tasks*")},
        # 160,000 pairs
        "hh_rlhf": {},
        # 20,000 comparisons
        "webgpt": {},
        # 93,000 comparisons
        "summarize": {},
    }
    if arg not in ("", "all", "distill"):
        raise InputError(f"koala.py: found {arg!r}; expected all or distill")
    chosen = ("sharegpt", "hc3") if arg == "distill" else tuple(sources)
    return ConfigDict(
        {
            "sources": {name: {"kind": name, "weight": 0, "limit": 0, **sources[name]} for name in chosen},
            "stages": {"normalise": {}},
            "heldout": 0.05,
            "policy": "skip",
            "missing": "error",
            "max_turn_chars": 200_000,
            "tokenizer": {"train": False, "vocab_size": 32_000, "special_tokens": ()},
        }
    )
