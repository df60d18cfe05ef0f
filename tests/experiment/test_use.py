"""What is done with a trained model: spoken with, loaded, copied, pushed, evaluated against its base."""

import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from config_fixtures import composed_once  # noqa: F401

from eaft_verl.cli import main
from eaft_verl.experiment.use import how_to_use
from eaft_verl.reporting.summary import place_of, runs_of
from eaft_verl.runs import Run

CONFIG = "data: {chat_template_kwargs: null}\nobjective: {name: eaft}\nverl: {model: {lora_rank: 8}}\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> tuple[Path, Path]:
    """A base and another model of its vocabulary."""
    return tiny_model_path, tiny.tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture
def output(tmp_path: Path, models: tuple[Path, Path]) -> Path:
    """A comparison's folder as far as its models go: the base, an arm, and an arm that has not come to an export."""
    common = {"recipe": "r", "seed": 0, "model": str(models[0]), "keys": {}, "status": "finished"}
    for name, kind in (("base", "base"), ("eaft-seed0", "arm"), ("sft-seed0", "arm")):
        info = {**common, "kind": kind, "arm": name.partition("-")[0], "total_steps": 4}
        Run.create(tmp_path / "out" / name, info=info, config=CONFIG, env={})
    shutil.copytree(models[1], tmp_path / "out/eaft-seed0/checkpoints/step_000004")
    return tmp_path / "out"


def test_base_and_arms_answer_the_same_prompt(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(output), "--prompt", "What is 3 + 4?", "--new-tokens", "6"]) == 0
    shown = capsys.readouterr()
    said = shown.out.splitlines()
    assert said[0].startswith("base: ") and any(line.startswith("eaft-seed0: ") for line in said)
    assert "sft-seed0 has no export of any step" in shown.err
    assert main(["chat", str(output / "eaft-seed0"), "--prompt", "What is 3 + 4?", "--new-tokens", "6"]) == 0
    assert capsys.readouterr().out.splitlines() == said


def test_bytes_that_are_no_text_are_no_fault(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    odd = b"hi \x1b[31m \xff".decode(errors="surrogateescape")  # as Python hands on what stands on a command line
    assert main(["chat", str(models[0]), "--prompt", odd, "--system", odd, "--new-tokens", "2"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_lines_that_are_piped_in_are_one_conversation_until_a_new_one(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eaft_verl.evaluation import drift

    asked: list[list[str]] = []

    def answer(model: Any, tokenizer: Any, prompts: list[dict[str, Any]], new_tokens: int, **how: Any) -> Any:
        asked.append([turn["content"] for turn in prompts[0]["messages"]])
        return [type("Example", (), {"messages": [{"role": "assistant", "content": f"{new_tokens} {how}"}]})]

    monkeypatch.setattr(drift, "make_probe", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\nthree\n"))
    assert main(["chat", str(models[0]), "--system", "Short.", "--new-tokens", "7"]) == 0
    assert asked == [["Short.", "one"], ["Short.", "one", "7 {}", "two"], ["Short.", "three"]]
    assert capsys.readouterr().out == "7 {}\n7 {}\n7 {}\n"


def test_an_answer_ends_with_the_positions_that_the_model_knows(models: tuple[Path, Path]) -> None:
    """512 of them: 500 tokens of prompt and less than a hundred more, whatever is asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eaft_verl.evaluation.drift import make_probe

    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    model.generation_config.eos_token_id = [len(tokenizer) + 7]  # it never ends by itself
    prompt = {"id": "0", "messages": [{"role": "user", "content": "ab " * 150}], "tools": None}
    (example,) = make_probe(model, tokenizer, [prompt], 10_000)
    assert len(example.input_ids) == 512 and sum(example.loss_mask) < 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat", "/nowhere"], "is not a folder here"),
        (["chat", "FOLDER"], "is no run directory and holds none"),
        (["chat", "MODEL", "--new-tokens", "0"], "--new-tokens must be at least 1"),
        (["chat", "nobody/none"], "is not in the local cache"),
        (["chat", "MODEL", "--prompt", " "], "--prompt is empty"),
        (["chat", "MODEL", "--prompt", "ab " * 600], "and the model knows 512 positions"),
        (["export", "FOLDER"], "is not a run directory"),
    ],
)
def test_what_cannot_be_used(
    tmp_path: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    known = {"FOLDER": str(tmp_path), "MODEL": str(models[0])}
    assert main([known.get(word, word) for word in words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat", "MODEL", "--temperature", "nan"], "'nan' must be 0 (greedy), or a number from 0.01 to 100"),
        (["chat", "MODEL", "--temperature", "inf"], "'inf' must be 0 (greedy)"),
        (["chat", "MODEL", "--temperature", "1e-320"], "'1e-320' must be 0 (greedy)"),
        (["analyze", "MODEL", "x.jsonl", "--own", "2", "--temperature", "inf"], "'inf' must be 0 (greedy)"),
        (["plan", "--host", "nan"], "'nan' must be a number from 0"),
        (["plan", "--host", "-5"], "'-5' must be a number from 0"),
        (["doctor", "--wait", "nan"], "'nan' must be a number from 0"),
        (["launch", "x.yaml", "--wait", "inf"], "'inf' must be a number from 0"),
    ],
)
def test_an_option_that_is_no_number_of_its_kind(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert said in capsys.readouterr().err


def test_the_lines_that_are_printed_load_the_model(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(output / "eaft-seed0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = output / "eaft-seed0/checkpoints/step_000004"
    assert lines == how_to_use(Run(output / "eaft-seed0"))
    assert lines[:2] == [f"talk:   eaft chat {output / 'eaft-seed0'}", f"serve:  vllm serve {folder}"]
    assert lines[2] == "python: # weights in float32, as the base model's, the LoRA adapter merged into them"
    code = "\n".join(line.strip() for line in lines[3:]).replace("max_new_tokens=256", "max_new_tokens=3")
    exec(code, names := {})
    assert names["said"][0]["generated_text"][-1]["role"] == "assistant"


def test_an_export_is_copied_with_a_card_and_pushed_by_the_hubs_client(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, repo_id: str, **how: Any) -> str:
            calls.append(("create", {"repo_id": repo_id, **how}))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **how: Any) -> None:
            calls.append(("folder", how))

        def upload_file(self, **how: Any) -> None:
            calls.append(("file", how))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = str(output / "eaft-seed0")
    assert main(["export", run, "--out", str(tmp_path / "mine"), "--push", "me/mine"]) == 0
    assert "wrote https://hub/me/mine" in capsys.readouterr().out
    card = (tmp_path / "mine/README.md").read_text()
    assert "after 4 updates of `eaft` (eaft)" in card and "the LoRA adapter merged" in card
    assert [name for name, _ in calls] == ["create", "folder", "file"]
    assert calls[0][1] == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert calls[1][1]["folder_path"] == output / "eaft-seed0/checkpoints/step_000004"
    assert calls[2][1]["path_or_fileobj"].decode() == card
    assert main(["export", run, "--out", str(tmp_path / "mine")]) == 2
    assert "is never overwritten" in capsys.readouterr().err
    assert main(["export", run, "--step", "3"]) == 2 and "it has 4" in capsys.readouterr().err
    assert main(["export", run, "--public"]) == 2


def test_a_hub_that_cannot_be_reached_is_one_line(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests are offline."""
    assert main(["export", str(output / "eaft-seed0"), "--push", "me/mine"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("eaft: error: --push me/mine: ") and said.count("\n") == 1


RECIPE = """
model: {model}
output: {output}
device: cpu
data: {{train: {data}, heldout: {data}, max_length: 128}}
evaluate: {{drift: {{rows: 2, new_tokens: 4}}}}
arms: {{sft: {{objective: {{name: sft}}}}}}
"""


def test_a_model_is_evaluated_against_its_base_and_not_in_its_place(
    tmp_path: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    base, other = models
    data = tiny.write_sums(tmp_path / "sums.jsonl", 4, seed=3)
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=base, output=tmp_path / "out", data=data))
    recipe = ["--recipe", str(tmp_path / "r.yaml")]
    assert main(["evaluate", str(other), *recipe]) == 0
    (folder,) = (tmp_path / "out/models").iterdir()
    run = Run(folder)
    assert run.info["kind"] == "model" and run.info["model"] == str(other)
    assert not (tmp_path / "out/base").exists()
    drift = run.evals()[0]["drift"]["metrics"]["kl"]["score"]
    assert drift > 0.1  # both are random
    assert main(["evaluate", str(other), *recipe, "--base", str(other), "--out", str(tmp_path / "self")]) == 0
    assert Run(tmp_path / "self").info["kind"] == "base"
    assert Run(tmp_path / "self").evals()[0]["drift"]["metrics"]["kl"]["score"] == 0
    assert main(["evaluate", str(base), *recipe]) == 0 and Run(tmp_path / "out/base").info["kind"] == "base"

    answers = [json.loads(line) for line in (folder / "samples/step_000000/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all({"id", "prompt", "target", "response", "cut"} == row.keys() for row in answers)
    assert answers[0]["prompt"].startswith("What is ") and "####" in answers[0]["target"]

    capsys.readouterr()
    for useless in (recipe, ["--base", str(base)], ["--out", "x"], ["seed=1"]):
        assert main(["evaluate", str(folder), *useless]) == 2
        assert "where this has no effect" in capsys.readouterr().err
    assert main(["evaluate", str(folder)]) == 0  # all is there


def test_a_folders_runs_and_the_place_of_their_report(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [output / name for name in ("base", "eaft-seed0", "sft-seed0")]
    assert runs_of([output]) == runs and runs_of([runs[1]]) == [runs[1]]
    assert main(["report", str(output)]) == 2
    assert "none of its runs is evaluated yet (base, eaft-seed0, sft-seed0)" in capsys.readouterr().err
    for run in runs[:2]:
        Run(run).update(evaluated=True)
    assert runs_of([output], evaluated=True) == runs[:2]
    assert "not evaluated yet and left out: sft-seed0" in capsys.readouterr().err
    assert place_of(output, runs[1:]) == output / "report"
    (output / "report").mkdir()
    (output / "report/report.json").write_text(json.dumps({"seeds": {"eaft": [0], "sft": [0], "gone": [0]}}))
    assert place_of(output, runs[1:]) == output / "report"
    assert place_of(output, runs[1:2]) == output / "report-eaft-seed0"


def test_the_lines_can_be_typed_whatever_the_folder_is_called(output: Path) -> None:
    apart = output.rename(output.with_name("my runs"))
    talk, serve, *_ = how_to_use(Run(apart / "eaft-seed0"))
    assert shlex.split(talk)[1:] == ["eaft", "chat", str(apart / "eaft-seed0")]
    assert shlex.split(serve)[3] == str(apart / "eaft-seed0/checkpoints/step_000004")
