"""Yuan 2.0 51B: configs/yuan2b.py at this size.

    python -m easylm_plus.train --config=configs/yuan51b.py

Hardware: a pod; 42 layers: 51.8B parameters, 0.8 TB of float32 weights, gradients and Adam state. By the estimate that
is printed at the start, about 11 GiB on each of 512 devices (fsdp 64 x tensor 8; published: 16 pipeline stages). Speed:
not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in yuan2b."""
    recipe = Path(__file__).with_name("yuan2b.py")
    return load_config_file(f"{recipe}:size=51b,tensor=8,{arg}")
