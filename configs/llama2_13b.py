"""Llama 2 13B: configs/llama2_7b.py at this size.

    python -m easylm_plus.train --config=configs/llama2_13b.py

Hardware: the original took 368,640 hours of A100-80GB. By the estimate that is printed at the start, about 40 GiB on
each of 128 devices. Speed: not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in llama2_7b."""
    recipe = Path(__file__).with_name("llama2_7b.py")
    return load_config_file(f"{recipe}:size=13b,{arg}")
