"""What is learned: a function of the model's outputs and a batch."""
