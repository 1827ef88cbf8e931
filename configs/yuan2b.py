"""Yuan 2.0 2B from random weights on plain text and code (Wu et al. 2023, arXiv:2311.15786).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/yuan2b.py

Hardware: a pod; 300B tokens of 2B are about 4e21 FLOPs. By the estimate that is printed at the start, about 7 GiB on
each of 64 devices. Speed: not measured here. `fsdp` has to be a power of two: no other number divides the weights.

Published, in the released training scripts (examples/pretrain_yuan2.0_*.sh of IEIT-Yuan/Yuan-2.0): peak and end of the
cosine, warm-up, batch, length and steps of each size (RECIPES below), Adam 0.9/0.95, weight decay 0.1, clipping at 1.0,
bfloat16; half of the documents are cut to fill in the middle, half of these in suffix-prefix-middle order; documents of
a row see each other, and the filter looks across (`lfa_reset` is off). Positions restart. Ours is what is masked: here
documents of a row do not see each other. Yuan's pre-training data was never published.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

# learning rate, its end, rows a batch, length, steps, warm-up steps; ours: micro-batches
RECIPES = {
    "2b": (2e-4, 2e-5, 384, 8192, 95_367, 1900, 3),
    "51b": (9e-5, 9e-6, 1152, 4096, 63_578, 1300, 9),
    "102b": (3e-5, 3e-6, 1152, 4096, 63_578, 1300, 9),
    "m32": (1e-4, 1e-5, 1536, 4096, 318_000, 6400, 4),
}
TOKENIZER = "Yuan 2.0's tokenizer.model: https://github.com/IEIT-Yuan/Yuan-2.0, folder tokenizer"
DATA = """Yuan's were never published; documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (2b | 51b | 102b | m32), fsdp, expert and tensor (mesh axes)."""
    args = parse_arg(arg, size="2b", fsdp=-1, expert=1, tensor=1)
    config = base(f"yuan-{args.size}", remat="full")
    peak, end, rows, length, steps, warmup, parts = RECIPES[args.size]
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.fim_rate = 0.5
    config.data.fim_spm_rate = 0.5
    config.data.length = length
    config.data.batch_size = rows
    config.data.tokenizer = "weights/yuan2/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.steps = steps
    config.train.accumulate = parts
    config.optimizer.learning_rate = peak
    config.optimizer.end_learning_rate = end
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = warmup
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.expert = args.expert
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/yuan{args.size}"
    return config
