"""Training-step throughput on a CPU: ours against Hugging Face transformers + torch, alternately in one run.

    python benchmarks/train_step_cpu.py --peer=PYTHON --precision=float32

PYTHON is an interpreter with torch and transformers (benchmarks/README.md). Both sides start from the same weights,
see the same batch, run AdamW with clipping on the same number of threads, and must reach the same loss. Both get
huge pages from malloc (as run.sh gives them to training): a step allocates 2 GB, and half a million page faults cost
more than its attention.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

SHAPES = {
    "small": {"hidden": 512, "ffn": 1376, "layers": 8, "heads": 8, "vocab": 8192, "length": 512},
    "easylm": {"hidden": 256, "ffn": 688, "layers": 4, "heads": 4, "vocab": 32000, "length": 512},
}
PEER = flags.DEFINE_string("peer", None, "interpreter with torch and transformers; none: only ours")
PRECISION = flags.DEFINE_enum("precision", "float32", ["float32", "bf16"], "of both sides")
ROUNDS = flags.DEFINE_integer("rounds", 5, "alternations")
STEPS = flags.DEFINE_integer("steps", 2, "steps a round that count")
SHAPE = flags.DEFINE_enum("shape", "small", list(SHAPES), "of the model")
THREADS = flags.DEFINE_integer("threads", 2, "threads of each side")
BATCH = 8
HUGE_PAGES = "glibc.malloc.hugetlb=1"
HERE = Path(__file__).parent


class Peer:
    """The torch process: runs when told to, otherwise waits."""

    def __init__(self, python: str, folder: str):
        script = [python, str(HERE / "torch_step.py")]
        shape = SHAPES[SHAPE.value]
        subprocess.run([*script, "make", folder, json.dumps(shape)], check=True, stderr=subprocess.DEVNULL)
        args = ["serve", folder, str(BATCH), str(shape["length"]), PRECISION.value, str(THREADS.value)]
        self.process = subprocess.Popen([*script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline().strip() == "ready"

    def __call__(self, steps: int) -> dict:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def ours(folder: str):
    """A function (steps) -> {"seconds", "cpu_seconds", "loss"} that continues our own training state."""
    from easylm_plus.parallel.cluster import set_backend_flags

    set_backend_flags(PRECISION.value, deterministic=True)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from easylm_plus.config import base
    from easylm_plus.interop.huggingface import load_parameters, read_config
    from easylm_plus.models.transformer import Transformer
    from easylm_plus.numerics.precision import precision
    from easylm_plus.objectives.lm import LanguageModel
    from easylm_plus.training.optimizer import adamw
    from easylm_plus.training.state import new_state
    from easylm_plus.training.step import make_train_step

    model = Transformer(read_config(folder, scan_layers=False), precision(PRECISION.value))
    params = load_parameters(folder, model, lambda _, x: jnp.asarray(x))
    config = base()
    config.optimizer.update(learning_rate=1e-3, schedule="constant")
    optimizer = adamw(config.optimizer, 100)
    step = jax.jit(make_train_step(LanguageModel(model, 1), optimizer, config.train), donate_argnums=0)
    tokens = np.asarray(json.loads(Path(folder, "tokens.json").read_text()), np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    ones = np.ones_like(inputs)
    batch = {
        "inputs": inputs, "targets": targets, "loss_weights": ones.astype(np.float32), "positions": positions,
        "segment_ids": ones, "source_ids": np.zeros_like(inputs),
    }  # fmt: skip
    state = new_state(params, optimizer, ema=False)

    def run(steps: int) -> dict:
        nonlocal state
        seconds, cpu_seconds = [], []
        for _ in range(steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}

    return run


def main(_: list[str]) -> None:
    tokens = BATCH * SHAPES[SHAPE.value]["length"]
    with tempfile.TemporaryDirectory() as folder:
        sides = {"torch": Peer(PEER.value, folder)} if PEER.value else {}
        sides["ours"] = ours(folder)
        for name, run in sides.items():
            print(f"{name}: first step {run(1)['seconds'][0]:.1f} s", flush=True)
        times: dict[str, list[float]] = {name: [] for name in sides}
        cpu_times: dict[str, list[float]] = {name: [] for name in sides}
        for round in range(ROUNDS.value):
            for name, run in sides.items():
                # the first step after the other side's turn does not count: that side's threads still spin, and the
                # machine has taken back memory that lay idle
                result = run(STEPS.value + 1)
                counted = result["seconds"][1:]
                times[name] += counted
                cpu_times[name] += result["cpu_seconds"][1:]
                speed = tokens / min(counted)
                print(f"round {round}  {name:5}  {speed:7.0f} tokens/s  loss {result['loss']:.4f}", flush=True)
    best = {name: tokens / min(t) for name, t in times.items()}
    median = {name: tokens / statistics.median(t) for name, t in times.items()}
    for name in sides:
        by_cpu = tokens / statistics.median(cpu_times[name])
        print(f"{name:5}  best {best[name]:.0f}  median {median[name]:.0f} tokens/s; {by_cpu:.0f} tokens/CPU second")
    if "torch" in sides:
        print(f"ratio  best {best['ours'] / best['torch']:.3f}  median {median['ours'] / median['torch']:.3f}")


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:  # read by the C library when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(HERE.parent))
    app.run(main)
