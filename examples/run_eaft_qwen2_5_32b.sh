#!/usr/bin/env bash
# EAFT on Qwen2.5-32B-Instruct (math), the paper's main run; run.sh says what ON, OUTPUT and DRY_RUN do.
exec bash "$(dirname "$0")/run.sh" "${RECIPE:-recipes/math_qwen2_5_32b.yaml}" eaft "$@"
