"""The error that is the user's to mend."""

from data_pipelines.errors import InputError


class UserError(InputError):
    """Bad input to easylm_plus: a config key, a path, a checkpoint that does not fit. Doors show it as one message.

    The message names what was found, what was expected and, where it can, what to do.
    """
