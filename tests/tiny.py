"""A run small enough for tests: two made-up sources, a model of a few thousand weights, the door that trains it."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from data_pipelines.prepare import prepare
from data_pipelines.train_tokenizer import CHAT_TOKENS
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[1]
CONFIG = '''
"""A model of eight thousand weights on sums and reversed letters, packed, in two micro-batches."""

from easylm_plus.config import base, parse_arg


def get_config(arg=""):
    args = parse_arg(arg, steps=6)
    config = base("debug", vocab_size=300, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
                  num_kv_heads=2, head_dim=4, max_length=64, init="fan_in", attention="xla")
    config.data.path = {data!r}
    config.data.template = "chat"
    config.data.length = 64
    config.data.batch_size = 8
    config.data.pool = 12
    config.numerics.precision = "float32"
    config.train.steps = args.steps
    config.train.accumulate = 2
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.optimizer.weight_decay = 0.1
    config.objective.chunk = 128
    config.checkpoint.every = 4
    config.eval.every = 0
    config.eval.examples = 4
    config.eval.samples = 0
    config.eval.max_new_tokens = 4
    config.log.dir = {log!r}
    config.log.every = 1
    return config
'''
_FOLDER = tempfile.TemporaryDirectory(prefix="tiny_")


@functools.cache
def data() -> Path:
    """A prepared folder: `sums`, which weighs 2, and `letters`, which weighs 1, with a tokenizer of 300 tokens."""
    source = lambda task, weight: {"kind": "exact", "tasks": (task,), "train": 60, "heldout": 8, "weight": weight}
    tokenizer = {"train": True, "vocab_size": 300, "special_tokens": list(CHAT_TOKENS)}
    sources = {"sums": source("addition", 2), "letters": source("reversal", 1)}
    prepare(ConfigDict({"sources": sources, "tokenizer": tokenizer}), None, Path(_FOLDER.name) / "data")
    return Path(_FOLDER.name) / "data"


def config_text(log: Path, **values: object) -> str:
    """The text of a config file; `values` are keys with "__" for the dot, as in train__ema=0.9."""
    lines = "".join(f"    config.{key.replace('__', '.')} = {value!r}\n" for key, value in values.items())
    text = CONFIG.format(data=str(data()), log=str(log))
    return text.replace("    return config\n", lines + "    return config\n")


def config(log: Path, **values: object) -> ConfigDict:
    """The same as a value."""
    names: dict = {}
    exec(config_text(log, **values), names)
    return names["get_config"]()


def write_config(folder: Path, **values: object) -> Path:
    """The same as a file in `folder`, which becomes the run's log.dir."""
    path = Path(folder) / "tiny_config.py"
    path.write_text(config_text(Path(folder), **values))
    return path


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a process with so many CPU devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "NO_COLOR": "1", "COLUMNS": "200", **more}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return env


def start(*args: object, door: str = "easylm_plus.train", devices: int = 1, **more: str) -> subprocess.Popen:
    """A door as a process; its output, both streams in one, is a pipe."""
    command = [sys.executable, "-m", door, *map(str, args)]
    env = environment(devices, **more)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*args: object, **options: object) -> tuple[int, str]:
    """(exit status, output) of a door."""
    process = start(*args, **options)
    output = process.communicate(timeout=240)[0]
    return process.returncode, output
