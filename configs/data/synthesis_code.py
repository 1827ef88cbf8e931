"""Python functions with unit tests that they pass, written by a language model (Yuan 2.0's code data).

    python -m data_pipelines.synthesize --config=configs/data/synthesis_code.py \\
        --endpoint http://127.0.0.1:8000/v1 --model NAME --output RAW/synthesis_code --execute

Two topic words a prompt, as for pre-training; with synthesis_code.py:finetune three to five. --execute runs the code,
in bubblewrap (Linux; apt-get install bubblewrap), and costs about 0.1 s of CPU time an answer; without it nothing is
verified. Yuan 2.0 had 15,000 topic words and kept 4 million samples; --config.topics=FILE has one a line.

The rows are the source `jsonl`: patterns ("synthesis_code/rows.jsonl",) under --input=RAW.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import InputError


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "" or "pretrain", or "finetune"."""
    if arg not in ("", "pretrain", "finetune"):
        raise InputError(f"synthesis_code.py: found {arg!r}; expected pretrain or finetune")
    return ConfigDict(
        {
            "route": "code",
            "count": 1000,
            "seed": 0,
            "topics": "",  # a file; without one, words of the standard library
            "words": (3, 5) if arg == "finetune" else (2, 2),
            "tests": (3, 5),
            "require": "all",  # "any": one test that passes is enough, as in the paper
            "repair_rounds": 1,
            "drop_short": 0.5,  # of the code of fewer than three lines
            "execute": False,
            "sandbox": {"cpu_s": 5.0, "wall_s": 20.0, "memory_mb": 512.0, "tmp_mb": 0.0},
            "request": {"max_tokens": 1024, "temperature": 1.0, "extra": {}},
            "endpoint": {
                "concurrency": 8,
                "timeout_s": 120.0,
                "retries": 5,
                "backoff_s": 1.0,
                "key_variable": "SYNTHESIS_API_KEY",
            },
        }
    )
