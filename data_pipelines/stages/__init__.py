"""The stages between reading and writing, one module each. See `base` for what a stage is."""
