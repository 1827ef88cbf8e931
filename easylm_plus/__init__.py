"""easylm_plus: train large language models and fine-tune them into chat models, in JAX."""
