"""Llama 3 8B from random weights on plain text (Grattafiori et al. 2024, arXiv:2407.21783).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/llama3_8b.py

Hardware: H100-80GB. By the estimate that is printed at the start, about 54 GiB on each of 256 devices. Speed: not
measured here.

Published: the peak learning rate of 3e-4 (table 3), a length of 8192, that documents of a row do not see each other
(section 3.2), over 15T tokens (model card), and for 405B alone (section 3.4.1): 8,000 warm-up steps, a cosine to 1 % of
the peak, batches of 4M, 8M and 16M tokens; 8B has "similar recipes". Never published for 8B: all but the peak. Ours:
405B's warm-up and end, 8M tokens a step from first to last, 15T tokens, AdamW 0.9/0.95, clipping at 1.0, and the weight
decay of the paper's scaling-law runs, 0.1. Long context (section 3.4.2) and annealing (3.4.3) are left out.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

TOKENIZER = """Llama 3's tokenizer.json (128,256 tokens), after accepting Meta's licence:
      https://huggingface.co/meta-llama/Meta-Llama-3-8B"""
DATA = """Meta's 15T tokens were never published; documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, fsdp=-1, tensor=1)
    config = base("llama3-8b", remat="dots")
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 8192
    config.data.batch_size = 1024
    config.data.tokenizer = "weights/llama3-8b/tokenizer.json"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = 15_000_000_000_000
    config.train.accumulate = 2
    config.optimizer.learning_rate = 3e-4
    config.optimizer.end_learning_rate = 3e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 8000
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = "runs/llama3_8b"
    return config
