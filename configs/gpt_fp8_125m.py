"""GPT 125M of FP8-LM, from random weights on plain text (Peng et al. 2023, arXiv:2310.18313).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/gpt_fp8_125m.py

Hardware: H100-80GB. By the estimate that is printed at the start, about 15 GiB on each of 8 devices. Speed: not
measured here.

As it is this is the paper's BF16 baseline, with float32 masters; `:level=O3` is FP8-LM (docs/precision.md).

Published: sizes, tokens (100B; 175B 40B), peak (6e-4, 3e-4, 3e-4, 3e-5), batch (1M, 4M, 4M, 1M tokens) and the length
of 2048 (table 1); AdamW 0.9/0.95, weight decay 0.1, clipping at 1.0 and a cosine to 10 % (the released example of
6.7B). Ours: 1,000 warm-up steps, the vocabulary (100,352; the paper never says it), the data (theirs is a mix that was
not released), and 175B without pipeline stages.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

# learning rate, rows a batch, tokens, micro-batches, remat
RECIPES = {
    "125m": (6e-4, 512, 100_000_000_000, 2, "dots"),
    "7b": (3e-4, 2048, 100_000_000_000, 32, "dots"),
    "13b": (3e-4, 2048, 100_000_000_000, 64, "dots"),
    "175b": (3e-5, 512, 40_000_000_000, 8, "full"),
}
TOKENIZER = """the paper never names its tokenizer; cl100k (100,277 tokens) as a tokenizer.json:
      https://huggingface.co/Xenova/gpt-4"""
DATA = """FP8-LM's mix (CommonCrawl, The Pile, C4, OpenWebText and more) was never released; documents of your own as
      text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (125m | 7b | 13b | 175b), level (none | O1 | O2 | O3), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="125m", level="none", fsdp=-1, tensor=1)
    config = base(f"gpt-fp8-{args.size}")
    peak, rows, tokens, parts, config.model.remat = RECIPES[args.size]
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 2048
    config.data.batch_size = rows
    config.data.tokenizer = "weights/cl100k/tokenizer.json"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = tokens
    config.train.accumulate = parts
    config.optimizer.learning_rate = peak
    config.optimizer.end_learning_rate = 0.1 * peak
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1000
    config.optimizer.weight_decay = 0.1
    config.numerics.fp8_level = args.level
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/gpt_fp8_{args.size}"
    return config
