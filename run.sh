#!/usr/bin/env bash
# ./run.sh        sets up .venv, trains the quickstart model on data it generates, evaluates it, and shows answers
# ./run.sh test   runs the tests
# ./run.sh setup  only makes .venv
#
# Both work without a network once the packages are installed. QUICKSTART_ARGS are passed to the training command.
set -euo pipefail
cd "$(dirname "$0")"

newest_python() {
  for version in 3.13 3.12 3.11; do
    for python in "python$version" "${HOME:-}/.pyenv/versions/$version".*/bin/python; do
      if "$python" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
        command -v "$python"
        return
      fi
    done
  done
  echo "run.sh: error: found no Python 3.11, 3.12 or 3.13 with venv on this machine" >&2
  exit 1
}

setup() {
  local stamp=.venv/installed
  if [ "$(cat "$stamp" 2>/dev/null)" = "$(cat requirements.txt pyproject.toml)" ]; then
    return
  fi
  local python
  python=$(newest_python)
  echo "run.sh: making .venv with $("$python" --version) ($python)"
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
  cat requirements.txt pyproject.toml > "$stamp"
}

quickstart() {
  local run=runs/koala_tiny started=$SECONDS
  # huge pages from malloc (Linux): a step on a CPU is a tenth faster without its page faults
  GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" .venv/bin/python -m easylm_plus.train \
    --config=configs/koala_tiny.py --config.log.dir="$run" ${QUICKSTART_ARGS:-}
  .venv/bin/python -m easylm_plus.evaluate --checkpoint="$run" --output="$run/evaluation.json"
  echo
  echo "run.sh: finished in $((SECONDS - started)) s. Curves: $run/curves.png, or: .venv/bin/tensorboard --logdir=runs"
  echo "Talk to it: .venv/bin/python -m easylm_plus.chat --checkpoint=$run"
}

case "${1:-quickstart}" in
  quickstart) setup; quickstart ;;  # not joined by &&, which would switch off set -e inside of setup
  setup) setup ;;
  test) shift; setup; .venv/bin/python -m pytest -n 2 --dist worksteal "$@" ;;
  *) echo "usage: ./run.sh [test|setup]" >&2 && exit 2 ;;
esac
