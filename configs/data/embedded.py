"""Data that needs no download: exact tasks made up on the spot, and the text of the installed Python.

    python -m data_pipelines.prepare --config=configs/data/embedded.py --output DIR

For the quickstart: a model of a million parameters learns it in minutes on two CPU cores, and greedy exact match on
the held-out instances says honestly what it has learned. It takes about 20 seconds and writes about 10 MB.

    --config=configs/data/embedded.py:shuffle_answers=true

is the control: the answers of the training instances are dealt out at random, the held-out ones stay right. A model
trained on it must score near zero; if it does not, the score measures something else than the task.
"""

import difflib

from ml_collections import ConfigDict

from data_pipelines.errors import InputError

# Numbers of conversations in a cycle of the mixture. A task's conversation is about 25 tokens long, one of pydoc 125.
TASKS = {
    "reversal": 2,
    "conversion": 1,
    "sorting": 1,
    "addition": 1,
    "date": 1,
    "counting": 1,
    "maximum": 1,
}
PYDOC = 1
ARGUMENTS = {"shuffle_answers": {"true": True, "false": False}}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "" or "shuffle_answers=true". Raises InputError for anything else."""
    options = parse(arg)
    sources = {
        task: {"kind": "exact", "weight": weight, "tasks": (task,), "train": 3000, "heldout": 200, **options}
        for task, weight in TASKS.items()
    }
    sources["pydoc"] = {"kind": "pydoc", "weight": PYDOC}
    return ConfigDict(
        {
            "sources": sources,
            "heldout": 0.02,  # of pydoc; the tasks hold out their own
            "policy": "error",
            "missing": "error",
            "max_turn_chars": 20_000,
            "tokenizer": {
                "train": True,
                "vocab_size": 1024,
                "special_tokens": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            },
        }
    )


def parse(arg: str) -> dict[str, bool]:
    """ "key=value,key=value" as a dict; an error names the key that comes nearest to one that does not exist."""
    options = {}
    for item in filter(None, arg.split(",")):
        key, _, value = item.partition("=")
        if key not in ARGUMENTS:
            nearest = difflib.get_close_matches(key, ARGUMENTS, n=1, cutoff=0.0)
            raise InputError(f"embedded.py: found the key {key!r}; did you mean {nearest[0]!r}?")
        if value not in ARGUMENTS[key]:
            raise InputError(f"embedded.py: {key}: found {value!r}; expected one of {', '.join(ARGUMENTS[key])}")
        options[key] = ARGUMENTS[key][value]
    return options
