"""How every command starts: flags, the config file, and one clear message for what the user can mend."""

import errno
import os
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging
from rich.console import Console

from data_pipelines.errors import InputError
from easylm_plus.errors import UserError

console = Console(highlight=False, soft_wrap=True)


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, calls `main` and exits; bad input ends in its message and exit status 1 (flags: 2).

    After a full disk (status 28) no exit handler runs: they would try to write again, and fail in many tracebacks.
    """

    def leave(status: int) -> None:
        if status == errno.ENOSPC:
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)

    app.run(lambda _: leave(guarded(main)), flags_parser=_parse)


def guarded(main: Callable[[], int | None]) -> int:
    """`main`'s exit status; errors that the user can mend are printed, all others keep their traceback."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every save in twenty lines
    try:
        return main() or 0
    except (InputError, FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError) as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            place = error.filename or error
            told = f"the disk is full: {place}. Nothing already saved was lost; free some space and run again"
            return _fail(told, status=errno.ENOSPC)
        if error.errno == errno.EROFS:
            return _fail(str(error))
        raise


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            if flags.FLAGS["config"].value is None:
                raise UserError("--config is not set; expected a config file, as in --config=configs/debug.py")
            flags.FLAGS["config"].value.keys()  # that the file is not there shows only when the config is used
        return rest
    except (flags.Error, InputError, AttributeError, KeyError, TypeError, OSError) as error:
        sys.exit(_fail(_told(error), status=2))


def _told(error: Exception) -> str:
    """What a person needs of an error in flags or config file.

    ml_collections wraps a whole traceback of the config file into its message, and puts its suggestion for an unknown
    key into a plain AttributeError or KeyError.
    """
    text = str(error).replace("\\n", "\n")
    if found := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text):
        return f"unknown config key {found[2]!r}: did you mean {found[1]!r}?"
    if missing := re.search(r"No such file or directory: ('.+?')", text):
        return f"config file {missing[1]} does not exist"
    if raised := re.findall(r"^[\w.]+(?:Error|Exception): (.+)$", text, re.MULTILINE):
        return raised[-1]
    if isinstance(error, KeyError | AttributeError):
        return f"unknown config key {str(error.args[0]).strip(chr(34) + chr(39))!r}"
    return " ".join(text.split())


def _fail(message: str, status: int = 1) -> int:
    name = os.path.basename(sys.argv[0] or "easylm_plus")
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    return status
