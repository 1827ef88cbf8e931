"""Which example comes when, as a function of (seed, draw): shares, turns of sources, permutations."""
