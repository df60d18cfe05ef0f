#!/usr/bin/env bash
# An arm of a recipe, or with `compare` every arm: base evaluated, trained, exported, evaluated, report.
#   bash examples/run.sh recipes/math_qwen3_4b.yaml eaft            or sft, grpo, ..., compare
# ON=local|ray|slurm|kuberay|skypilot says where, OUTPUT=/a/folder/every/node/sees; DRY_RUN=1 checks and prints only.
# Further arguments are added, e.g. verl.trainer.nnodes=2. Running it again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/eaft ] && PATH=$PWD/.venv/bin:$PATH
recipe=${1:?a recipe, e.g. recipes/math_qwen3_4b.yaml} arm=${2:?an arm of it, or compare}
what=(--arm "$arm") && [ "$arm" = compare ] && what=(--compare)
exec eaft launch "$recipe" "${what[@]}" --on "${ON:-local}" ${DRY_RUN:+--dry-run} ${OUTPUT:+output="$OUTPUT"} "${@:3}"
