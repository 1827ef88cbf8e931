"""Switch-Base on C4 with masked spans (Fedus, Zoph & Shazeer 2021, arXiv:2101.03961), as a decoder.

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/c4
    python -m easylm_plus.train --config=configs/switch.py
    python -m easylm_plus.train --config=configs/switch.py:experts=8,expert=8

Hardware: the original's comparisons ran on 32 TPU v3 cores, with 16 GB each. By the estimate that is printed at the
start, about 4 GiB on each of 32 devices (fsdp 4 x expert 8). Speed: not measured here.

Published: one expert a token, capacity factor 1.25 (table 1), balance loss 0.01 (section 2.2), the router in float32
(2.4), C4, 15 % of the tokens masked and each run of them behind one sentinel (2.3), 2^20 tokens a step for 550,000
steps, 576B tokens (section 4.1), T5's vocabulary, Adafactor. T5 and Switch have an encoder and a decoder with experts
in every second layer; the model here is a decoder with experts in all (models/families.py): the routing and the
objective are Switch's, the architecture is not. Ours: AdamW at 1e-3 with a cosine to 1e-4 and 10,000 warm-up steps
instead of Adafactor at 1/sqrt(step); the usual start instead of one with a tenth of the variance (2.4); spans of 3
tokens, T5's; rows of 512 tokens with what is read and what is learned, where T5 has 512 and 114.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

TOKENIZER = "T5's tokenizer.json (32,100 tokens with its 100 sentinels): https://huggingface.co/google-t5/t5-base"
DATA = """C4's English files, c4-train.*.json.gz: https://huggingface.co/datasets/allenai/c4, in data/raw_c4/jsonl;
      then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw_c4 --output=data/c4"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: experts (8 | 64), fsdp, expert and tensor (mesh axes)."""
    args = parse_arg(arg, experts=64, fsdp=-1, expert=8, tensor=1)
    config = base(f"switch-base-{args.experts}", vocab_size=32_128, remat="full")
    config.data.path = "data/c4"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw_c4"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.corruption = "spans"
    config.data.corruption_rate = 0.15
    config.data.span_length = 3.0
    config.data.length = 512
    config.data.batch_size = 2048
    config.data.tokenizer = "weights/t5/tokenizer.json"
    config.data.tokenizer_origin = TOKENIZER
    config.train.steps = 550_000
    config.train.accumulate = 4
    config.objective.router_balance = 0.01
    config.optimizer.learning_rate = 1e-3
    config.optimizer.end_learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10_000
    config.optimizer.b2 = 0.99
    config.mesh.fsdp = args.fsdp
    config.mesh.expert = args.expert
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/switch_{args.experts}"
    return config
