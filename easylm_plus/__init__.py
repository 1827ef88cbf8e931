"""easylm_plus: train large language models and fine-tune them into chat models, in JAX.

    model, params = easylm_plus.load_hf("Llama-2-7b-hf")
    easylm_plus.save_hf(model, params, "out", tokenizer_from="Llama-2-7b-hf")

Names are imported when they are first used: `import easylm_plus` alone does not load JAX.
"""

import importlib
from typing import Any

_WHERE = {"load_hf": "easylm_plus.interop.huggingface", "save_hf": "easylm_plus.interop.huggingface"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
