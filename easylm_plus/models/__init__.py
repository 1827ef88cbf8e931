"""One decoder, described by a ModelConfig value; a family is a row of values, not a copy of code."""
