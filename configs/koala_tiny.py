"""A chat model that a laptop CPU trains in four minutes, on data that is on every machine.

    python -m easylm_plus.train --config=configs/koala_tiny.py
    python -m easylm_plus.train --config=configs/koala_tiny.py:size=10m,data=koala \
        --config.data.prepare_input=RAW --config.data.tokenizer=TOKENIZER.model

The first command needs no download: it learns exact tasks (reversing, converting units, sums ...) and questions about
the Python standard library, both generated (configs/data/embedded.py), so that it ends in an honest number, exact
match on instances it never saw. The second is the same run on the real Koala files, in Koala's prompt format.

Hardware: 2 CPU cores. Expected: README.md shows a run. All values are ours, chosen by trying (docs/LOG.md).
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg
from easylm_plus.errors import UserError

SIZES = {
    "1m": {},  # the preset as it is
    "10m": {"hidden_size": 192, "intermediate_size": 512, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6,
            "head_dim": 32, "vocab_size": 32000},
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: size (1m | 10m), data (embedded | koala), steps, shuffle_answers (a control: nothing to learn)."""
    args = parse_arg(arg, size="1m", data="embedded", steps=2000, shuffle_answers=False)
    if args.size not in SIZES:
        raise UserError(f"config argument size={args.size}: expected one of {', '.join(SIZES)}")
    if args.data not in ("embedded", "koala"):
        raise UserError(f"config argument data={args.data}: expected embedded or koala")
    config = base("tiny", init="fan_in", **SIZES[args.size])
    config.numerics.precision = "float32"
    if args.data == "embedded":
        shuffled = args.shuffle_answers
        config.data.path = "data/embedded_shuffled" if shuffled else "data/embedded"
        config.data.prepare = "configs/data/embedded.py" + (":shuffle_answers=true" if shuffled else "")
        config.data.template = "chat"
    else:
        config.data.path = "data/koala"
        config.data.prepare = "configs/data/koala.py"
        config.data.prepare_input = "data/raw"
        config.data.template = "koala"
        config.data.tokenizer = "weights/llama-7b/tokenizer.model"
        config.data.tokenizer_origin = "LLaMA's tokenizer.model: https://huggingface.co/huggyllama/llama-7b"
    config.data.length = 256
    config.data.batch_size = 4
    config.data.pool = 256
    config.train.steps = args.steps
    config.optimizer.learning_rate = 2e-3
    config.optimizer.end_learning_rate = 2e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.checkpoint.every = 500
    config.eval.every = 500
    config.eval.examples = 50
    config.eval.max_new_tokens = 24
    config.log.dir = f"runs/koala_tiny_{args.data}" if args.data != "embedded" else "runs/koala_tiny"
    return config
