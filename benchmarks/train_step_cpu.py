"""Training-step throughput on a CPU: ours against Hugging Face transformers + torch, alternately in one run.

    python benchmarks/train_step_cpu.py --peer=PYTHON --precision=float32

PYTHON is an interpreter with torch and transformers (benchmarks/README.md). Both sides start from the same weights,
see the same batch, run AdamW with clipping on the same number of threads, and must reach the same loss. Both get huge
pages from malloc.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags
from own_step import OwnStep, with_huge_pages

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


def ours(folder: str) -> OwnStep:
    """Our step from the same weights and tokens."""
    from easylm_plus.parallel.cluster import set_backend_flags

    set_backend_flags(PRECISION.value, deterministic=True)
    import jax.numpy as jnp
    import numpy as np

    from easylm_plus.interop.huggingface import load_parameters, read_config
    from easylm_plus.models.transformer import Transformer
    from easylm_plus.numerics.precision import precision

    model = Transformer(read_config(folder, scan_layers=False), precision(PRECISION.value))
    params = load_parameters(folder, model, lambda _, x: jnp.asarray(x))
    return OwnStep(model, params, np.asarray(json.loads(Path(folder, "tokens.json").read_text()), np.int32))


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
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(HERE.parent))
    app.run(main)
