"""How good a model is, in numbers: held-out loss, and exact match of generated answers."""
