"""A trace of a few steps, for TensorBoard's profiler or Perfetto."""

from typing import Any

import jax

from easylm_plus.errors import UserError


class Profiler:
    """Traces the steps "first:last" (as in range) into `directory`/trace; "" traces nothing."""

    def __init__(self, steps: str, directory: str):
        self.directory = f"{directory}/trace"
        self.first = self.last = -1
        self.running = False
        if steps:
            try:
                self.first, self.last = map(int, steps.split(":"))
            except ValueError:
                raise UserError(f"train.profile = {steps!r}: expected 'first:last', as in '10:13'") from None
            if not 0 <= self.first < self.last:
                raise UserError(f"train.profile = {steps!r}: expected 0 <= first < last")

    def before(self, step: int) -> None:
        """Called before step number `step` (from 0) is started."""
        if step == self.first:
            jax.profiler.start_trace(self.directory)
            self.running = True

    def after(self, step: int, state: Any) -> None:
        """Called when `step` steps have been started; ends the trace once the last traced one is done."""
        if step == self.last and self.running:  # a run resumed within these steps never started the trace
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
