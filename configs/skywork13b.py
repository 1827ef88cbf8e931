"""Skywork 13B from random weights on plain text, in its three sessions (Wei et al. 2023, arXiv:2310.19341).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/text
    python -m easylm_plus.train --config=configs/skywork13b.py
    python -m easylm_plus.train --config=configs/skywork13b.py:session=2
    python -m easylm_plus.train --config=configs/skywork13b.py:session=3

Hardware: the original took 39 days on 512 A800-80GB, at 1,873 tokens a second on each. By the estimate that is printed
at the start, about 46 GiB on each of 512 devices. Speed: not measured here.

Published (table 3 and section 3.6): session 1, 2T tokens of SkyPile-Main, cosine from 6e-4 to 6e-5; session 2, another
1T of other proportions, constant 6e-5; session 3 ("stage 2"), 130B tokens of which 10 to 40 %, rising, are
SkyPile-STEM, constant 6e-5; in all AdamW 0.9/0.95, weight decay 0.1, clipping at 1.0, bfloat16, length 4096, 16M tokens
a step. Never published: warm-up, and what is in SkyPile-STEM. Ours: 2,000 warm-up steps in session 1 and none after it,
Adam's moments start anew with each session, and 20 % of SkyPile-STEM throughout, its mean, counted in documents
(`data.sources`).
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg
from easylm_plus.errors import UserError

# tokens, prepared data, its sources
SESSIONS = {
    1: (2_000_000_000_000, "data/skypile", ()),
    2: (1_000_000_000_000, "data/skypile_2", ()),
    3: (130_000_000_000, "data/skypile_stem", ("jsonl=4", "text=1")),
}
TOKENIZER = "Skywork's tokenizer.model (65,519 pieces): https://huggingface.co/Skywork/Skywork-13B-base"
DATA = """150B tokens of SkyPile: https://huggingface.co/datasets/Skywork/SkyPile-150B; the other 3T, and SkyPile-STEM,
      were never published. Session 3 takes the main part as JSON lines and STEM as text. Then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output={path}"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: session (1 | 2 | 3), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, session=1, fsdp=-1, tensor=1)
    if args.session not in SESSIONS:
        raise UserError(f"config argument session={args.session}: expected 1, 2 or 3")
    tokens, path, sources = SESSIONS[args.session]
    config = base("skywork-13b", remat="dots")
    if args.session > 1:
        config.init_from.path = f"runs/skywork13b_{args.session - 1}"
        config.init_from.origin = f"the run of --config=configs/skywork13b.py:session={args.session - 1}"
    config.data.path = path
    config.data.origin = DATA.format(path=path)
    config.data.sources = sources
    config.data.template = "text"
    config.data.length = 4096
    config.data.batch_size = 4096
    config.data.tokenizer = "weights/skywork-13b/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.train.tokens = tokens
    config.train.accumulate = 4
    config.optimizer.learning_rate = 6e-4 if args.session == 1 else 6e-5
    config.optimizer.end_learning_rate = 6e-5
    config.optimizer.schedule = "cosine" if args.session == 1 else "constant"
    config.optimizer.warmup_steps = 2000 if args.session == 1 else 0
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/skywork13b_{args.session}"
    return config
