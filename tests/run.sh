#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest, e.g. -k objectives, -m slow.
set -euo pipefail
cd "$(dirname "$0")/.."
bash examples/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # more threads than cores spin against each other
exec .venv/bin/python -m pytest "$@"
