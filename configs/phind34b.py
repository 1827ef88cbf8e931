"""Phind 34B: Code Llama 34B fine-tuned on programming problems (Phind, model card of Phind-CodeLlama-34B-v1).

    python -m easylm_plus.train --config=configs/phind34b.py

Hardware: the original took 3 hours on 32 A100-80GB with ZeRO 3, which is the axis `fsdp`. By the estimate that is
printed at the start, about 26 GiB on each of 32 devices. Speed: not measured here.

Published: the start (Code Llama 34B, whose context is 16,384), about 80,000 problems with their solutions, 2 epochs,
rows of 4096 tokens, all weights trained (no LoRA), and the prompt format of the second version (TEMPLATE; the first had
none). Never published: the data, learning rate, batch, schedule and weight decay. Ours are those of Llama 2's
supervised fine-tuning (arXiv:2307.09288, section 3.1), 2e-5 by a cosine to 0, 64 rows of 4096 tokens, weight decay 0.1,
with 3 % of warm-up.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}### System Prompt\n{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### User Message\n{{ message.content }}\n\n"
    "{% else %}### Assistant\n{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
WEIGHTS = "Code Llama 34B in Hugging Face form: https://huggingface.co/codellama/CodeLlama-34b-hf"
DATA = """Phind's problems were never published; conversations of your own with the task as the user's turn and the
      solution as the assistant's, prepared as the last section of docs/data.md shows"""


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: fsdp and tensor (mesh axes)."""
    args = parse_arg(arg, fsdp=-1, tensor=1)
    config = base("phind-34b", remat="full")
    config.init_from.path = "weights/codellama-34b"
    config.init_from.origin = WEIGHTS
    config.data.path = "data/problems"
    config.data.origin = DATA
    config.data.template = TEMPLATE
    config.data.length = 4096
    config.data.batch_size = 64
    config.data.tokenizer = "weights/codellama-34b/tokenizer.model"
    config.data.tokenizer_origin = "Code Llama's tokenizer.model, in the same folder as its weights"
    config.train.epochs = 2.0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_share = 0.03
    config.optimizer.weight_decay = 0.1
    config.mesh.fsdp = args.fsdp
    config.mesh.tensor = args.tensor
    config.log.dir = "runs/phind34b"
    return config
