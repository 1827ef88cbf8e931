"""Yuan 2.0 102B: configs/yuan2b.py at this size.

    python -m easylm_plus.train --config=configs/yuan102b.py

Hardware: a pod; 84 layers: 102.6B parameters, 1.6 TB of float32 weights, gradients and Adam state. By the estimate that
is printed at the start, about 19 GiB on each of 512 devices (fsdp 64 x tensor 8; published: 32 pipeline stages). Speed:
not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in yuan2b."""
    recipe = Path(__file__).with_name("yuan2b.py")
    return load_config_file(f"{recipe}:size=102b,tensor=8,{arg}")
