"""BitNet b1.58 3B from random weights on plain text (Ma et al. 2024, arXiv:2402.17764).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/bitnet_3b.py
    python -m easylm_plus.train --config=configs/bitnet_3b.py:size=700m
    python -m easylm_plus.train --config=configs/bitnet_3b.py:size=700m,twin=true     # LLaMA of the same shape

Hardware: by the estimate that is printed at the start, about 32 GiB on each of 64 devices, and
about 14 GiB on each of 64 devices (size=700m). What devices send each other of the weights are codes of two bits. Speed
and loss: not measured here at these sizes.

Published (training tips, table 2 and section 3): the shapes, 2048 tokens a row, 1M tokens a step, 100B tokens of
RedPajama, AdamW 0.9/0.95, 375 steps of warm-up, a line from 1.2e-3 (700M: 1.5e-3) that drops halfway through the run to
one from 8e-4 (700M: 1e-3), weight decay 0.1 before that and 0 after. LLaMA's peaks: 2e-4 (700M: 2.5e-4). All seven
matrices of a block are ternary, as in the paper; that feed-forward weights alone are is a misreading that circulates.
Ours: clipping at 1.0, Adam's eps, and for the twin a straight line to 0.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg
from easylm_plus.errors import UserError
from easylm_plus.numerics.rules import BITNET

PEAKS = {"700m": (1.5e-3, 1e-3, 2.5e-4), "1.3b": (1.2e-3, 8e-4, 2e-4), "3b": (1.2e-3, 8e-4, 2e-4),
         "3.9b": (1.2e-3, 8e-4, 2e-4)}  # of the first stage, of the second, of the twin  # fmt: skip
DATA = """RedPajama (100B tokens of it), or documents of your own as text or JSON lines under data/raw, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw --output=data/text"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (700m | 1.3b | 3b | 3.9b), twin (LLaMA instead), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="3b", twin=False, fsdp=-1, tensor=1)
    if args.size not in PEAKS:
        raise UserError(f"config argument size={args.size}: expected one of {', '.join(PEAKS)}")
    first, second, twin = PEAKS[args.size]
    config = base(f"bitnet-{args.size}", remat="dots", sub_norms=not args.twin)
    config.data.path = "data/text"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.length = 2048
    config.data.batch_size = 512
    config.data.tokenizer = "weights/llama-7b/tokenizer.model"
    config.data.tokenizer_origin = "LLaMA's tokenizer.model (32,000 pieces): https://huggingface.co/huggyllama/llama-7b"
    config.train.tokens = 100_000_000_000
    config.optimizer.learning_rate = twin if args.twin else first
    config.optimizer.stage_learning_rate = second
    config.optimizer.schedule = "linear" if args.twin else "two_stage"
    config.optimizer.warmup_steps = 375
    config.optimizer.weight_decay = 0.1
    config.optimizer.stage_weight_decay = 0.0
    config.numerics.rules = () if args.twin else BITNET
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/{'llama' if args.twin else 'bitnet'}_{args.size}"
    return config
