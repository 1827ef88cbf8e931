"""Other people's files: which of their names is which of ours."""
