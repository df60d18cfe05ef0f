"""Models that do not fit their tokenizer, their data or the recipe."""

import json
import shutil
from pathlib import Path

from .matrix import Lab, Outcome, Seen, fault


def _copy(lab: Lab) -> Path:
    return Path(shutil.copytree(lab.model, lab.folder / "model"))


def _refused(seen: Seen, *words: str) -> Outcome:
    assert seen.code == 2 and "Traceback" not in seen.said, seen.said
    assert all(word in seen.last_line for word in words), seen.last_line
    return Outcome(f"exit 2: {seen.last_line[:160]}")


def _tokenizer(lab: Lab, *more: str) -> Path:
    from transformers import AutoTokenizer

    folder = _copy(lab)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(folder)
    return folder


@fault("data use a token that the embedding has no row for", "refused before Ray, both numbers and the token named")
def _added_token(lab: Lab) -> Outcome:
    folder = _tokenizer(lab, "<|tok_a|>")
    rows = [{"prompt": f"Say step {n}.", "response": f"<|tok_a|> step {n} done"} for n in range(8)]
    (lab.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return _refused(lab.train(f"model={folder}"), "385 tokens", "384 rows", "<|tok_a|>")


@fault("a folder without tokenizer", "one line, no traceback")
def _no_tokenizer(lab: Lab) -> Outcome:
    folder = _copy(lab)
    for file in folder.glob("*token*"):
        file.unlink()
    return _refused(lab.train(f"model={folder}"), "no tokenizer")


@fault("a hub id and no hub", "one line that says how to get it, in seconds")
def _no_hub(lab: Lab) -> Outcome:
    return _refused(lab.train("model=org/not-here", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE", "hf download")


@fault("an example longer than the model's positions", "refused before Ray, with the value to set")
def _positions(lab: Lab) -> Outcome:
    folder = _copy(lab)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 24}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return _refused(lab.train(f"model={folder}"), "24 positions", "data.max_length=24")


@fault("an adapter on the head, whose merge would lack it", "refused in a dry run")
def _adapter_on_head(lab: Lab) -> Outcome:
    overrides = ("verl.model.lora_rank=4", "verl.model.target_modules=[q_proj,lm_head]")
    return _refused(lab.train(*overrides, "--dry-run"), "lm_head", "would lack it")


@fault("generation_config.json that cannot be saved again", "said at the start, repaired in the export", slow=True)
def _generation_config(lab: Lab) -> Outcome:
    folder = _copy(lab)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 2}', encoding="utf-8")
    seen = lab.train(f"model={folder}")
    assert seen.code == 0 and "do_sample=true is added" in seen.said, seen.said
    stored = json.loads((lab.run / "checkpoints/step_000020/generation_config.json").read_text())
    assert stored["do_sample"] is True and stored["temperature"] == 0.6
    return Outcome("warned, trained, exported with do_sample")


@fault(
    "the last export cannot be written",
    "its state is kept: the same command exports it, no step is repeated",
    slow=True,
)
def _export_fails(lab: Lab) -> Outcome:
    blocked = lab.run / "checkpoints" / ".step_000020.partial"  # a link: neither removed as a folder nor made as one
    with lab.started("train", lab.recipe, "--arm", "eaft") as process:
        lab.wait_for_step(process, 12)
        blocked.symlink_to(lab.folder / "nowhere")
        process.wait(timeout=600)
    assert process.returncode != 0 and len(lab.rows()) == 20, lab.said(process)
    blocked.unlink()
    again = lab.train()
    assert again.code == 0, again.said
    lab.assert_exact()
    assert (lab.run / "checkpoints" / "step_000020" / "model.safetensors").exists()
    return Outcome("failed after step 20, exported by the next attempt", lost=0)


@fault("layers with state across rows (LFM2)", "padded instead of packed, said, and the self-check passes", slow=True)
def _stateful(lab: Lab) -> Outcome:
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    folder, sizes = _copy(lab), {"hidden_size": 64, "intermediate_size": 128, "block_ff_dim": 128, "vocab_size": 384}
    torch.manual_seed(0)
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Lfm2ForCausalLM(Lfm2Config(**sizes, **kinds, **heads, eos_token_id=2, pad_token_id=2)).save_pretrained(folder)
    seen = lab.train(f"model={folder}", "verl.trainer.total_epochs=1")
    assert seen.code == 0 and "layers of kind conv: rows are padded" in seen.said, seen.said
    info = json.loads((lab.run / "run.json").read_text())
    assert info["self_check"]["leak"] == 0.0 and info["self_check"]["difference"] < 1e-4
    return Outcome("padded, self-check exact")
