"""From parameters to text: cache, sampling, generation, chat."""
