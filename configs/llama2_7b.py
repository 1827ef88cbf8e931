"""Llama 2 7B from random weights on plain text (Touvron et al. 2023, arXiv:2307.09288).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/llama2_7b.py
    python -m easylm_plus.train --config=configs/llama2_7b.py:size=70b,fsdp=64,tensor=8

Hardware: the original took 184,320 hours of A100-80GB. By the estimate that is printed at the start, about 51 GiB on
each of 64 devices. Speed: not measured here.

Published (section 2.2 and table 1), for all sizes: AdamW 0.9/0.95 with eps 1e-5, a cosine to 10 % of the peak (3e-4; of
70B 1.5e-4), 2,000 warm-up steps, weight decay 0.1, clipping at 1.0, 4M tokens a step, 2T tokens, length 4096. What
decays and the data were never published: our norms do not decay, and 4M are 1024 rows, 4,194,304 tokens.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

PEAKS = {"7b": 3e-4, "13b": 3e-4, "70b": 1.5e-4}
TOKENIZER = """Llama 2's tokenizer.model (32,000 pieces), after accepting Meta's licence:
      https://huggingface.co/meta-llama/Llama-2-7b-hf"""
DATA = """Meta's 2T tokens were never published; documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (7b | 13b | 70b), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="7b", fsdp=-1, tensor=1)
    config = base(f"llama2-{args.size}", remat="full" if args.size == "70b" else "dots")
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 4096
    config.data.batch_size = 1024
    config.data.tokenizer = "weights/llama2/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = 2_000_000_000_000
    config.train.accumulate = 4
    config.optimizer.learning_rate = PEAKS[args.size]
    config.optimizer.end_learning_rate = 0.1 * PEAKS[args.size]
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 2000
    config.optimizer.eps = 1e-5
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/llama2_{args.size}"
    return config
