"""The error that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a file, a row, a configuration key. Commands show it as one message, without a traceback.

    The message names what was found and what was expected.
    """
