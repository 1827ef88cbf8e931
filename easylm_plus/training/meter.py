"""From what each step returns to rows of the log, without making the device wait.

The numbers of step n are fetched after step n + 1 has been started: by then they are there, or about to be.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from easylm_plus.errors import UserError
from easylm_plus.training import numerics_log
from easylm_plus.training.metrics import MetricsLog

# Dense 16-bit peak of one device in TFLOP/s, from the vendors' data sheets; the denominator of MFU.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
}


class Meter:
    """Collects the metrics of steps and writes a row every `every` steps.

    Args:
      sources: names in the order of the sums' source axis.
      step_tokens: positions in a batch; flops_per_token: of forward and backward; both for throughput.
      peak_tflops: of all devices together, 0 if unknown (then no MFU is logged).
      max_streak: skipped steps in a row that end the run.
    """

    def __init__(
        self,
        log: MetricsLog,
        every: int,
        sources: Sequence[str],
        step_tokens: int,
        flops_per_token: float,
        peak_tflops: float,
        max_streak: int,
    ):
        self.log, self.every, self.sources = log, every, list(sources)
        self.step_tokens, self.flops_per_token, self.peak_tflops = step_tokens, flops_per_token, peak_tflops
        self.max_streak = max_streak
        self.last: dict[str, Any] = {}  # the last row written
        self._pending: tuple[int, Any, dict[str, Any]] | None = None
        self._waited = 0.0
        self._since = time.perf_counter()
        self._steps = 0
        self._reset()

    def _reset(self) -> None:
        zeros = [0.0] * len(self.sources)
        self._sums: dict[str, Any] = {"nll": zeros, "tokens": zeros, "loss": 0.0, "count": 0, "router": {}}

    def get_state(self) -> dict[str, Any]:
        """The sums since the last row: part of a checkpoint, so that the next row covers the same steps."""
        return dict(self._sums)  # written in the background, while the next steps go on adding

    def set_state(self, state: dict[str, Any]) -> None:
        self._sums = {"router": {}, **state}

    def waited(self, seconds: float) -> None:
        """Counts time that the loop spent waiting for a batch."""
        self._waited += seconds

    def push(self, step: int, metrics: Any, extra: dict[str, Any]) -> None:
        """Takes the metrics of the step just started, and reads those of the one before."""
        previous, self._pending = self._pending, (step, metrics, extra)
        self._take(previous)

    def drain(self) -> None:
        """Reads what is pending: waits for the device. Before evaluations and checkpoints, and at the end."""
        previous, self._pending = self._pending, None
        self._take(previous)

    def restart_clock(self) -> None:
        """Leaves what happened since the last step (an evaluation, a save) out of the throughput."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def _take(self, entry: tuple[int, Any, dict[str, Any]] | None) -> None:
        if entry is None:
            return
        step, metrics, extra = entry
        metrics = jax.device_get(metrics)
        self._steps += 1
        if metrics["ok"]:
            for name in ("nll", "tokens"):
                self._sums[name] = [a + float(b) for a, b in zip(self._sums[name], metrics["sums"][name])]
            router = metrics["sums"].get("router", {})  # of models with experts
            self._sums["router"] = {k: self._sums["router"].get(k, 0.0) + float(v) for k, v in router.items()}
            self._sums["loss"] += float(metrics["loss"])
            self._sums["count"] += 1
        if step % self.every == 0:
            self._write(step, metrics, extra)
        if metrics["streak"] > self.max_streak:
            self.log.flush()
            raise UserError(
                f"step {step}: {int(metrics['streak'])} steps in a row were skipped because their loss or gradient was "
                "not finite or spiked; lower optimizer.learning_rate, or look at the data of the steps before"
            )

    def _write(self, step: int, metrics: Any, extra: dict[str, Any]) -> None:
        nll, tokens = np.asarray(self._sums["nll"]), np.asarray(self._sums["tokens"])
        router = dict(self._sums["router"])
        routed = router.pop("tokens", 0.0)
        seconds = time.perf_counter() - self._since
        rate = self._steps * self.step_tokens / max(seconds, 1e-9)
        tflops = rate * self.flops_per_token / 1e12
        row = {
            "loss": self._sums["loss"] / self._sums["count"] if self._sums["count"] else float("nan"),
            **{f"loss/{s}": float(nll[i] / tokens[i]) for i, s in enumerate(self.sources) if tokens[i]},
            **{k: float(metrics[k]) for k in ("grad_norm", "learning_rate") if k in metrics},
            **{f"router/{name}": value / routed for name, value in router.items() if routed},
            **numerics_log.in_short(metrics.get("numerics", {})),
            "loss_tokens": float(tokens.sum()),
            "skipped": int(metrics["skipped"]),
            "tokens_per_second": rate,
            "tflops": tflops,
            "input_wait": self._waited / max(seconds, 1e-9),
            "memory_bytes": memory_in_use(),
            **extra,
        }
        if "params_hash" in metrics:
            row["params_hash"] = f"{int(metrics['params_hash']):08x}"
        if self.peak_tflops:
            row["mfu"] = tflops / self.peak_tflops
        self.log.write(step, row)
        self.log.details(step, numerics_log.each(metrics.get("numerics", {})))
        self.last = {"step": step, **row}
        self._reset()
        self.restart_clock()


def device_peak_tflops(device: jax.Device, configured: float) -> float:
    """Peak TFLOP/s of one device: the configured number, the table's, or 0 where neither knows."""
    known = [name for name in PEAK_TFLOPS if device.device_kind.startswith(name)]
    return configured or (PEAK_TFLOPS[max(known, key=len)] if known else 0.0)


def memory_in_use() -> int:
    """Peak bytes on the first local device; on a CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
