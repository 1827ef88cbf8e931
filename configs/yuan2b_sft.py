"""Yuan 2.0 2B fine-tuned on questions and answers (Wu et al. 2023, arXiv:2311.15786).

    python -m data_pipelines.prepare --config=configs/data/yuan.py --input=RAW --output=data/yuan
    python -m easylm_plus.train --config=configs/yuan2b_sft.py

Hardware: by the estimate that is printed at the start, about 19 GiB on each of 8 devices. Speed: not measured here.

Published (table 7): 8e-5, length 4096, 1152 rows a step, weight decay 0.01, 4 epochs, and the format
`question<sep>answer<eod>` of which <sep>, answer and <eod> are learned. Dropout of 0.1 is left out. Never published:
the data, and the weights before fine-tuning. Ours: a cosine to a tenth after 3 % of warm-up.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

WEIGHTS = """a run of configs/yuan2b.py; Yuan's own were never released before fine-tuning, but those after it can be
      named here too: https://huggingface.co/IEITYuan/Yuan2-2B-Februa-hf"""
TOKENIZER = "Yuan 2.0's tokenizer.model: https://github.com/IEIT-Yuan/Yuan-2.0, folder tokenizer"
DATA = """Yuan's were never published; lines "question<sep>answer" of your own in data/raw_yuan/yuan/*.txt, then:
      python -m data_pipelines.prepare --config=configs/data/yuan.py --input=data/raw_yuan --output=data/yuan"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, fsdp=-1, tensor=1)
    config = base("yuan-2b", remat="full")
    config.init_from.path = "runs/yuan2b"
    config.init_from.origin = WEIGHTS
    config.data.path = "data/yuan"
    config.data.prepare = "configs/data/yuan.py"
    config.data.prepare_input = "data/raw_yuan"
    config.data.origin = DATA
    config.data.template = "yuan"
    config.data.length = 4096
    config.data.batch_size = 1152
    config.data.tokenizer = "weights/yuan2/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.epochs = 4.0
    config.train.accumulate = 9
    config.optimizer.learning_rate = 8e-5
    config.optimizer.end_learning_rate = 8e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_share = 0.03
    config.optimizer.weight_decay = 0.01
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = "runs/yuan2b_sft"
    return config
