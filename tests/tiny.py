"""A run small enough for tests: two made-up sources, a model of a few thousand weights, the door that trains it."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from data_pipelines.batches.batch_stats import Item, make_batch
from data_pipelines.batches.packing import Packing, pack
from data_pipelines.prepare import prepare
from data_pipelines.templates.template import Example
from data_pipelines.tokenizers.training import CHAT_TOKENS
from easylm_plus.interop.tables import ARCHITECTURES
from easylm_plus.interop.translate import rules_for, their_names
from easylm_plus.interop.weights import indices, of_params, piece_shapes
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.families import preset
from easylm_plus.models.transformer import Transformer, init_parameters
from easylm_plus.numerics.precision import precision

ROOT = Path(__file__).parents[1]  # where commands run
PATIENCE = 400  # seconds for one process: ten times what the longest takes on two busy cores
CONFIG = '''
"""A model of fourteen thousand weights on sums and reversed letters, packed, in two micro-batches."""

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
    """Of a process with so many CPU devices.

    It depends on nothing outside of the tests: its compiled programs are those of this session (a folder that cannot
    be written, or a file that another run is just writing, would be warned of), and no proxy stands between two
    processes of this machine (gRPC would ask it, and wait).
    """
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"JAX_PLATFORMS": "cpu", "NO_COLOR": "1", "COLUMNS": "200", "EASYLM_PLUS_CACHE": f"{_FOLDER.name}/cache"}
    env["XLA_FLAGS"] = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return env | more


def start(*args: object, door: str = "easylm_plus.train", devices: int = 1, **more: str) -> subprocess.Popen:
    """A door as a process; its output, both streams in one, is a pipe."""
    command = [sys.executable, "-m", door, *map(str, args)]
    env = environment(devices, **more)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*args: object, **options: object) -> tuple[int, str]:
    """(exit status, output) of a door."""
    process = start(*args, **options)
    output = output_of(process)
    return process.returncode, output


def output_of(process: subprocess.Popen) -> str:
    """What a process writes until it ends; one that does not end is killed."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"no end after {PATIENCE} s: {process.communicate()[0][-2000:]}") from None


def inside(*args: object) -> tuple[int, str]:
    """The same as `run` with the training door, in this process and on all of its devices."""
    from easylm_plus import door, train

    argv = ["train.py", *map(str, args)]
    values = flags.FlagValues()
    flags.DEFINE_integer("verbosity", -1, "", flag_values=values)
    options = {"lock_config": True, "flag_values": values, "sys_argv": argv}
    holder = config_flags.DEFINE_config_file("config", None, "", **options)
    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(door.flags, "FLAGS", values))
        stack.enter_context(mock.patch.object(train, "CONFIG", holder))
        stack.enter_context(mock.patch.object(train.cluster, "use_compilation_cache"))  # the tests have their own
        stack.enter_context(mock.patch.object(sys, "argv", argv))
        stack.enter_context(mock.patch.dict(os.environ, {"COLUMNS": "200"}))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        try:
            door._parse(argv)
            status = door.guarded(train.main)
        except SystemExit as end:
            status = int(end.code)
        except BaseException:
            traceback.print_exc()
            status = 1
    return status, output.getvalue()


# --- the same without a door ---


def fresh(model: Transformer, seed: int = 0) -> dict:
    """First parameters, from one program: dozens of small ones take three times as long to compile."""
    return jax.jit(lambda: init_parameters(model, jax.random.key(seed)))()


@functools.cache
def applied(model: Transformer) -> Callable[..., jax.Array]:
    """model.apply as one program for all parameters of the same kinds."""
    return jax.jit(model.apply)


@functools.cache
def model(vocab: int = 50, **overrides: object) -> tuple[Transformer, dict]:
    """A float32 model and its first parameters."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    value = preset("debug", vocab_size=vocab, init="fan_in", attention="xla", **(shape | overrides))
    built = Transformer(value, precision("float32"))
    return built, fresh(built, 1)


def random_batch(rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in up to three segments a row, of which a random part is learned, from two sources."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=0) != 0, np.arange(length), 0), axis=1)
    return {
        "inputs": rng.integers(0, vocab, (rows, length), np.int32),
        "targets": rng.integers(0, vocab, (rows, length), np.int32),
        "loss_weights": (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32),
        "positions": (np.arange(length) - starts).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "source_ids": (segments % 2).astype(np.int32),
    }


def next_token_batch(ids: np.ndarray, targets: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Rows of one document of one source; all tokens but the last are learned, `targets` over the next ones."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return {
        "inputs": ids,
        "targets": np.roll(ids, -1, axis=1) if targets is None else targets,
        "loss_weights": (positions < ids.shape[1] - 1).astype(np.float32),
        "positions": positions,
        "segment_ids": np.ones_like(ids),
        "source_ids": np.zeros_like(ids),
    }


def under_their_names(tree: dict, config: ModelConfig, family: str = "LlamaForCausalLM") -> dict[str, np.ndarray]:
    """A tree of weights, or of their gradients, as {Hugging Face's name: array in its layout}."""
    weights, names = of_params(config, tree, "the tree"), {}
    for rule in rules_for(ARCHITECTURES[family], piece_shapes(config), "the tree"):
        for index in indices(rule.ours[0], config):
            arrays = rule.write(tuple(map(np.asarray, weights.read(rule.ours, index))), config)
            names |= dict(zip(their_names(rule, index), arrays, strict=True))
    return names


def documents_batch(packing: Packing, vocab: int = 50, length: int = 24) -> dict[str, np.ndarray]:
    """The same ten documents of two sources, packed or one a row."""
    rng = np.random.default_rng(0)
    documents = []
    for i in range(10):
        ids = rng.integers(0, vocab, 4 + 2 * i, np.int32)
        documents.append(Item(i % 2, str(i), Example(ids, (rng.random(len(ids)) < 0.7).astype(np.float32)), len(ids)))
    rows = pack([document.example.positions for document in documents], length, packing)
    return make_batch([[documents[piece.example].piece(piece) for piece in row] for row in rows], length, "ab").arrays
