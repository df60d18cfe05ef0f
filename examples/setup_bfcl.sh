#!/usr/bin/env bash
# Makes .bfcl ready, the environment of the benchmark bfcl_v3: bfcl-eval's pins do not go with verl's. About 3 GB.
# Quick and without effect when it is. PYTHON=... chooses the interpreter (3.10 to 3.12), the argument another folder,
# which EAFT_BFCL_PYTHON=FOLDER/bin/python then names.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.bfcl}
want=$(cat examples/setup_bfcl.sh examples/apart.sh | sha256sum)
# shellcheck source=/dev/null
. examples/apart.sh
# torch is needed by its embedding search only, which v3 does not have: the CPU build where pip finds one
pip install -q "torch==2.13.0"
pip install -q "bfcl-eval==2026.3.23" "soundfile<1"
"$folder/bin/python" -c 'import bfcl_eval.constants.model_config' # everything that it imports is there
echo "$want" >"$folder/.ready"
