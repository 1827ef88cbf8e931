"""GPT 7B of FP8-LM: configs/gpt_fp8_125m.py at this size; `:level=O3` trains it in FP8.

    python -m easylm_plus.train --config=configs/gpt_fp8_7b.py

Hardware: H100-80GB. By the estimate that is printed at the start, about 19 GiB on each of 32 devices (as in the paper).
Speed: not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in gpt_fp8_125m."""
    recipe = Path(__file__).with_name("gpt_fp8_125m.py")
    return load_config_file(f"{recipe}:size=7b,{arg}")
