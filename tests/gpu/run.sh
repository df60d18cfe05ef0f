#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes, without a hub: one table, and one JSON (--json OUT, default runs/gpu.json).
# --dry-run: the same on the CPU at toy sizes, without Ray. PYTHON: the interpreter, default .venv's or python3.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; fi
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m tests.gpu "$@"
