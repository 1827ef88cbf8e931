"""LLaMA 7B from random weights on plain text (Touvron et al. 2023, arXiv:2302.13971).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/llama7b.py

Hardware: a pod; 1 T tokens of 7B are about 4.3e22 FLOPs. By the estimate that is printed at the start, about 49 GiB on
each of 256 devices. Speed: not measured here.

Published (section 2.3 and table 2): 3.0e-4 with a cosine to 10 %, 2,000 warm-up steps, AdamW 0.9/0.95, weight decay
0.1, clipping at 1.0, 4M tokens a step, 1T tokens, length 2048. Decay of norms is not mentioned; ours do not decay.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, fsdp=-1, tensor=1)
    config = base("llama-7b", remat="dots")
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.template = "text"
    config.data.length = 2048
    config.data.batch_size = 2048
    config.data.tokenizer = "weights/llama-7b/tokenizer.model"
    config.data.tokenizer_origin = "LLaMA's tokenizer.model (32,000 pieces): https://huggingface.co/huggyllama/llama-7b"
    config.train.tokens = 1_000_000_000_000
    config.optimizer.learning_rate = 3e-4
    config.optimizer.end_learning_rate = 3e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 0.1
    config.checkpoint.keep_best = "eval/loss"
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = "runs/llama7b"
    return config
