"""Yuan 2.0 102B: configs/yuan2b.py at this size.

    python -m easylm_plus.train --config=configs/yuan102b.py

Hardware: a pod; 84 layers: 102.6B parameters, 1.6 TB of float32 weights, gradients and Adam state. Not measured here.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in yuan2b."""
    spec = importlib.util.spec_from_file_location("yuan2b", Path(__file__).with_name("yuan2b.py"))
    yuan2b = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(yuan2b)
    return yuan2b.get_config(",".join(filter(None, ("size=102b", arg))))
