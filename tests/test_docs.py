"""What the README, the docs and the configs' docstrings tell people to type: the commands, their flags, their keys."""

import ast
import json
import re
import shlex

import pytest
import tiny

from data_pipelines.datasets import open_source
from data_pipelines.prepare import prepare
from easylm_plus.config import check
from easylm_plus.training.data import load_config_file

PAGES = [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md")), tiny.ROOT / "benchmarks/README.md"]
MADE_UP = "configs/data/mine.py"  # the reader's own


def commands(text):
    """Indented lines that start a program of ours, continued lines joined, comments cut off."""
    text = re.sub(r"\\\n\s+", "", text)
    pattern = r"^ +((?:\S*python -m (?:easylm_plus|data_pipelines)|python benchmarks/|\./run\.sh)[^\n#]*)"
    return [shlex.split(line) for line in re.findall(pattern, text, re.MULTILINE)]


def all_commands():
    for page in PAGES:
        yield from ((page.name, command) for command in commands(page.read_text(encoding="utf-8")))
    for path in sorted((tiny.ROOT / "configs").rglob("*.py")):
        yield from (
            (path.stem, command)
            for command in commands(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        )


def source(command):
    """The file that a command runs."""
    target = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
    return tiny.ROOT / target


def wrong(command):
    """What would not work as it is written, or None."""
    if command[0] == "./run.sh":
        if command[1:2] == ["test"]:  # what follows is for pytest
            lost = [word for word in command[2:] if word.startswith("tests/") and not (tiny.ROOT / word).exists()]
            return f"no file {lost[0]}" if lost else None
        return None if command[1:] in ([], ["setup"]) else "no such argument of run.sh"
    if not source(command).is_file():
        return f"no file {source(command)}"
    known = set(
        re.findall(r'(?:DEFINE_\w+\(\s*|add_argument\(\s*"--)"?(\w+)"', source(command).read_text(encoding="utf-8"))
    )
    arguments = command[3 if command[1] == "-m" else 2 :]
    flags = dict(re.match(r"--([\w.]+)=?(.*)", word).groups() for word in arguments if word.startswith("--"))
    if unknown := [name for name in flags if name.split(".")[0] not in known]:
        return f"no flag {unknown[0]}"
    if flags.get("config", MADE_UP) == MADE_UP:
        return None
    config = load_config_file(str(tiny.ROOT / flags["config"]))
    for name, value in flags.items():
        if name.startswith("config."):
            *parents, last = name.split(".")[1:]
            section = config
            for parent in parents:
                section = section[parent]
            if last not in section:
                return f"no key {name}"
            section[last] = type(section[last])(value)
    if source(command).name == "train.py":
        check(config)
    return None


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{place}-{' '.join(c)}") for place, c in all_commands()])
def test_a_command(command):
    assert wrong(command) is None


def test_there_are_commands_and_wrong_ones_are_seen():
    places = [place for place, _ in all_commands()]
    assert {"README.md", "data.md", "koala13b", "koala", "text"} <= set(places) and len(places) > 15
    for text, message in {
        "    ./run.sh tests": "no such argument",
        "    ./run.sh test tests/models/test_family.py": "no file tests/models/test_family.py",
        "    python -m easylm_plus.trian --config=configs/debug.py": "no file",
        "    python -m easylm_plus.train --confg=configs/debug.py": "no flag confg",
        "    python -m easylm_plus.train --config=configs/debug.py --config.data.lenght=2": "no key config.data.lenght",
    }.items():
        (command,) = commands(text)
        assert message in (wrong(command) or "")


def test_your_own_dataset_in_10_lines(tmp_path):
    """The JSONL line and the config of docs/data.md, as they are written there."""
    section = (tiny.ROOT / "docs/data.md").read_text(encoding="utf-8").partition("## Your own dataset")[2]
    row = re.search(r'^    (\{"messages".*\})$', section, re.MULTILINE)[1]
    code = re.search(r"^    from ml_collections.*?return config$", section, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "mine.py").write_text(re.sub(r"^    ", "", code, flags=re.MULTILINE))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/chats.jsonl").write_text(20 * (row + "\n"))
    assert len((tmp_path / "mine.py").read_text(encoding="utf-8").splitlines()) <= 10
    prepare(load_config_file(str(tmp_path / "mine.py")), tmp_path / "raw", tmp_path / "data")
    turns = open_source(tmp_path / "data", "mine", "train")[0].turns
    assert [turn.text for turn in turns] == [m["content"] for m in json.loads(row)["messages"]]
