"""The error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: a config key, a path, a checkpoint that does not fit. Doors show it as one message, no traceback.

    The message names what was found, what was expected and, where it can, what to do.
    """
