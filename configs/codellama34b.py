"""Code Llama 34B: Llama 2 trained on code, then on long rows (Rozière et al. 2023, arXiv:2308.12950).

    python -m data_pipelines.prepare --config=configs/data/text.py --input=RAW --output=data/code
    python -m easylm_plus.train --config=configs/codellama34b.py
    python -m easylm_plus.train --config=configs/codellama34b.py:stage=long

Hardware: A100-80GB. By the estimate that is printed at the start, about 29 GiB on each of 256 devices (fsdp 32 x tensor
8); for the long rows about 16 GiB on each of 256 devices (stage=long). Speed: not measured here.

Published (sections 2.3, 2.4 and 2.6). Code: 500B tokens, 4M a step in rows of 4096, AdamW 0.9/0.95, Llama 2's own peak
(3e-4; of 34B 1.5e-4), a cosine to 1/30 of it, 1,000 warm-up steps. Long: 2e-5, rows of 16,384 with RoPE's base at 1e6
instead of 1e4, 1M tokens a step for 11,000 steps (7B: 2M for 3,000). 7B fills in the middle in 90 % of the documents,
half of them in suffix-prefix-middle order; 34B does not. Never published: the data, the weights of Llama 2 34B, weight
decay and clipping (ours are Llama 2's, 0.1 and 1.0), and the schedule of the long stage (ours is that of the first).
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg
from easylm_plus.errors import UserError

# of the code stage: peak; of the long one: rows a batch, steps; of both: share of documents to fill in
RECIPES = {"7b": (3e-4, 128, 3000, 0.9), "34b": (1.5e-4, 64, 11_000, 0.0)}
LLAMA2 = {
    "7b": """Llama 2 7B in Hugging Face form, both tables grown by 16 rows for the tokens that fill in (transformers'
      resize_token_embeddings(32016)): https://huggingface.co/meta-llama/Llama-2-7b-hf""",
    "34b": "Llama 2 34B was never released; a model of the same shape in Hugging Face form",
}
TOKENIZER = "Code Llama's tokenizer.model: https://huggingface.co/codellama/CodeLlama-{size}-hf"
DATA = """Meta's 500B tokens were never published; code of your own (85 %, with 15 % of text on code and other text) as
      text or JSON lines under data/raw_code, then:
      python -m data_pipelines.prepare --config=configs/data/text.py --input=data/raw_code --output=data/code"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (7b | 34b), stage (code | long), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="34b", stage="code", fsdp=-1, tensor=8)
    if args.stage not in ("code", "long"):
        raise UserError(f"config argument stage={args.stage}: expected code or long")
    long = args.stage == "long"
    positions = {} if long else {"rope_theta": 1e4, "max_length": 4096}
    config = base(f"codellama-{args.size}", remat="full", **positions)
    peak, rows, steps, fim_rate = RECIPES[args.size]
    config.init_from.path = f"runs/codellama{args.size}_code" if long else f"weights/llama2-{args.size}"
    config.init_from.origin = "the run of the same config with stage=code" if long else LLAMA2[args.size]
    config.data.path = "data/code"
    config.data.prepare = "configs/data/text.py"
    config.data.prepare_input = "data/raw_code"
    config.data.origin = DATA
    config.data.template = "text"
    config.data.fim_rate = fim_rate
    config.data.fim_spm_rate = 0.5
    config.data.length = 16_384 if long else 4096
    config.data.batch_size = rows if long else 1024
    config.data.tokenizer = f"weights/codellama-{args.size}/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER.format(size=args.size)
    if long:
        config.train.steps = steps
        config.train.accumulate = rows // 32
    else:
        config.train.tokens = 500_000_000_000
        config.train.accumulate = 4
    config.optimizer.learning_rate = 2e-5 if long else peak
    config.optimizer.end_learning_rate = config.optimizer.learning_rate / 30
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 1000
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/codellama{args.size}_{args.stage}"
    return config
