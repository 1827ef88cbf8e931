"""Stopping when told to: SIGTERM (and Ctrl-C) end a run at the next step boundary, after a checkpoint."""

import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 143  # 128 + SIGTERM: a scheduler that restarts failed jobs restarts this one


class Preemption:
    """Within this context signals are remembered instead of killing the process."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        # in a job of several processes JAX listens for SIGTERM itself, and a handler of ours would take it away
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.received = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: the same answer on all processes of a job."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)
