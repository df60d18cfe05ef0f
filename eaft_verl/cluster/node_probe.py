"""What one machine says of itself. Plain Python: it runs on every node of a cluster before torch is imported there."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from eaft_verl.planning.machine import cpus_here, gpus_here

PACKAGES = ("eaft-verl", "verl", "torch", "transformers", "ray", "tensordict")


@dataclass(frozen=True)
class NodeProbe:
    """One node's answers. `token`: what it read from the token file, None where the file is not there.

    free and shm: bytes. driver: of the NVIDIA GPUs, cuda: the version torch was built for, both None without.
    """

    name: str
    versions: dict[str, str | None]
    cpus: int
    gpus: int
    driver: str | None
    cuda: str | None
    flash_attention: bool
    free: int | None
    shm: int | None
    token: str | None
    reaches_driver: bool | None


def probe_node(output: str, token_file: str | None = None, driver: tuple[str, int] | None = None) -> NodeProbe:
    """Look at this machine: disk at `output`, the token another node wrote, the way to the driver's (host, port)."""
    gpus = gpus_here()
    return NodeProbe(
        name=socket.gethostname(),
        versions={"python": ".".join(platform.python_version_tuple()[:2]), **{p: version_of(p) for p in PACKAGES}},
        cpus=cpus_here(),
        gpus=len(gpus),
        driver=gpus[0].driver if gpus else None,
        cuda=cuda_of_torch(),
        flash_attention=importlib.util.find_spec("flash_attn") is not None,
        free=free_bytes(Path(output)),
        shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        token=Path(token_file).read_text("utf-8") if token_file and os.access(token_file, os.R_OK) else None,
        reaches_driver=None if driver is None else reachable(*driver, timeout=5),
    )


def free_bytes(path: Path) -> int | None:
    """Free bytes of the file system on which `path` is or would be; None where nothing of it exists."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return None


def reachable(host: str, port: int, timeout: float) -> bool:
    """Whether a TCP connection to host:port opens within `timeout` seconds."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def cuda_of_torch() -> str | None:
    """CUDA version that torch was built for, from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"""^cuda\b[^=]*=\s*['"]([\d.]+)['"]""", text, re.MULTILINE)
    return found[1] if found else None


def version_of(package: str) -> str | None:
    """The installed version; None where the package is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
