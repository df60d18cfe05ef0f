#!/usr/bin/env bash
# The main job on a laptop: one small model trained in five ways, each evaluated and compared with the base; ends with the
# report's path and how to use the last model.
# Arguments go to `eaft compare`, e.g. --seeds 0,1,2. Running it again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash examples/setup.sh
exec .venv/bin/eaft compare recipes/quickstart.yaml "$@"
