"""Yuan 2.0 102B: configs/yuan2b.py at this size.

    python -m easylm_plus.train --config=configs/yuan102b.py

Hardware: a pod; 84 layers: 102.6B parameters, 1.6 TB of float32 weights, gradients and Adam state. Not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in yuan2b."""
    return load_config_file(f"{Path(__file__).with_name('yuan2b.py')}:" + ",".join(filter(None, ("size=102b", arg))))
