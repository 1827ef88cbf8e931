"""PaLM 8B from random weights on plain text (Chowdhery et al. 2022, arXiv:2204.02311).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/palm8b.py

Hardware: TPU v4, with 32 GB a chip. By the estimate that is printed at the start, about 19 GiB on each of 64 devices.
Speed: not measured here.

Published (section 5, and table 1 for the batches): Adafactor without factorization, which is Adam whose step is scaled
by the root mean square of the weight; 1e-2 for 10,000 steps, then 1/sqrt(step); b1 0.9, b2 1 - step^-0.8; weight decay
of the square of the learning rate; clipping at 1.0; z-loss 1e-4; length 2048; no dropout; batches that grow (540B: 512
rows, 1024 from step 50,000, 2048 from step 115,000 to 255,000; 62B 512 to 1024; 8B 256 to 512); one epoch of 780B
tokens (62B: 795B).

Ours, since the optimizer here is AdamW, which scales no step by its weight: the peak is 1e-2 times the root mean square
that the matrices start with (1/sqrt(hidden_size)), and a cosine takes it down to a fifth, where 1/sqrt(step) is after
255,000 steps; the embedding, which starts at 1, would take 64 to 136 times as much in PaLM. b2 0.99, decay 0.1, 10,000
warm-up steps and the last batch from the start are ours too. Documents of a row do not see each other; in PaLM's rows
they do.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

# rows a batch, tokens, micro-batches
RECIPES = {
    "8b": (512, 780_000_000_000, 1),
    "62b": (1024, 795_000_000_000, 4),
    "540b": (2048, 780_000_000_000, 8),
}
TOKENIZER = """PaLM's vocabulary (256,000 sentencepiece pieces) was never released; any that is not larger fits, such as
      Gemma's tokenizer.model: https://huggingface.co/google/gemma-2b"""
DATA = """PaLM's 780B tokens were never published; documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (8b | 62b | 540b), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="8b", fsdp=-1, tensor=1)
    config = base(f"palm-{args.size}", remat="full")
    rows, tokens, parts = RECIPES[args.size]
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 2048
    config.data.batch_size = rows
    config.data.tokenizer = "weights/palm/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = tokens
    config.train.accumulate = parts
    config.objective.z_loss = 1e-4
    config.optimizer.learning_rate = 1e-2 * config.model.hidden_size**-0.5
    config.optimizer.end_learning_rate = 0.2 * config.optimizer.learning_rate
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/palm{args.size}"
    return config
