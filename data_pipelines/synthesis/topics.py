"""Topic words, of which every prompt gets a few: they make the answers differ from one another.

Yuan 2.0 had 15,000, which were not published. A file of your own has one a line. Without one, the words are those that
the standard library's names are made of (`heap_push`, `OrderedDict`) and that its documentation uses as plain words in
several modules, but not in most: about 800, read from the installed Python as `sources.pydoc` reads it, so they differ
a little from version to version. The run keeps their hash and does not go on with others.
"""

import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import InputError
from data_pipelines.sources import pydoc

WORD = re.compile(r"[a-z]{4,}")
LEFT_OUT = ("curses", "tkinter")  # names of widgets and keys
LEAST, MOST = 3, 0.35  # modules whose documentation uses a word: at least, and share at most
LONGEST = 100  # characters


def read_topics(path: Path | str | None) -> tuple[str, ...]:
    """The lines of a file, or the built-in words. Raises InputError for a file with fewer than five, or a long one."""
    if not path:
        return built_in()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: found {error}; expected a text file in UTF-8, a topic a line") from None
    topics = tuple(dict.fromkeys(stripped for line in lines if (stripped := line.strip())))
    if len(topics) < 5:
        raise InputError(f"{path}: found {len(topics)} different topics; expected five or more, one a line")
    for row, topic in enumerate(lines, start=1):
        if len(topic) > LONGEST:
            raise InputError(f"{path}, row {row}: found {len(topic)} characters; expected {LONGEST} at most")
    return topics


def built_in() -> tuple[str, ...]:
    """In alphabetical order; the same for the same Python."""
    named: set[str] = set()
    used: Counter[str] = Counter()
    count = 0
    for name, path in pydoc.modules(Path(sysconfig.get_paths()["stdlib"])):
        if name.partition(".")[0] in LEFT_OUT or not (parsed := pydoc.parse(path)):
            continue
        found = [(name, pydoc.documentation(parsed[0]))]
        found += [(full, pydoc.documentation(node)) for full, node in pydoc.definitions(parsed[0], name)]
        named.update(word for full, _ in found for word in words(full.rpartition(".")[2]))
        used.update(set(WORD.findall(" ".join(text for _, text in found))))
        count += 1
    topics = tuple(sorted(word for word in named if LEAST <= used[word] <= MOST * count))
    if len(topics) < 5:
        raise InputError("topics: found no source of the standard library; expected a file of topics in the config")
    return topics


def words(name: str) -> Sequence[str]:
    """`addCleanup_now` -> add, cleanup, now."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower().split()
