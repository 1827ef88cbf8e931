"""Mixtral 8x7B from random weights on plain text (Jiang et al. 2024, arXiv:2401.04088).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/mixtral.py

Hardware: by the estimate that is printed at the start, about 43 GiB on each of 128 devices (fsdp 32 x expert 4), most
of it for the choices of the tokens that the devices of `expert` bring together. Speed: not measured here.

Published: the architecture (table 1), a context of 32,768 tokens in training, and, in the released config.json, the
balance loss's coefficient of 0.02, which is 0.04 of ours (objectives/lm.py). The recipe was never published: tokens,
learning rate, batch and the rest are Llama 2's (configs/llama2_7b.py), thus ours.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

TOKENIZER = "Mixtral's tokenizer.model (32,000 pieces): https://huggingface.co/mistralai/Mixtral-8x7B-v0.1"
DATA = """Mixtral's data were never published; long documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: fsdp, expert and tensor (mesh axes)."""
    args = parse_arg(arg, fsdp=-1, expert=4, tensor=1)
    config = base("mixtral-8x7b", remat="full")
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 32_768
    config.data.batch_size = 128
    config.data.tokenizer = "weights/mixtral-8x7b/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = 2_000_000_000_000
    config.objective.router_balance = 0.04
    config.optimizer.learning_rate = 3e-4
    config.optimizer.end_learning_rate = 3e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2000
    config.optimizer.eps = 1e-5
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.expert = args.expert
    config.mesh.tensor = args.tensor
    config.log.dir = "runs/mixtral"
    return config
