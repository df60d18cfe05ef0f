"""Judgements of a preflight: what the nodes said of themselves -> pass, fail or skip, each with its remedy."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from packaging.requirements import Requirement

from eaft_verl.cluster.node_probe import PACKAGES, NodeProbe
from eaft_verl.errors import ConfigError

Status = Literal["pass", "fail", "skip"]
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # NVIDIA: minor version compatibility of CUDA 11, 12 and 13
SHM_PER_GPU = 1 << 30  # bytes: NCCL's and the data loaders' segments
SHM_WEIGHTS = 8 << 30  # bytes: two of verl's buckets of weights on their way to the rollout, 4 GiB each
GIB = 1 << 30
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True)
class Finding:
    """One line of a preflight."""

    check: str
    status: Status
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.check:20} {self.detail}" + (f"; {self.remedy}" if self.remedy else "")


def verdict(check: str, problem: str | None, good: str, remedy: str) -> Finding:
    """A failure that says `problem` and `remedy`, or a pass that says `good` where there is no problem."""
    return Finding(check, "pass", good) if problem is None else Finding(check, "fail", problem, remedy)


def require(findings: Iterable[Finding]) -> None:
    """Raise ConfigError with every failure, one per line."""
    failed = [finding for finding in findings if finding.status == "fail"]
    if failed:
        lines = "\n  ".join(f"{found.check}: {found.detail}; {found.remedy}" for found in failed)
        raise ConfigError(f"preflight failed ({len(failed)}):\n  {lines}")


def same_versions(probes: Sequence[NodeProbe]) -> Finding:
    """Whether every node has the driver's packages: Ray pickles objects between them."""
    first = probes[0]
    wrong = [
        f"{probe.name}: {name} {probe.versions[name] or 'missing'} (driver: {first.versions[name] or 'missing'})"
        for probe in probes[1:]
        for name in first.versions
        if probe.versions[name] != first.versions[name]
    ]
    return verdict(
        "same versions",
        ", ".join(wrong) or None,
        f"{len(probes)} node(s): " + ", ".join(f"{name} {first.versions[name]}" for name in ("python", *PACKAGES[1:5])),
        "install the same versions on every node, or use one image",
    )


def required_versions(probe: NodeProbe) -> Finding:
    """Whether the installed packages are those this project is made for, by its own metadata."""
    metadata = importlib.metadata.metadata("eaft-verl")
    wrong = []
    python = Requirement(f"python{metadata['Requires-Python']}")
    if not python.specifier.contains(str(probe.versions["python"])):
        wrong.append(f"python {probe.versions['python']} is not {python.specifier}")
    for text in importlib.metadata.requires("eaft-verl") or []:
        wanted = Requirement(text)
        found = probe.versions.get(wanted.name)
        ours = wanted.name in probe.versions and (wanted.marker is None or wanted.marker.evaluate({"extra": ""}))
        if ours and (found is None or not wanted.specifier.contains(found)):
            wrong.append(f"{wanted.name} {found or 'missing'} is not {wanted.specifier}")
    return verdict(
        "versions",
        ", ".join(wrong) or None,
        f"python {probe.versions['python']}, verl {probe.versions['verl']}, torch {probe.versions['torch']}",
        "make the environment with examples/setup.sh or docker/Dockerfile.gpu",
    )


def gpu_driver(probe: NodeProbe) -> Finding:
    """Whether the node's NVIDIA driver runs the CUDA that torch was built for."""
    if probe.driver is None:
        return Finding(f"driver {probe.name}", "fail", "no NVIDIA driver answers", "check nvidia-smi on this node")
    if probe.cuda is None:
        detail = f"torch {probe.versions['torch']} is built without CUDA"
        return Finding(f"driver {probe.name}", "fail", detail, "pip install the CUDA build: torch==2.11.0")
    major = int(probe.cuda.partition(".")[0])
    oldest = OLDEST_DRIVER.get(major, max(OLDEST_DRIVER.values()))
    old = int(probe.driver.partition(".")[0]) < oldest
    return verdict(
        f"driver {probe.name}",
        f"driver {probe.driver} is too old for CUDA {probe.cuda}" if old else None,
        f"driver {probe.driver}, CUDA {probe.cuda}, {probe.gpus} GPUs",
        f"update the driver to {oldest} or newer, or install a torch built for an older CUDA",
    )


def flash_attention(probe: NodeProbe, attention: str) -> Finding:
    """Whether the attention the recipe asks for is installed."""
    missing = attention.startswith("flash_attention") and not probe.flash_attention
    return verdict(
        f"attention {probe.name}",
        f"{attention} is asked for and flash-attn is not installed" if missing else None,
        attention,
        "pip install flash-attn==2.8.3 (Python 3.12), or set verl.model.override_config.attn_implementation=sdpa",
    )


def shared_memory(probe: NodeProbe, gpus: int, *, rollout: bool) -> Finding:
    """Whether /dev/shm holds NCCL's segments and, with a rollout, the buckets of weights sent to it."""
    check = f"/dev/shm {probe.name}"
    needed = gpus * SHM_PER_GPU + (SHM_WEIGHTS if rollout else 0)
    if probe.shm is None:
        return Finding(check, "skip", "there is no /dev/shm here")
    return verdict(
        check,
        f"{probe.shm / GIB:.1f} GiB, {needed / GIB:.0f} needed" if probe.shm < needed else None,
        f"{probe.shm / GIB:.1f} GiB",
        f"docker: --shm-size={needed >> 30}g or --ipc=host; Kubernetes: an emptyDir of medium Memory at /dev/shm",
    )


def free_disk(free: float | None, needed: float | None, output: str) -> Finding:
    """Whether `output` has room for what the arm writes at its peak."""
    if free is None:
        return Finding(
            "disk", "fail", f"{output}: no part of this path exists", "mount the file system or change output="
        )
    if needed is None:
        return Finding("disk", "skip", f"{free / GIB:.0f} GiB free; the sizes of this model are not known here")
    return verdict(
        "disk",
        f"{free / GIB:.1f} GiB free at {output}, about {needed / GIB:.1f} GiB needed" if free < needed else None,
        f"{free / GIB:.0f} GiB free, about {needed / GIB:.1f} GiB needed",
        "free space, lower verl.trainer.max_ckpt_to_keep, or choose another output=",
    )


def shared_file_system(probes: Sequence[NodeProbe], token: str, output: str) -> Finding:
    """Whether every node read what the driver had just written into `output`."""
    blind = [probe.name for probe in probes if probe.token != token]
    return verdict(
        "shared file system",
        f"{', '.join(blind)} cannot see what the driver writes to {output}" if blind else None,
        f"{output} is seen by {len(probes)} node(s)",
        "mount the same file system at the same path on every node, or choose another output=",
    )


def ports(probes: Sequence[NodeProbe]) -> Finding:
    """Whether every node opened a connection to a free port of the driver's node, as collectives will."""
    cut = [probe.name for probe in probes if probe.reaches_driver is False]
    return verdict(
        "ports",
        f"{', '.join(cut)} cannot connect to a free port of the driver's node" if cut else None,
        f"{len(probes)} node(s) reach the driver's node",
        "open the TCP ports 1024-65535 between the nodes; gloo and NCCL choose among them",
    )


def node_findings(config: DictConfig, probe: NodeProbe) -> list[Finding]:
    """What a node that will hold workers must have on a CUDA cluster."""
    if config.device != "cuda":
        return []
    attention = (config.verl.model.override_config or {}).get("attn_implementation", "flash_attention_2")
    gpus = config.verl.trainer.n_gpus_per_node
    return [
        gpu_driver(probe),
        flash_attention(probe, attention),
        shared_memory(probe, gpus, rollout=config.trainer == "grpo"),
    ]


def token_finding(environ: dict[str, str], host: str) -> Finding:
    """Whether this machine holds a token for a Ray that is not its own: whoever reaches one without can run code."""
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return Finding("ray token", "skip", "RAY_AUTH_MODE=disabled: whoever reaches the cluster can run code on it")
    if token_source(environ) is None and (mode == "token" or host not in LOOPBACK):
        remedy = (
            "`ray get-auth-token --generate` on the head and give it to every machine by RAY_AUTH_TOKEN_PATH, or, in a "
            "network that nobody else reaches, set RAY_AUTH_MODE=disabled everywhere"
        )
        return Finding("ray token", "fail", f"no token for {host}: neither RAY_AUTH_TOKEN, its path nor a file", remedy)
    return Finding("ray token", "pass", token_source(environ) or "none needed on this machine")


def token_source(environ: dict[str, str]) -> str | None:
    """Where Ray will find the token, in its own order; None where there is none."""
    if environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = environ.get("RAY_AUTH_TOKEN_PATH") or str(Path(environ.get("HOME", "~")).expanduser() / ".ray/auth_token")
    return path if Path(path).is_file() else None
