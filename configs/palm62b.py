"""PaLM 62B: configs/palm8b.py at this size.

    python -m easylm_plus.train --config=configs/palm62b.py

Hardware: TPU v4. By the estimate that is printed at the start, about 13 GiB on each of 512 devices (fsdp 64 x tensor
8). Speed: not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in palm8b."""
    recipe = Path(__file__).with_name("palm8b.py")
    return load_config_file(f"{recipe}:size=62b,tensor=8,{arg}")
