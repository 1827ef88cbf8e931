"""Koala 7B: configs/koala13b.py at the smaller size.

    python -m easylm_plus.train --config=configs/koala7b.py

Hardware: about 57 GiB on each of 4 devices, 29 on each of 8, by the estimate that is printed at the start. Not measured
here.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in koala13b."""
    spec = importlib.util.spec_from_file_location("koala13b", Path(__file__).with_name("koala13b.py"))
    koala13b = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(koala13b)
    return koala13b.get_config(",".join(filter(None, ("size=7b", arg))))
