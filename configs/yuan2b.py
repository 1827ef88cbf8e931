"""Yuan 2.0 2B from random weights on plain text and code (Wu et al. 2023, arXiv:2311.15786).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/yuan2b.py

Hardware: a pod; 300B tokens of 2B are about 4e21 FLOPs. Not measured here.

Published, in the released training scripts (examples/pretrain_yuan2.0_*.sh of IEIT-Yuan/Yuan-2.0): peak and end of the
cosine, warm-up, batch, length and steps of each size (RECIPES below), Adam 0.9/0.95, weight decay 0.1, clipping at
1.0, bfloat16; half of the documents are cut to fill in the middle, half of these in suffix-prefix-middle order;
documents of a row see each other, and the filter looks across (`lfa_reset` is off). Positions restart. Ours is what is
masked: here documents of a row do not see each other. Yuan's pre-training data was never published.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

# learning rate, its end, rows a batch, length, steps, warm-up steps
RECIPES = {
    "2b": (2e-4, 2e-5, 384, 8192, 95_367, 1900),
    "51b": (9e-5, 9e-6, 1152, 4096, 63_578, 1300),
    "102b": (3e-5, 3e-6, 1152, 4096, 63_578, 1300),
}
TOKENIZER = "Yuan 2.0's tokenizer.model: https://github.com/IEIT-Yuan/Yuan-2.0, folder tokenizer"


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (2b | 51b | 102b), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="2b", fsdp=-1, tensor=1)
    peak, end, rows, length, steps, warmup = RECIPES[args.size]
    config = base(f"yuan-{args.size}", remat="full")
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.template = "text"
    config.data.fim_rate = 0.5
    config.data.length = length
    config.data.batch_size = rows
    config.data.tokenizer = "weights/yuan2/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.steps = steps
    config.optimizer.learning_rate = peak
    config.optimizer.end_learning_rate = end
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = warmup
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/yuan{args.size}"
    return config
