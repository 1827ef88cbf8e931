"""Koala 7B: configs/koala13b.py at the smaller size.

    python -m easylm_plus.train --config=configs/koala7b.py

Hardware: about 56 GiB on each of 4 devices, 29 on each of 8, by the estimate that is printed at the start. Not measured
here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in koala13b."""
    recipe = Path(__file__).with_name("koala13b.py")
    return load_config_file(f"{recipe}:size=7b,{arg}")
