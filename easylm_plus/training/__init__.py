"""The training loop's parts: state, step, optimizer, schedules, checkpoints, metrics."""
