"""Koala 13B: LLaMA 13B fine-tuned on conversations (Geng et al., BAIR blog, 2023-04-03).

    python -m easylm_plus.train --config=configs/koala13b.py
    python -m easylm_plus.train --config=configs/koala13b.py:size=7b,fsdp=8

Hardware: the original took 6 hours on one 8 x A100 machine for 2 epochs. 13B with float32 weights, gradients and
Adam takes about 50 GiB on each of 8 devices, by the estimate that is printed at the start. Not measured here.

Published: the weights it starts from, the data (configs/data/koala.py), the prompt format, 2 epochs, a length of
2048 (the serving flags of EasyLM's docs/koala.md). Never published: learning rate, batch size, warm-up and weight
decay. Ours are those of Tulu 2 (arXiv:2311.10702, appendix; trained with a fork of the same framework): 2e-5 to 0
with 3 % warm-up, no weight decay, 128 sequences a step. Its schedule is linear, as is ours. Dropout (0.05) and the
forgetful causal mask that the author's command line names are left out: later recipes have neither.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

WEIGHTS = """Meta's LLaMA {size} weights in Hugging Face form, a folder with config.json and *.safetensors:
      https://huggingface.co/huggyllama/llama-{size}, or Meta's own files converted"""
TOKENIZER = "LLaMA's tokenizer.model (32,000 pieces), in the same folder as its weights"
DATA = """the raw files of ShareGPT, HC3, OIG, Alpaca, HH, WebGPT and summarization comparisons (docs/data.md says
      where each comes from), then:
      python -m data_pipelines.prepare --config=configs/data/koala.py --input=RAW --output={path}"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (7b | 13b), fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, size="13b", fsdp=-1, tensor=1)
    config = base(f"koala-{args.size}", remat="dots")
    config.init_from.path = f"weights/llama-{args.size}"
    config.init_from.origin = WEIGHTS.format(size=args.size)
    config.data.path = "data/koala"
    config.data.origin = DATA.format(path=config.data.path)
    config.data.tokenizer = f"weights/llama-{args.size}/tokenizer.model"
    config.data.tokenizer_origin = TOKENIZER
    config.data.template = "koala"
    config.data.length = 2048
    config.data.batch_size = 128
    config.train.epochs = 2.0
    config.train.accumulate = 8
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_share = 0.03
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = f"runs/koala{args.size}"
    return config
