"""Products of packed weights with few tokens, for CPUs (C++, called by XLA), GPUs and TPUs (Pallas)."""
