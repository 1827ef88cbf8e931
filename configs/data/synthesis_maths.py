"""Worked answers with the right result, written by a language model (Yuan 2.0's maths data).

    python -m data_pipelines.synthesize --config=configs/data/synthesis_maths.py \\
        --endpoint http://127.0.0.1:8000/v1 --model NAME --output RAW/synthesis_maths

Arithmetic alone, whose results are computed exactly. With synthesis_maths.py:seeds --config.seeds=FILE every second
prompt is a problem of a file with "question" and "answer" in its rows; synthesis_maths.py:variations has new ones made
of these, too, whose results are only agreed on by several answers. Nothing is executed.

The rows are the source `jsonl`: patterns ("synthesis_maths/rows.jsonl",) under --input=RAW.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import InputError

SHARES = {
    "": {"arithmetic": 1},
    "seeds": {"seed": 1, "arithmetic": 1},
    "variations": {"seed": 1, "variation": 1, "arithmetic": 1},
}


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "", "seeds" or "variations": the kinds of problems, in turns."""
    if arg not in SHARES:
        raise InputError(f"synthesis_maths.py: found {arg!r}; expected seeds or variations")
    return ConfigDict(
        {
            "route": "maths",
            "count": 1000,
            "seed": 0,
            "seeds": "",
            "shares": {"seed": 0, "variation": 0, "arithmetic": 0, **SHARES[arg]},
            "answers": 5,  # to a problem whose result nobody knows
            "agree": 3,
            "request": {"max_tokens": 1024, "temperature": 0.7, "extra": {}},
            "endpoint": {
                "concurrency": 8,
                "timeout_s": 120.0,
                "retries": 5,
                "backoff_s": 1.0,
                "key_variable": "SYNTHESIS_API_KEY",
            },
        }
    )
