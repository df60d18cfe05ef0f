"""Models with files that are missing, cut off, of another kind or hostile."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from eaft_verl.evaluation.model_files import write_checksums

from .matrix import Lab, Outcome, fault

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def copied(lab: Lab, name: str = "broken") -> Path:
    """A copy of the laboratory's model to damage, new each time."""
    shutil.rmtree(lab.folder / name, ignore_errors=True)
    return Path(shutil.copytree(lab.model, lab.folder / name))


def change(folder: Path, act: Callable[[dict[str, Any]], object]) -> Path:
    """The folder, its weights changed."""
    state = load_file(folder / ONE)
    act(state)
    save_file(state, folder / ONE, metadata={"format": "pt"})
    return folder


def refused_everywhere(lab: Lab, model: Path, *said: str) -> None:
    """Training and evaluation end with the same line, before Ray and without a run."""
    lab.train(f"model={model}").refused(*said)
    lab.eaft("evaluate", model, "--recipe", lab.recipe, "--out", lab.folder / "scores").refused(*said)
    assert not lab.run.exists() and not (lab.folder / "scores").exists()


@fault("model.safetensors lacks a tensor", "train and evaluate refuse and name it: it would be a random layer")
def _lacks_a_tensor(lab: Lab) -> Outcome:
    model = change(copied(lab), lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    refused_everywhere(lab, model, "lacks weights that its config.json describes: model.layers.1.mlp.up_proj.weight")
    return Outcome("exit 2, the tensor is named")


@fault("a tensor has another shape", "train and evaluate refuse and name it")
def _other_shape(lab: Lab) -> Outcome:
    model = change(
        copied(lab), lambda state: state.update({"model.norm.weight": state["model.norm.weight"][:9].clone()})
    )
    refused_everywhere(lab, model, "model.norm.weight is [9], not [64]")
    return Outcome("exit 2, both shapes are named")


@fault(
    "weights are cut off, empty, a git-lfs pointer, gone, or lack a shard",
    "one line names the file, before Ray",
    slow=True,
)
def _weight_files(lab: Lab) -> Outcome:
    whole = (lab.model / ONE).read_bytes()
    for content, said in (
        (whole[:-999], "model.safetensors is damaged"),
        (b"", "model.safetensors is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "model.safetensors is damaged"),
        (None, "has no weights"),
    ):
        model = copied(lab)
        (model / ONE).unlink()
        if content is not None:
            (model / ONE).write_bytes(content)
        lab.train(f"model={model}").refused(said, "again")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    lab.train(f"model={model}").refused("lacks 1 of 1 files", "model-00001-of-00002.safetensors")
    (model / INDEX).write_text("{")
    lab.train(f"model={model}").refused(f"{INDEX} is damaged")
    return Outcome("exit 2, the file is named")


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@fault("pytorch_model.bin is a pickle that runs code", "refused; nothing is run")
def _pickle(lab: Lab) -> Outcome:
    model = copied(lab)
    (model / ONE).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(lab.folder / "RAN")))
    refused_everywhere(lab, model, "pytorch_model.bin is damaged or no weight file", "is never run")
    assert not (lab.folder / "RAN").exists()
    return Outcome("exit 2, not run")


@fault(
    "tokenizer.json or config.json is cut off, empty or no JSON",
    "one line names the model and what it lacks",
    slow=True,
)
def _companions(lab: Lab) -> Outcome:
    for name in ("tokenizer.json", "config.json"):
        for content in (b"", b"[", (lab.model / name).read_bytes()[:-99]):
            model = copied(lab)
            (model / name).write_bytes(content)
            lab.train(f"model={model}").refused("broken", name)
    return Outcome("exit 2")


@fault("the anchor's reference lacks a tensor", "refused like the model itself")
def _reference(lab: Lab) -> Outcome:
    model = change(copied(lab), lambda state: state.pop("model.norm.weight"))
    anchor = f"{{kind: forward_kl, coef: 0.5, reference: {model}}}"
    lab.train(f"objective.anchor={anchor}").refused("broken", "model.norm.weight")
    return Outcome("exit 2")


@fault("model is a file, a folder without config.json, an empty folder, nothing", "one line at the dry run")
def _no_model(lab: Lab) -> Outcome:
    (lab.folder / "empty").mkdir()
    for name, said in (
        (lab.folder / "train.jsonl", "is not a folder here"),
        (lab.folder / "empty", "is a folder without config.json"),
        (lab.folder / "none", "is not a folder here"),
    ):
        lab.train(f"model={name}", "--dry-run").refused(said)
        lab.eaft("evaluate", name, "--recipe", lab.recipe).refused(said)
    return Outcome("exit 2")


@fault("a hub id without a hub", "one line in seconds")
def _no_hub(lab: Lab) -> Outcome:
    seen = lab.train("model=nobody/has-this", HF_HUB_OFFLINE="1")
    seen.refused("nobody/has-this")
    return Outcome("exit 2")


@fault("flipped bits in a shard of an export", "train, evaluate and chat name the file; put back, it is used")
def _altered_export(lab: Lab) -> Outcome:
    export = copied(lab, "export")
    write_checksums(export)
    whole = (export / ONE).read_bytes()
    half = len(whole) // 2
    (export / ONE).write_bytes(
        whole[:half] + bytes(byte ^ 1 for byte in whole[half : half + 100]) + whole[half + 100 :]
    )
    refused_everywhere(lab, export, f"{ONE} is not as it was exported")
    chat = ("chat", export, "--prompt", "hi", "--new-tokens", "1")
    lab.eaft(*chat).refused(f"{ONE} is not as it was exported")
    (export / ONE).write_bytes(whole)
    assert lab.eaft(*chat).code == 0
    return Outcome("exit 2, the file is named")
