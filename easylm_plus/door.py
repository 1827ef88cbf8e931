"""How every command starts: flags, the config file, and one clear message for what the user can mend."""

import errno
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging
from rich.console import Console

from data_pipelines.errors import InputError

console = Console(highlight=False, soft_wrap=True)


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits; bad input ends in its message and exit status 1 (flags: 2)."""
    app.run(lambda _: sys.exit(guarded(main)), flags_parser=_parse)


def guarded(main: Callable[[], int | None]) -> int:
    """`main`'s exit status; errors that the user can mend are printed, all others keep their traceback."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every save in twenty lines
    try:
        return main() or 0
    except (InputError, FileNotFoundError) as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            place = error.filename or error
            return _fail(f"the disk is full: {place}. Nothing already saved was lost; free some space and run again")
        raise


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, InputError, AttributeError, KeyError, TypeError, FileNotFoundError) as error:
        # ml_collections puts its "did you mean" into the message of a plain AttributeError or KeyError
        text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
        sys.exit(_fail(text.strip("'\"").replace("\\n", "\n").replace("'\"", "'").replace("\n", ". "), status=2))


def _fail(message: str, status: int = 1) -> int:
    name = os.path.basename(sys.argv[0] or "easylm_plus")
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    return status
