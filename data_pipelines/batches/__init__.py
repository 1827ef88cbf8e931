"""From draws to batches: `training_data` opens what a run reads, `loader` packs it, `replay` makes a step again."""
