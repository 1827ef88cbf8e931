"""How weights are stored and multiplied: leaf types, the verbs that read them, and the precision policy."""
