"""PaLM 540B: configs/palm8b.py at this size.

    python -m easylm_plus.train --config=configs/palm540b.py

Hardware: the original had two TPU v4 pods of 3072 chips, replica 2 x fsdp 256 x tensor 12. 256,000 is no multiple of
12, so that every device of `tensor` would hold the whole table here; the mesh below fits one pod of 4096. By the
estimate that is printed at the start, about 14 GiB on each of 4096 devices (fsdp 256 x tensor 16). Speed: not measured
here.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments as in palm8b."""
    recipe = Path(__file__).with_name("palm8b.py")
    return load_config_file(f"{recipe}:size=540b,tensor=16,{arg}")
