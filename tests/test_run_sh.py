"""run.sh goes on from no step that failed: a broken installation leaves no stamp, and nothing runs in it.

The copies of run.sh here find made-up interpreters: they write down what they are called with, and fail where they are
told to.
"""

import os
import shutil
import subprocess

import pytest
import tiny

PYTHON = """#!/bin/sh
case "$*" in
  *"-c "*|"-c "*) exit {version_status} ;;
  --version) echo Python 3.x ;;
  *"-m venv"*) echo venv >> calls; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"-m pip"*) echo install >> calls; exit {install_status} ;;
  *) echo "$2" >> calls; [ "$2" != {fails} ] ;;
esac
"""
JOINED = {"setup; quickstart ;;": "setup && quickstart ;;", "shift; setup; .venv": "shift && setup && .venv"}


@pytest.fixture
def call(tmp_path):
    """A function (argument, ...) -> (exit status, what was called in this order, output) of a copy of run.sh."""
    for name in ("run.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(tiny.ROOT / name, tmp_path / name)

    def run(*argv, install=0, found=True, fails="nothing", wrong=None, home=True):
        text = (tiny.ROOT / "run.sh").read_text(encoding="utf-8")
        for right, other in (wrong or {}).items():
            assert right in text
            text = text.replace(right, other)
        (tmp_path / "run.sh").write_text(text, encoding="utf-8")
        (tmp_path / "bin").mkdir(exist_ok=True)
        for version in ("3.13", "3.12", "3.11"):
            python = tmp_path / "bin" / f"python{version}"
            python.write_text(PYTHON.format(version_status=0 if found else 1, install_status=install, fails=fails))
            python.chmod(0o755)
        (tmp_path / "calls").unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | ({"HOME": str(tmp_path)} if home else {})
        done = subprocess.run(["./run.sh", *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
        called = (tmp_path / "calls").read_text().split() if (tmp_path / "calls").exists() else []
        return done.returncode, called, done.stdout + done.stderr

    return run


QUICKSTART = ["easylm_plus.train", "easylm_plus.evaluate"]
AFTER = {(): QUICKSTART, ("test",): ["pytest"], ("setup",): []}


@pytest.mark.parametrize("argv", AFTER, ids=str)
def test_a_failing_installation_stops_everything(call, tmp_path, argv):
    status, called, _ = call(*argv, install=3)
    assert status == 3 and called == ["venv", "install"]
    assert not (tmp_path / ".venv/installed").exists()
    again, called, _ = call(*argv, install=3)
    assert again == 3 and called == ["venv", "install"], "no stamp: the next call installs again"
    status, called, _ = call(*argv)
    assert status == 0 and called == ["venv", "install", *AFTER[argv]]


@pytest.mark.parametrize("argv", [(), ("test",)], ids=str)
def test_the_old_form_is_seen(call, tmp_path, argv):
    """Joined by &&, `set -e` is off inside of `setup`: a stamp is left, and the programs run in a broken .venv."""
    status, called, _ = call(*argv, install=3, wrong=JOINED)
    assert status == 0 and called == ["venv", "install", *AFTER[argv]] and (tmp_path / ".venv/installed").exists()


def test_an_installation_is_made_once_for_each_list_of_packages(call, tmp_path):
    assert call("setup")[1] == ["venv", "install"]
    stamp = (tmp_path / ".venv/installed").read_text(encoding="utf-8")
    assert stamp == "".join((tmp_path / n).read_text(encoding="utf-8") for n in ("requirements.txt", "pyproject.toml"))
    assert call("setup")[:2] == (0, [])
    with (tmp_path / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert call("setup")[1] == ["venv", "install"]


def test_a_failing_training_is_not_evaluated(call):
    status, called, output = call(fails="easylm_plus.train")
    assert status == 1 and called == ["venv", "install", "easylm_plus.train"] and "finished" not in output
    status, called, output = call(fails="easylm_plus.train", wrong={"set -euo": "set -uo"})
    assert status == 0 and called == QUICKSTART and "finished" in output


def test_failing_tests_are_told(call):
    assert call("test", fails="pytest")[0] == 1


@pytest.mark.parametrize("home", [True, False], ids=["home", "no home"])
def test_without_a_python_it_says_so(call, home):
    status, called, output = call(found=False, home=home)
    assert status == 1 and called == []
    assert output == "run.sh: error: found no Python 3.11, 3.12 or 3.13 with venv on this machine\n"
