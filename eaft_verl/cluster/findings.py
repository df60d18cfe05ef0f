"""Judgements of a preflight: what the nodes said of themselves -> pass, fail or skip, each with its remedy."""

import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from eaft_verl.cluster.node_probe import PACKAGES, NodeProbe
from eaft_verl.errors import ConfigError
from eaft_verl.planning.formulas import GIB
from eaft_verl.recipe.config import Config

Status = Literal["pass", "fail", "skip"]
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # NVIDIA: minor version compatibility of CUDA 11, 12 and 13
SHM_PER_GPU = GIB  # bytes: NCCL's and the data loaders' segments
SHM_WEIGHTS = 8 * GIB  # bytes: two of verl's buckets of weights on their way to the rollout, 4 GiB each
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
    first = probes[0].versions
    wrong = [
        f"{probe.name}: {name} {probe.versions[name] or 'missing'} (driver: {first[name] or 'missing'})"
        for probe in probes[1:]
        for name in first
        if probe.versions[name] != first[name]
    ]
    good = f"{len(probes)} node(s): " + ", ".join(f"{name} {first[name]}" for name in ("python", *PACKAGES[1:5]))
    remedy = "install the same versions on every node, or use one image"
    return verdict("same versions", ", ".join(wrong) or None, good, remedy)


def required_versions(probe: NodeProbe) -> Finding:
    """Whether the installed packages are those this project is made for, by its own metadata."""
    python = importlib.metadata.metadata("eaft-verl")["Requires-Python"]
    wanted = [Requirement(f"python{python}"), *map(Requirement, importlib.metadata.requires("eaft-verl") or [])]
    wrong = []
    for one in wanted:
        ours = one.name in probe.versions and (one.marker is None or one.marker.evaluate({"extra": ""}))
        found = probe.versions.get(one.name)
        if ours and (found is None or not one.specifier.contains(found)):
            wrong.append(f"{one.name} {found or 'missing'} is not {one.specifier}")
    good = ", ".join(f"{name} {probe.versions[name]}" for name in ("python", "verl", "torch"))
    remedy = "make the environment with examples/setup.sh or docker/Dockerfile.gpu"
    return verdict("versions", ", ".join(wrong) or None, good, remedy)


def gpu_driver(probe: NodeProbe) -> Finding:
    """Whether the node's NVIDIA driver runs the CUDA that torch was built for."""
    problem, remedy = None, "check nvidia-smi on this node"
    if probe.driver is None:
        problem = "no NVIDIA driver answers"
    elif probe.cuda is None:
        problem = f"torch {probe.versions['torch']} is built without CUDA"
        remedy = "pip install the CUDA build: torch==2.11.0"
    else:
        oldest = OLDEST_DRIVER.get(int(probe.cuda.partition(".")[0]), max(OLDEST_DRIVER.values()))
        if int(probe.driver.partition(".")[0]) < oldest:
            problem = f"driver {probe.driver} is too old for CUDA {probe.cuda}"
            remedy = f"update the driver to {oldest} or newer, or install a torch built for an older CUDA"
    good = f"driver {probe.driver}, CUDA {probe.cuda}, {probe.gpus} GPUs"
    return verdict(f"driver {probe.name}", problem, good, remedy)


def flash_attention(probe: NodeProbe, attention: str) -> Finding:
    """Whether the attention the recipe asks for is installed."""
    missing = attention.startswith("flash_attention") and not probe.flash_attention
    problem = f"{attention} is asked for and flash-attn is not installed" if missing else None
    remedy = "pip install flash-attn==2.8.3 (Python 3.12), or set verl.model.override_config.attn_implementation=sdpa"
    return verdict(f"attention {probe.name}", problem, attention, remedy)


def shared_memory(probe: NodeProbe, gpus: int, *, rollout: bool) -> Finding:
    """Whether /dev/shm holds NCCL's segments and, with a rollout, the buckets of weights sent to it."""
    check, needed = f"/dev/shm {probe.name}", gpus * SHM_PER_GPU + (SHM_WEIGHTS if rollout else 0)
    if probe.shm is None:
        return Finding(check, "skip", "there is no /dev/shm here")
    found = f"{probe.shm / GIB:.1f} GiB"
    problem = f"{found}, {needed / GIB:.0f} needed" if probe.shm < needed else None
    remedy = f"docker: --shm-size={needed >> 30}g or --ipc=host; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    return verdict(check, problem, found, remedy)


def free_disk(free: float | None, needed: float | None, output: str, *, at_most: bool = False) -> Finding:
    """Whether `output` has room for what the arm writes at its peak; a bound from unprepared data refuses nothing."""
    if free is None:
        remedy = "mount the file system or change output="
        return Finding("disk", "fail", f"{output}: no part of this path exists", remedy)
    if needed is None:
        return Finding("disk", "skip", f"{free / GIB:.0f} GiB free; the sizes of this model are not known here")
    about = f"about {needed / GIB:.1f} GiB needed"
    if at_most and free < needed:
        left = f"{free / GIB:.1f} GiB free, {about} if every example has data.max_length tokens"
        return Finding("disk", "skip", f"{left}; judged once the data is prepared")
    problem = f"{free / GIB:.1f} GiB free at {output}, {about}" if free < needed else None
    remedy = "free space, lower verl.trainer.max_ckpt_to_keep, or choose another output="
    return verdict("disk", problem, f"{free / GIB:.0f} GiB free, {about}", remedy)


def shared_file_system(probes: Sequence[NodeProbe], token: str, output: str) -> Finding:
    """Whether every node read what the driver had just written into `output`."""
    blind = ", ".join(probe.name for probe in probes if probe.token != token)
    problem = f"{blind} cannot see what the driver writes to {output}" if blind else None
    remedy = "mount the same file system at the same path on every node, or choose another output="
    return verdict("shared file system", problem, f"{output} is seen by {len(probes)} node(s)", remedy)


def ports(probes: Sequence[NodeProbe]) -> Finding:
    """Whether every node opened a connection to a free port of the driver's node, as collectives will."""
    cut = ", ".join(probe.name for probe in probes if probe.reaches_driver is False)
    problem = f"{cut} cannot connect to a free port of the driver's node" if cut else None
    remedy = "open the TCP ports 1024-65535 between the nodes; gloo and NCCL choose among them"
    return verdict("ports", problem, f"{len(probes)} node(s) reach the driver's node", remedy)


def node_findings(config: Config, probe: NodeProbe) -> list[Finding]:
    """What a node that will hold workers must have on a CUDA cluster."""
    if config.device != "cuda":
        return []
    attention = (config.verl.model.override_config or {}).get("attn_implementation", "flash_attention_2")
    memory = shared_memory(probe, config.verl.trainer.n_gpus_per_node, rollout=config.trainer == "grpo")
    return [gpu_driver(probe), flash_attention(probe, attention), memory]


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
