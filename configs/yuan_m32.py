"""Yuan 2.0-M32, 32 experts of which 2 are active (Wu et al. 2024, arXiv:2405.17976): configs/yuan2b.py at this size.

    python -m easylm_plus.train --config=configs/yuan_m32.py

Hardware: 39.9B parameters, 3.7B of them active. By the estimate that is printed at the start, about 23 GiB on each of
128 devices (fsdp 16 x expert 8). Speed: not measured here.

Published: 2T tokens and a final loss of 1.22 (the paper); the values of the recipe, with filling in the middle and
without a balance loss, are those of examples/pretrain_yuan2.0_moe_2x32B.sh in IEIT-Yuan/Yuan2.0-M32.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in yuan2b."""
    recipe = Path(__file__).with_name("yuan2b.py")
    return load_config_file(f"{recipe}:size=m32,expert=8,{arg}")
