"""Training-step throughput on a CPU: ours against Hugging Face transformers + torch, alternately in one run.

    python benchmarks/train_step_cpu.py --peer=PYTHON --precision=float32

PYTHON is an interpreter with torch and transformers (benchmarks/README.md). Both sides start from the same weights,
see the same batch, run AdamW with clipping on the same number of threads, and must reach the same loss.
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

PEER = flags.DEFINE_string("peer", None, "interpreter with torch and transformers; none: only ours")
PRECISION = flags.DEFINE_enum("precision", "float32", ["float32", "bf16"], "of both sides")
ROUNDS = flags.DEFINE_integer("rounds", 5, "alternations")
STEPS = flags.DEFINE_integer("steps", 2, "steps a round")
THREADS = flags.DEFINE_integer("threads", 2, "threads of each side")
SHAPE = {"hidden": 512, "ffn": 1376, "layers": 8, "heads": 8, "vocab": 8192, "length": 512}
BATCH = 8
HERE = Path(__file__).parent


class Peer:
    """The torch process: runs when told to, otherwise waits."""

    def __init__(self, python: str, folder: str):
        script = [python, str(HERE / "torch_step.py")]
        subprocess.run([*script, "make", folder, json.dumps(SHAPE)], check=True, stderr=subprocess.DEVNULL)
        args = ["serve", folder, str(BATCH), str(SHAPE["length"]), PRECISION.value, str(THREADS.value)]
        self.process = subprocess.Popen([*script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline().strip() == "ready"

    def __call__(self, steps: int) -> dict:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def ours(folder: str):
    """A function (steps) -> {"seconds", "loss"} that continues our own training state."""
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
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "loss": loss}

    return run


def main(_: list[str]) -> None:
    tokens = BATCH * SHAPE["length"]
    with tempfile.TemporaryDirectory() as folder:
        sides = {"torch": Peer(PEER.value, folder)} if PEER.value else {}
        sides["ours"] = ours(folder)
        for name, run in sides.items():
            print(f"{name}: first step {run(1)['seconds'][0]:.1f} s", flush=True)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round in range(ROUNDS.value):
            for name, run in sides.items():
                time.sleep(0.5)  # the other side's threads go on spinning for a moment
                result = run(STEPS.value)
                times[name] += result["seconds"]
                speed = tokens / min(result["seconds"])
                print(f"round {round}  {name:5}  {speed:7.0f} tokens/s  loss {result['loss']:.4f}", flush=True)
    best = {name: tokens / min(t) for name, t in times.items()}
    median = {name: tokens / statistics.median(t) for name, t in times.items()}
    for name in sides:
        print(f"{name:5}  best {best[name]:.0f}  median {median[name]:.0f} tokens/s")
    if "torch" in sides:
        print(f"ratio  best {best['ours'] / best['torch']:.3f}  median {median['ours'] / median['torch']:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(HERE.parent))
    app.run(main)
