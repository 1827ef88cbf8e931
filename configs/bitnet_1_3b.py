"""BitNet b1.58 1.3B: configs/bitnet_3b.py at this size.

    python -m easylm_plus.train --config=configs/bitnet_1_3b.py

Hardware: by the estimate that is printed at the start, about 19 GiB on each of 64 devices. Speed: not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in bitnet_3b."""
    recipe = Path(__file__).with_name("bitnet_3b.py")
    return load_config_file(f"{recipe}:size=1.3b,{arg}")
