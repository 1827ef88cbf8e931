"""The smallest run that uses every part: a minute on a laptop CPU, for stepping through the code.

    python -m easylm_plus.train --config=configs/debug.py

Expected: the loss falls from 7.6 to under 6; the answers are nonsense.
"""

from ml_collections import ConfigDict

from easylm_plus.config import base, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: steps."""
    args = parse_arg(arg, steps=60)
    config = base("debug", vocab_size=1024, init="fan_in", attention="xla")
    config.data.path = "data/embedded"
    config.data.prepare = "configs/data/embedded.py"
    config.data.template = "chat"
    config.data.length = 128
    config.data.batch_size = 8
    config.data.pool = 64
    config.numerics.precision = "float32"
    config.train.steps = args.steps
    config.train.accumulate = 2
    config.train.ema = 0.9
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.1
    config.objective.chunk = 256
    config.checkpoint.every = 20
    config.eval.every = 30
    config.eval.examples = 20
    config.eval.max_new_tokens = 16
    config.log.dir = "runs/debug"
    config.log.every = 5
    return config
