"""Chats of every format that there is a source for, through every stage: Koala's sources and what is like them, in all
their languages. A start for one's own mixture, where koala.py is what Koala did.

    python -m data_pipelines.prepare --config=configs/data/chat.py:eval=EVAL --input=RAW --output=data/chat

RAW has one folder a source, as for koala.py, and `preference` with pairs of answers; what is not there is left out.
EVAL has the files of benchmarks (`BENCHMARKS`), of which nothing may be in the data; without eval=… the stage that
looks for them is left out. Near duplicates are looked for across all sources; the first of KEEP keeps its own.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import InputError
from data_pipelines.stages.filter import ORIGINS

# What people wrote is kept before what models wrote, and what was chosen by hand before what was collected.
KEEP = ("oasst", "sharegpt", "preference", "hh_rlhf", "hc3", "alpaca", "oig")
BENCHMARKS = {
    "gsm8k": "gsm8k/test.*",
    "humaneval": "humaneval/*.jsonl*",
    "koala_test_set": "koala_test_set/*.jsonl*",
    "math": {"files": ["math500/*.json*"]},
    "mbpp": "mbpp/*.jsonl*",
    "mmlu": {"files": ["mmlu/*.zip"], "members": "*test/*.csv"},
    "mt_bench": "mt_bench/question.jsonl*",
    "self_instruct": "self_instruct/user_oriented_instructions.jsonl*",
    "truthfulqa": "truthfulqa/*.csv*",
    "vicuna_bench": "vicuna_bench/*.jsonl*",
}
# A page's leftovers and errors are those of the pages that chats were copied from.
CHAT_PAGE = {"normalise": {"page_leftovers": True}, "filter": {"origins": ORIGINS, "page_errors": True}}
SOURCES = {
    "sharegpt": {
        "patterns": ("sharegpt/*.json*", "!sharegpt/identity*", "!sharegpt/oasst_*"),
        "stages": {**CHAT_PAGE, "dedupe": {"exact": "query"}},
    },
    "identity": {"kind": "alpaca", "patterns": ("sharegpt/identity*",), "stages": {"dedupe": {"near": ""}}},
    "oasst": {"patterns": ("sharegpt/oasst_*_tree.jsonl*", "oasst/*.jsonl*")},
    "oasst_zh": {"kind": "alpaca", "patterns": ("sharegpt/oasst_sft_*.json*",)},
    "oasst_pairs": {"kind": "preference", "patterns": ("sharegpt/oasst_rm_*.json*",)},
    "hc3": {
        "patterns": ("hc3/*.jsonl*", "hc3/*.csv*", "!hc3/hc3plus_*"),
        "stages": {"normalise": {"detokenise": True, "escaped_newlines": True}},
    },
    "hc3plus": {"kind": "jsonl", "patterns": ("hc3/hc3plus_*.jsonl*",)},  # answers without questions: documents
    "oig": {"stages": {"dedupe": {"near": ""}}},  # problems of a few templates, which numbers alone tell apart
    "alpaca": {"patterns": ("alpaca/*.json*",)},
    "hh_rlhf": {},
    "webgpt": {},
    "summarize": {},
    "preference": {"patterns": ("preference/*.json*", "!preference/v1_sft*")},
    "weighted": {"kind": "sharegpt", "patterns": ("preference/v1_sft*.json*",)},
    "koala_format": {"kind": "easylm", "patterns": ("koala_format*.jsonl*",)},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "" or "eval=FOLDER"."""
    key, _, folder = arg.partition("=")
    if arg and (key != "eval" or not folder):
        raise InputError(f"chat.py: found {arg!r}; expected eval=FOLDER")
    stages = {
        "tools": {"calls": "keep", "unused": "keep"},
        "normalise": {},
        "filter": {"languages": ("any",), "identity": "flag", "refusals": "flag", "repeated_digits": True},
        "dedupe": {"exact": "whole", "near": "whole"},
        "redact": {},
    }
    if folder:
        stages["decontaminate"] = {"folder": folder, "benchmarks": BENCHMARKS}
    return ConfigDict(
        {
            "sources": SOURCES,
            "keep": KEEP,
            "stages": stages,
            "heldout": 0.02,
            "policy": "skip",
            "missing": "skip",
            "max_turn_chars": 200_000,
            "tokenizer": {"train": False},
        }
    )
