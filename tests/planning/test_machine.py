"""What machine is planned for: kinds of GPU and their speeds, processors and memory of a container."""

import os
from pathlib import Path

import pytest

from eaft_verl.errors import ConfigError
from eaft_verl.planning import machine
from eaft_verl.planning.machine import Machine, cpus_here, kind_of, memory_here, parse_gpus
from eaft_verl.planning.speed import SPEED


@pytest.mark.parametrize(
    ("text", "count", "kind", "gib"),
    [
        ("2xRTX4090-24", 2, "RTX4090", 24.0),
        ("8xL40S-48", 8, "L40S", 48.0),
        ("8xh200-141", 8, "H200", 141.0),
        ("8xB200-180", 8, "B200", 180.0),
        ("8x80", 8, "A100", 80.0),
    ],
)
def test_kinds_of_gpu_are_read_and_have_a_speed(text: str, count: int, kind: str, gib: float) -> None:
    assert parse_gpus(text) == (count, kind, gib)
    assert SPEED[kind].source.startswith(kind)


@pytest.mark.parametrize("text", ["0x80", "2x", "xRTX4090-24", "2xRTX 4090-24", "2x24GB"])
def test_what_is_no_machine_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be GPUs per node x GiB"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("Tesla T4", "Tesla T4"),
    ],
)
def test_the_name_that_the_driver_gives_is_found_among_the_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_gpu_without_a_known_speed_is_planned_with_another_ones_and_that_is_said() -> None:
    speed = Machine(1, 1, 16.0, "Tesla T4", None).speed
    assert speed.flops == SPEED["A100"].flops and speed.source.startswith("Tesla T4 is not known here")


def test_peaks_are_those_of_the_data_sheets() -> None:
    """Dense bf16 TFLOP/s and TB/s: A100 312/2.0, H100 SXM 989/3.35, H200 989/4.8, B200 2250/8, L40S 362/0.864,
    RTX 4090 165.2/1.008."""
    told = {"A100": (312, 2.0), "H100": (989, 3.35), "H200": (989, 4.8), "B200": (2250, 8), "L40S": (362, 0.864)}
    told["RTX4090"] = (165, 1.008)
    for kind, expected in told.items():
        assert (SPEED[kind].peak / 1e12, SPEED[kind].memory / 1e12) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ({"cpu.max": "900000 100000"}, 6),
        ({}, 6),
    ],
)
def test_a_containers_quota_of_processors_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    assert cpus_here() == cpus


def test_a_containers_limit_of_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    whole = memory_here()
    (tmp_path / "memory.max").write_text(str(3 << 29))
    assert memory_here() == 1.5 < whole
