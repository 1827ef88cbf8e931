"""Sources -> conversations -> mixture -> packed batches. NumPy only: no JAX, and nothing from easylm_plus."""
