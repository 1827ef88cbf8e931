"""Code Llama 7B, which fills in the middle: configs/codellama34b.py at this size.

    python -m easylm_plus.train --config=configs/codellama7b.py
    python -m easylm_plus.train --config=configs/codellama7b.py:stage=long

Hardware: A100-80GB. By the estimate that is printed at the start, about 17 GiB on each of 32 devices; for the long rows
about 11 GiB on each of 32 devices (stage=long). Speed: not measured here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in codellama34b."""
    recipe = Path(__file__).with_name("codellama34b.py")
    return load_config_file(f"{recipe}:size=7b,tensor=1,{arg}")
