"""Koala 13B on one card: the recipe of configs/koala13b.py with adapters on a base in 4 bits (QLoRA, Dettmers et al.
2023, arXiv:2305.14314).

    python -m easylm_plus.train --config=configs/koala13b_qlora.py
    python -m easylm_plus.train --config=configs/koala13b_qlora.py:size=7b

Hardware: one GPU of 24 GB. It takes about 13 GiB on one device, by the estimate that is printed at the start and by the
compiler (benchmarks/qlora_memory_202611.md). Not run here.

Published, of QLoRA: NF4 with double quantisation and computing in bfloat16 (section 3), adapters beside all linear
layers of the blocks (section 4), rank 64 and alpha 16 (appendix B.2), and for 13B a constant learning rate of 2e-4,
gradients clipped to a norm of 0.3, Adam's beta2 0.999, and 16 sequences a step (appendix B, for OASST1). Not taken from
there: dropout of 0.1 on the adapters' inputs, which adapters here do not have, and paged optimizers, since the moments
of adapters take 2 GB. Of Koala: data, prompt format, 2 epochs, a length of 2048. Ours: one sequence at a time, and the
3 % warm-up that koala13b.py has.
"""

from pathlib import Path

from ml_collections import ConfigDict

from easylm_plus.config import parse_arg
from easylm_plus.training.data import load_config_file


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (7b | 13b)."""
    args = parse_arg(arg, size="13b")
    config = load_config_file(f"{Path(__file__).with_name('koala13b.py')}:size={args.size},fsdp=1")
    config.model.remat = "full"
    config.numerics.rules = ("layers=nf4_double",)
    config.numerics.lora = ("layers=64",)
    config.numerics.lora_alpha = 16.0
    config.data.batch_size = 16
    config.train.accumulate = 16
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule, config.optimizer.end_learning_rate = "constant", 2e-4
    config.optimizer.warmup_share = 0.03
    config.optimizer.b2 = 0.999
    config.optimizer.clip_norm = 0.3
    config.log.dir = f"runs/koala{args.size}_qlora"
    return config
