#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest, e.g. -k objectives, -m slow, -n 0 (one after the other).
set -euo pipefail
cd "$(dirname "$0")/.."
bash examples/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # more threads than cores spin against each other
# two files at a time: the tests of a file share one Ray start; in the order of tests/conftest.py: long files first
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
