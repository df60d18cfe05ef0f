#!/usr/bin/env bash
# The main job on a laptop: base, SFT and EAFT trained, evaluated and compared; ends with the path of the report page.
# Arguments go to `eaft compare`, e.g. --seeds 0,1,2. Running it again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash examples/setup.sh
exec .venv/bin/eaft compare recipes/quickstart.yaml "$@"
