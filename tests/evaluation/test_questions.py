"""Which questions a recipe's benchmarks ask, without lm_eval and without a network."""

import json
import subprocess
import sys
from pathlib import Path

from eaft_verl.data.synthesis import generate
from eaft_verl.evaluation.questions import benchmark_questions
from eaft_verl.evaluation.settings import EvaluateSettings


def rows(path: Path, *found: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def test_local_and_generated_questions_up_to_the_limit(tmp_path: Path):
    settings = EvaluateSettings(
        target=["sums", {"task": "gsm8k", "data": rows(tmp_path / "g.jsonl", {"question": "Q1", "answer": "1"})}],
        general=[
            {"task": "gcd", "limit": 3},
            {"task": "cluewsc", "data": rows(tmp_path / "c.jsonl", {"text": "T", "target": {}, "label": "true"})},
            {"task": "ifeval", "data": rows(tmp_path / "i.jsonl", {"prompt": "P"}, {"prompt": None})},
            {"task": "aime24", "data": rows(tmp_path / "a.jsonl", {"problem": "X", "answer": 1})},
        ],
        limit=5,
    )
    known, unknown = benchmark_questions(settings)
    assert known == {
        "sums": [row["prompt"] for row in generate("sums_heldout")[:5]],
        "gsm8k": ["Q1"],
        "gcd": [row["question"] for row in generate("gcd")[:3]],
        "cluewsc": ["T"],
        "ifeval": ["P"],
        "aime24": ["X"],
    }
    assert unknown == {}


def test_what_is_not_known_is_said(tmp_path: Path):
    broken = tmp_path / "b.jsonl"
    broken.write_text("{")
    settings = EvaluateSettings(
        target=["gsm8k_local", "mmlu_pro"], general=[{"task": "aime24", "data": str(broken)}], limit=5
    )
    known, unknown = benchmark_questions(settings)
    assert known == {}
    assert "--against openai/gsm8k:main:test" in unknown["gsm8k_local"]
    assert "lm-evaluation-harness reads its documents itself" in unknown["mmlu_pro"]
    assert "is not valid JSON" in unknown["aime24"]


def test_it_loads_neither_torch_nor_lm_eval():
    script = "import sys, eaft_verl.evaluation.questions, eaft_verl.recipe.datasets as e\n"
    script += "assert not {'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
