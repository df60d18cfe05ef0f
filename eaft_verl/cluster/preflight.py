"""The preflight's part that needs Ray: what the nodes offer, what they see, and whether the workers would find room."""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eaft_verl.cluster import findings as judge
from eaft_verl.cluster.demand import WAIT, Demand, Offer, demand_of
from eaft_verl.cluster.findings import Finding, node_findings, verdict
from eaft_verl.cluster.node_probe import NodeProbe, probe_node
from eaft_verl.cluster.session import ray_session
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.views import world_size

PLACEMENT_TIMEOUT_S = 20.0
PROBE_TIMEOUT_S = 60.0
SMALLER = "lower verl.trainer.nnodes or n_gpus_per_node, or add nodes; `eaft plan RECIPE` says what would fit"


def require_cluster(config: Config) -> None:
    """Raise ConfigError for what would stop the arm on the connected cluster; made before a worker is started."""
    judge.require(cluster_findings(config, float(os.environ.get(WAIT, 0))))


def connected_findings(config: Config, wait_s: float) -> list[Finding]:
    """`cluster_findings` over a connection of its own."""
    try:
        with ray_session(config.device, world_size(config)):
            return cluster_findings(config, wait_s)
    except (RayError, ConnectionError, RuntimeError) as error:
        remedy = "compare the Ray versions and RAY_AUTH_MODE of this machine and the cluster"
        return [Finding("ray connection", "fail", str(error).strip().splitlines()[0], remedy)]


def cluster_findings(config: Config, wait_s: float) -> list[Finding]:
    """Every check of the connected cluster; at most `wait_s` seconds are given to nodes that have yet to join."""
    demand = demand_of(config)
    shortage = demand.shortage_after(wait_s, lambda: [_offer(node) for node in _alive()])
    size = verdict("resources", shortage, f"{demand.nodes} x {demand.devices} x {demand.bundle}", SMALLER)
    if shortage is not None:
        return [size]
    alive = _alive()
    here = node_findings(config, probe_node(config.output)) if len(alive) == 1 else _nodes_findings(config, alive)
    return [size, *here, placement_finding(demand, PLACEMENT_TIMEOUT_S)]


def placement_finding(demand: Demand, timeout_s: float) -> Finding:
    """Whether the placement groups verl will ask for become ready beside its own actors, tried for real; verl itself
    waits for ever."""
    groups = [placement_group([{"CPU": 1.0}] * demand.beside(1), "SPREAD")] if demand.stores else []
    groups += [placement_group([demand.bundle] * demand.devices, "STRICT_PACK") for _ in range(demand.nodes)]
    until = time.monotonic() + timeout_s
    try:
        ready = [group.wait(max(0.1, until - time.monotonic())) for group in groups]
    finally:
        for group in groups:
            remove_placement_group(group)
    problem = None
    if not all(ready):
        free = {key: ray.available_resources().get(key, 0) for key in demand.bundle}
        problem = f"{sum(ready)} of {len(groups)} placement groups ready after {timeout_s:.0f} s; free now: {free}"
    return verdict("placement", problem, f"{demand.nodes} placement group(s) ready", "stop other jobs (`ray job list`)")


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _offer(node: dict[str, Any]) -> Offer:
    resources = node["Resources"]
    return Offer(node["NodeManagerHostname"], resources.get("CPU", 0), resources.get("GPU", 0))


def _nodes_findings(config: Config, alive: list[dict[str, Any]]) -> list[Finding]:
    """Checks by one task per node, the driver's node first."""
    token = secrets.token_hex(8)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    file = output / f".doctor-{token}"
    with _listener() as here:
        file.write_text(token, encoding="utf-8")
        try:
            probes, failures = _probe_all(alive, config.output, str(file), here)
        finally:
            file.unlink()
    if failures:
        remedy = "install eaft-verl on every node, or use one image; look into the node's Ray logs"
        return [Finding("nodes", "fail", "; ".join(failures), remedy)]
    own = probe_node(config.output)
    holding = [probe for probe in probes if probe.gpus >= config.verl.trainer.n_gpus_per_node]
    return [
        judge.same_versions([own, *probes]),
        judge.shared_file_system(probes, token, config.output),
        judge.ports(probes),
        *(found for probe in holding for found in node_findings(config, probe)),
    ]


def _probe_all(
    alive: list[dict[str, Any]], output: str, file: str, here: tuple[str, int]
) -> tuple[list[NodeProbe], list[str]]:
    """Answers of all nodes, and one line for each that gave none within the time limit."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    waiting = {}
    for node in alive:
        strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        waiting[task.options(scheduling_strategy=strategy).remote(output, file, here)] = node["NodeManagerHostname"]
    done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=PROBE_TIMEOUT_S)
    probes, failures = [], [f"{waiting[ref]}: no answer within {PROBE_TIMEOUT_S:.0f} s" for ref in late]
    for ref in done:
        try:
            probes.append(ray.get(ref))
        except RayError as error:
            failures.append(f"{waiting[ref]}: {str(error).strip().splitlines()[-1]}")
    return probes, failures


@contextlib.contextmanager
def _listener() -> Iterator[tuple[str, int]]:
    """A free port of this machine that accepts connections, as (address other nodes know, port)."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen(os.cpu_count() or 8)
        yield ray.util.get_node_ip_address(), server.getsockname()[1]
