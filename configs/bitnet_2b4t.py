"""BitNet b1.58 2B4T from random weights on plain text (Ma et al. 2025, arXiv:2504.12285).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/bitnet_2b4t.py

Hardware: by the estimate that is printed at the start, about 28 GiB on each of 256 devices. Speed: not measured here.

Published (sections 2 and 3, and the released config.json): the shape, LLaMA 3's tokenizer, 4T tokens, rows of 4096; a
cosine from a high peak that drops abruptly about halfway to a cosine of a much lower one; weight decay by a cosine from
0.1 in the first stage, none in the second. The peaks and the batch were never published: ours are those of b1.58 3B and
4M tokens. Its fine-tuning sums the loss over tokens, with a larger rate and more epochs than models in floats take.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg
from easylm_plus.numerics.rules import BITNET

TOKENIZER = """LLaMA 3's tokenizer as microsoft/bitnet-b1.58-2B-4T has it (tokenizer.json and its companions):
      https://huggingface.co/microsoft/bitnet-b1.58-2B-4T"""
DATA = """The 4T tokens were never published; documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, fsdp=-1, tensor=1)
    config = base("bitnet-2b4t", remat="dots")
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 4096
    config.data.batch_size = 1024
    config.data.tokenizer = "weights/bitnet-2b4t"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = 4_000_000_000_000
    config.optimizer.learning_rate = 1.2e-3
    config.optimizer.stage_learning_rate = 8e-4
    config.optimizer.schedule = "two_stage_cosine"
    config.optimizer.warmup_steps = 375
    config.optimizer.weight_decay = 0.1
    config.optimizer.stage_weight_decay = 0.0
    config.numerics.rules = BITNET
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = "runs/bitnet_2b4t"
    return config
