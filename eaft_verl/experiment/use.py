"""What a trained model is good for: its folder, the lines that load and serve it, its way to a hub."""

import shlex
import shutil
from pathlib import Path
from typing import Any

from eaft_verl.errors import RunError
from eaft_verl.evaluation.model_files import check_model_files
from eaft_verl.files import new_folder, read_json
from eaft_verl.runs import Run, step_name

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{base} after {step} updates of `{arm}` ({objective}), trained with [eaft-verl]; recipe `{recipe}`, seed {seed}.
Weights in {dtype}{merged}.
"""


def last_export(run: Run, step: int | None = None) -> Path:
    """The Hugging Face folder of a run's last step, or of `step`; RunError where there is none."""
    found = run.checkpoints()
    if not found or (step is not None and step not in found):
        there = ", ".join(map(str, found)) or "none"
        raise RunError(
            f"{run.path} has no export of {'any step' if step is None else f'step {step}'}; it has {there}"
            + ("; states to resume are listed by `eaft checkpoints`" if run.info["status"] != "finished" else "")
        )
    return found[max(found) if step is None else step]


def how_to_use(run: Run, step: int | None = None) -> list[str]:
    """Lines to print when a model is trained: talk to it, serve it, load it."""
    folder = last_export(run, step)
    return [
        f"talk:   {shlex.join(['eaft', 'chat', str(run.path)])}",
        f"serve:  {shlex.join(['vllm', 'serve', str(folder)])}",
        f"python: # weights in {_dtype(folder)}, as the base model's{_merged(run)}",
        "  from transformers import pipeline",
        f'  chat = pipeline("text-generation", {str(folder)!r})',
        '  said = chat([{"role": "user", "content": "Hello!"}], max_new_tokens=256, do_sample=False)',
        '  print(said[0]["generated_text"][-1]["content"])',
    ]


def export(run: Run, step: int | None, out: Path | None, push: str | None, *, public: bool = False) -> str:
    """Copy a run's export to `out` or push it to a hub's repository; where it is now.

    RunError for an `out` that exists, or for what the hub refuses.
    """
    folder = last_export(run, step)
    check_model_files(folder)
    card = model_card(run, folder)
    if out is not None:
        if out.exists():
            raise RunError(f"{out} exists and is never overwritten; give another --out")
        with new_folder(out) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
            (partial / "README.md").write_text(card, encoding="utf-8")
    return _pushed(folder, card, push, public=public) if push else str(out or folder)


def _pushed(folder: Path, card: str, repository: str, *, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        url = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{folder.name} by eaft-verl")
        hub.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"--push {repository}: {cause}; `hf auth login` first, and name ORG/NAME that you own") from None
    return str(url)


def model_card(run: Run, folder: Path) -> str:
    """README.md of a pushed model: where it comes from."""
    info, config = run.info, run.config
    step = next(number for number, found in run.checkpoints().items() if step_name(number) == folder.name)
    objective = (config.get("objective") or {}).get("name") or "rewards"
    said = {key: info.get(key) for key in ("arm", "recipe", "seed")}
    name = f"{Path(str(info['model'])).name}-{info['arm']}"
    return CARD.format(
        base=info["model"], name=name, step=step, objective=objective, dtype=_dtype(folder), merged=_merged(run), **said
    )


def _dtype(folder: Path) -> str:
    config: dict[str, Any] = read_json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "the model's own dtype")


def _merged(run: Run) -> str:
    rank = run.config.get("verl", {}).get("model", {}).get("lora_rank", 0)
    return ", the LoRA adapter merged into them" if rank else ""
