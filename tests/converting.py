"""The conversion door with flags, in this process."""

from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from easylm_plus import convert
from easylm_plus.errors import UserError


def run(**values):
    """Its exit status."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()}):
        return convert.main()


def converted(**values):
    assert run(**values) == 0


def refuse(message, **values):
    with pytest.raises(UserError, match=message):
        run(**values)
