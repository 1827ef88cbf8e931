"""Our training step, as the benchmarks of this folder time it."""

import os
import sys
import time
from typing import Any

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def with_huge_pages() -> None:
    """Starts this process again with huge pages from malloc, which the C library decides when a process starts.

    As run.sh has them: a step allocates gigabytes, and half a million page faults cost more than its attention.
    """
    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})


class OwnStep:
    """Calling it with N runs N training steps on the same rows: {"seconds", "cpu_seconds", "loss" of the last}."""

    def __init__(self, model: Any, params: Any, tokens: Any):
        """tokens int32[rows, length + 1]: one document a row, every token learned. Takes the parameters' memory."""
        import jax
        import numpy as np

        from easylm_plus.config import base
        from easylm_plus.objectives.lm import LanguageModel
        from easylm_plus.training.optimizer import adamw
        from easylm_plus.training.state import new_state
        from easylm_plus.training.step import make_train_step

        config = base()
        config.optimizer.update(learning_rate=1e-3, schedule="constant")
        optimizer = adamw(config.optimizer, 100)
        self.step = jax.jit(make_train_step(LanguageModel(model, 1), optimizer, config.train), donate_argnums=0)
        self.state = new_state(params, optimizer, ema=False)
        inputs, ones = tokens[:, :-1], np.ones_like(tokens[:, 1:])
        positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
        self.batch = {
            "inputs": inputs, "targets": tokens[:, 1:], "loss_weights": ones.astype(np.float32),
            "positions": positions, "segment_ids": ones, "source_ids": np.zeros_like(inputs),
        }  # fmt: skip

    def __call__(self, steps: int) -> dict[str, Any]:
        seconds, cpu_seconds = [], []
        for _ in range(steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            self.state, metrics = self.step(self.state, self.batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}
