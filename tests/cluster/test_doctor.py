"""The preflight on one machine: what it finds, what it says to do, and what stops before work starts."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from config_fixtures import composed_once  # noqa: F401
from omegaconf import DictConfig, OmegaConf

from eaft_verl.cli import main
from eaft_verl.cluster import doctor as doctor_module
from eaft_verl.cluster import findings as judge
from eaft_verl.cluster.doctor import (
    address_findings,
    doctor,
    idle_gpus,
    local_findings,
    output_finding,
    require_machine,
)
from eaft_verl.cluster.findings import node_findings
from eaft_verl.cluster.node_probe import NodeProbe, cuda_of_torch, free_bytes, probe_node
from eaft_verl.errors import ConfigError
from eaft_verl.recipe.resolve import load_recipe, resolve

GIB = 1 << 30
RECIPE = """
model: {model}
output: {folder}/out
device: cpu
data: {{train: {train}, max_length: 128}}
evaluate: {{target: [sums]}}
verl: {{data: {{train_batch_size: 4, max_token_len_per_gpu: 256}}}}
arms:
  sft: {{objective: {{name: sft}}}}
"""
VERSIONS = {"python": "3.12", "eaft-verl": "0.1.0", "verl": "0.9.1", "torch": "2.11.0", "transformers": "5.9.0"}
VERSIONS |= {"ray": "2.60.0", "tensordict": "0.10.0"}
NODE = NodeProbe("n0", VERSIONS, 64, 8, "580.65.06", "13.0", True, 1000 * GIB, 64 * GIB, "token", True)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_path: Path) -> Path:
    train = tiny.write_sums(tmp_path / "train.jsonl", 8, seed=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model_path, folder=tmp_path, train=train))
    return path


def config(recipe: Path, *overrides: str) -> DictConfig:
    return resolve(load_recipe(recipe), "sft", overrides)


def test_a_sound_recipe_passes_line_by_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(recipe)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        *(["pass", name] for name in ("versions", "output", "disk", "recipe", "model", "resources"))
    ]
    assert lines[-1].startswith("6 checks, 0 failed")


def test_every_failure_has_its_line_and_a_remedy(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["device=cuda", "verl.trainer.n_gpus_per_node=2", "data.heldout=/nowhere/x.jsonl"]
    assert main(["doctor", str(recipe), *wanted]) == 1
    out = capsys.readouterr().out
    assert "fail  recipe               data.heldout='/nowhere/x.jsonl' does not exist" in out
    assert "no NVIDIA driver answers; check nvidia-smi" in out
    assert "needs 1 node(s) with 2 CPUs and 2 GPUs; 0 of 1 found" in out
    assert "set RAY_ADDRESS to a cluster" in out


def test_a_bound_from_unprepared_data_refuses_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """19,000 unprepared rows with a stored reference would need 160 GB if each had data.max_length tokens."""
    monkeypatch.setattr(doctor_module, "disk_needed", lambda config: 1e18)
    require_machine(config(recipe))
    unprepared = doctor_module.amount_of(config(recipe))
    assert not unprepared.prepared
    known = dataclasses.replace(unprepared, prepared=True)
    monkeypatch.setattr(doctor_module, "amount_of", lambda config: known)
    with pytest.raises(ConfigError, match="disk: .* GiB free at"):
        doctor_module.require_disk(config(recipe))


def test_the_drivers_part_takes_a_fraction_of_a_second(recipe: Path) -> None:
    """About as long as the recipe takes to be read, on whatever machine."""

    def seconds(work: Callable[[], object]) -> float:
        started = time.monotonic()
        work()
        return time.monotonic() - started

    found = config(recipe)
    require_machine(found)
    least = min(seconds(lambda: require_machine(found)) for _ in range(5))
    assert least < 10 * min(seconds(lambda: config(recipe)) for _ in range(5))


def test_what_training_asks_before_it_starts_loads_nothing_heavy(recipe: Path) -> None:
    code = (
        "import sys; from eaft_verl.recipe.resolve import load_recipe, resolve; "
        "from eaft_verl.cluster.doctor import require_machine;"
        f"require_machine(resolve(load_recipe({str(recipe)!r}), 'sft'));"
        "sys.exit(bool({'torch', 'ray', 'verl', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# output


def test_an_output_folder_with_runs_of_another_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "out" / "sft-seed0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"recipe": "recipe"}))
    assert output_finding(config(recipe)).status == "pass"
    (run / "run.json").write_text(json.dumps({"recipe": "theirs"}))
    with pytest.raises(ConfigError, match="holds runs of recipe theirs, this one is recipe; choose another output="):
        require_machine(config(recipe))


def test_an_output_in_rays_package_cache_is_refused(recipe: Path) -> None:
    cache = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/mine"
    found = output_finding(config(recipe, f"output={cache}"))
    assert found.status == "fail" and "which Ray deletes" in found.detail and "/shared/" in found.remedy


def test_an_output_that_is_a_file_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "not a folder that can be written" in output_finding(config(recipe)).detail


def test_free_disk_is_asked_of_the_folder_that_will_hold_the_output(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.05)
    assert judge.free_disk(5 * GIB, 6 * GIB, "/x").status == "fail"
    assert judge.free_disk(6 * GIB, 6 * GIB, "/x").status == "pass"
    assert judge.free_disk(6 * GIB, None, "/x").status == "skip"
    bound = judge.free_disk(5 * GIB, 6 * GIB, "/x", at_most=True)
    assert bound.status == "skip" and "judged once the data is prepared" in bound.detail
    assert judge.free_disk(6 * GIB, 6 * GIB, "/x", at_most=True).status == "pass"


def test_a_run_half_done_needs_only_the_rest_of_its_disk(recipe: Path, tmp_path: Path) -> None:
    found = config(recipe)
    whole = doctor_module.disk_needed(found)
    (tmp_path / "out" / "sft-seed0").mkdir(parents=True)
    (tmp_path / "out" / "sft-seed0" / "shard").write_bytes(bytes(1000))
    assert doctor_module.disk_needed(found) == whole - 1000


# Ray's address and token


@pytest.fixture
def port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def statuses(environ: dict[str, str]) -> dict[str, str]:
    return {found.check: found.status for found in address_findings(environ)}


def test_without_an_address_nothing_is_asked() -> None:
    for address in ({}, {"RAY_ADDRESS": ""}, {"RAY_ADDRESS": "auto"}, {"RAY_ADDRESS": "local"}):
        assert address_findings(address) == []


def test_an_address_that_does_not_answer_is_refused_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "CONNECT_TIMEOUT_S", 0.5)
    started = time.monotonic()
    found = address_findings({"RAY_ADDRESS": "192.0.2.250:6379", "RAY_AUTH_MODE": "disabled"})  # RFC 5737: nobody's
    assert time.monotonic() - started < 30  # the kernel would try for two minutes
    assert found[0].status == "fail" and "does not answer within" in found[0].detail
    assert "ray start --head" in found[0].remedy


@pytest.mark.parametrize("address", ["head", "head:", "head:port", "ray://head"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    assert statuses({"RAY_ADDRESS": address}) == {"ray address": "fail"}


def test_a_token_is_wanted_where_token_mode_is_on(port: int, tmp_path: Path) -> None:
    environ = {"RAY_ADDRESS": f"127.0.0.1:{port}", "HOME": str(tmp_path)}
    assert statuses(environ) == {"ray address": "pass", "ray token": "pass"}  # this machine's own Ray
    environ["RAY_AUTH_MODE"] = "token"
    assert statuses(environ)["ray token"] == "fail"
    assert statuses({**environ, "RAY_AUTH_TOKEN": "x"})["ray token"] == "pass"
    assert statuses({**environ, "RAY_AUTH_MODE": "disabled"})["ray token"] == "skip"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    assert statuses(environ)["ray token"] == "pass"
    assert statuses({**environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")})["ray token"] == "fail"


def test_another_machines_cluster_wants_a_token_without_being_told(tmp_path: Path) -> None:
    found = doctor_module.token_finding({"HOME": str(tmp_path)}, "10.0.0.7")
    assert found.status == "fail" and "no token for 10.0.0.7" in found.detail and "RAY_AUTH_MODE" in found.remedy


def test_no_value_of_a_token_is_ever_shown(port: int) -> None:
    found = address_findings({"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_TOKEN": "s3cr3t"})
    assert "s3cr3t" not in "".join(map(str, found))


# judgements over nodes


def test_nodes_must_have_the_drivers_versions() -> None:
    other = replace(NODE, name="n1", versions={**VERSIONS, "torch": "2.13.0", "verl": None})
    assert judge.same_versions([NODE, NODE]).status == "pass"
    found = judge.same_versions([NODE, other])
    assert "n1: verl missing (driver: 0.9.1), n1: torch 2.13.0 (driver: 2.11.0)" in found.detail


def test_the_versions_of_the_projects_own_metadata_are_required() -> None:
    good = probe_node("/tmp")
    assert judge.required_versions(good).status == "pass"
    for name, bad in (("python", "3.13"), ("verl", "0.9.0"), ("transformers", "5.6.0"), ("tensordict", None)):
        found = judge.required_versions(replace(good, versions={**good.versions, name: bad}))
        assert found.status == "fail" and f"{name} {bad or 'missing'} is not" in found.detail


@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        ("580.65.06", "13.0", ""),
        ("575.57.08", "13.0", "driver 575.57.08 is too old for CUDA 13.0"),
        ("535.104.05", "12.4", ""),
        ("520.61.05", "12.4", "too old for CUDA 12.4"),
        ("590.1", "14.0", ""),  # unknown: as the newest known
        (None, "13.0", "no NVIDIA driver answers"),
        ("580.65.06", None, "built without CUDA"),
    ],
)
def test_driver_and_cuda(driver: str | None, cuda: str | None, problem: str) -> None:
    found = judge.gpu_driver(replace(NODE, driver=driver, cuda=cuda))
    assert found.status == ("fail" if problem else "pass") and problem in found.detail


def test_attention_and_shared_memory_of_a_gpu_node(recipe: Path) -> None:
    cuda = config(recipe, "device=cuda", "verl.trainer.n_gpus_per_node=8", "verl.data.train_batch_size=8")
    bare = replace(NODE, flash_attention=False, shm=2 * GIB)
    assert [found.status for found in node_findings(cuda, NODE)] == ["pass", "pass", "pass"]
    assert [found.status for found in node_findings(cuda, bare)] == ["pass", "fail", "fail"]
    sdpa = config(
        recipe,
        *("device=cuda", "verl.trainer.n_gpus_per_node=8", "verl.data.train_batch_size=8"),
        "verl.model.override_config.attn_implementation=sdpa",
    )
    assert node_findings(sdpa, bare)[1].status == "pass"
    assert judge.shared_memory(replace(NODE, shm=15 * GIB), 8, rollout=True).status == "fail"  # 8 and 2 buckets of 4
    assert judge.shared_memory(replace(NODE, shm=16 * GIB), 8, rollout=True).status == "pass"


def test_more_nodes_than_this_machine_are_refused_without_a_cluster(recipe: Path) -> None:
    found = local_findings(config(recipe, "verl.trainer.nnodes=2"), NODE)
    assert found[0].status == "fail" and "this is one machine" in found[0].detail


def test_shared_file_system_and_ports() -> None:
    blind = replace(NODE, name="n1", token=None, reaches_driver=False)
    assert judge.shared_file_system([NODE, NODE], "token", "/out").status == "pass"
    assert (
        "n1 cannot see what the driver writes to /out"
        in judge.shared_file_system([NODE, blind], "token", "/out").detail
    )
    assert judge.ports([NODE, NODE]).status == "pass" and "n1" in judge.ports([NODE, blind]).detail


def test_cuda_is_read_from_torchs_version_file() -> None:
    import torch

    assert cuda_of_torch() == torch.version.cuda


def test_an_unreachable_cluster_ends_the_questions(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    lines: list[str] = []
    assert doctor(config(recipe), say=lambda line: lines.append(str(line))) == 1
    assert any(line.startswith("skip  cluster") for line in lines)


@pytest.mark.parametrize(
    ("device", "used", "visible", "said"),
    [
        ("cuda", 1, 8, ["8 GPUs are visible and 1 used: verl.trainer.n_gpus_per_node=8 uses all"]),
        ("cuda", 8, 8, []),
        ("cpu", 1, 2, ["2 GPUs are visible and 0 used: verl.trainer.n_gpus_per_node=2 device=cuda uses all"]),
        ("cpu", 1, 0, []),
    ],
)
def test_gpus_that_nobody_uses_are_said(
    monkeypatch: pytest.MonkeyPatch, device: str, used: int, visible: int, said: list[str]
) -> None:
    config: Any = OmegaConf.create({"device": device, "verl": {"trainer": {"n_gpus_per_node": used}}})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert idle_gpus(config, visible) == said
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert idle_gpus(config, visible) == []  # the cluster's are another matter
