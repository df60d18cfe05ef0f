"""`eaft doctor`: everything that can be known before a model is loaded, one line each, with the remedy.

One list of checks with two callers: `doctor` prints all of them, `require_machine` raises for those of the machine.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from eaft_verl.boundary import in_cluster
from eaft_verl.cluster import findings as judge
from eaft_verl.cluster.demand import Offer, demand_of
from eaft_verl.cluster.findings import Finding, node_findings, token_finding, verdict
from eaft_verl.cluster.node_probe import NodeProbe, probe_node, reachable
from eaft_verl.errors import ConfigError
from eaft_verl.models import load_config, load_tokenizer, resolve_model
from eaft_verl.planning.amount import amount_of
from eaft_verl.planning.arm_plan import disk_at_once
from eaft_verl.recipe.checks import pending
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.model_fit import check_model_fits
from eaft_verl.runs import infos_in, run_name

CONNECT_TIMEOUT_S = 5.0
LOCAL_ADDRESSES = ("", "auto", "local")


def doctor(config: Config, *, wait_s: float = 0, say: Callable[[str], object] = print) -> int:
    """Print every finding of this machine and, where RAY_ADDRESS names one, of the cluster; 1 when a check fails."""
    started, found = time.monotonic(), []
    for finding in _findings(config, wait_s):
        say(str(finding))
        found.append(finding)
    checks = [finding for finding in found if finding.check != "cluster"]
    failed = sum(finding.status == "fail" for finding in checks)
    say(f"{len(checks)} checks, {failed} failed, {time.monotonic() - started:.1f} s")
    return 1 if failed else 0


def require_machine(config: Config) -> None:
    """Raise ConfigError for what would stop this arm on this machine; made before the data is read."""
    judge.require(machine_findings(config))


def _findings(config: Config, wait_s: float) -> Iterator[Finding]:
    machine = machine_findings(config)
    yield from machine
    yield from recipe_findings(config)
    yield model_finding(config)
    if any(found.status == "fail" and found.check.startswith("ray ") for found in machine):
        yield Finding("cluster", "skip", "not asked: it cannot be reached")
    elif in_cluster():
        from eaft_verl.cluster.preflight import connected_findings  # Ray takes a second to import

        yield from connected_findings(config, wait_s)
    else:
        yield from local_findings(config, probe_node(config.output))


def machine_findings(config: Config) -> list[Finding]:
    """What the driver's machine can tell at once: versions, output folder, disk, Ray's address and token."""
    probe = probe_node(config.output)
    return [
        judge.required_versions(probe),
        output_finding(config),
        disk_finding(config, probe.free),
        *address_findings(dict(os.environ)),
    ]


def disk_finding(config: Config, free: float | None) -> Finding:
    """Whether the arm has room; judged by its prepared data, of which there may be a tenth of what a recipe allows."""
    needed = disk_needed(config)
    short = free is not None and needed is not None and free < needed
    at_most = short and bool(config.data.train) and not amount_of(config).prepared
    return judge.free_disk(free, needed, config.output, at_most=at_most)


def require_disk(config: Config) -> None:
    """Raise ConfigError where the arm has no room; made once the data is prepared."""
    judge.require([disk_finding(config, probe_node(config.output).free)])


def disk_needed(config: Config) -> float | None:
    """Bytes the planner says the arm has yet to write; None for a model whose sizes it does not know."""
    run = Path(config.output) / run_name(config.arm, config.seed)
    written = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    try:
        return max(0.0, disk_at_once(config) - written)
    except ConfigError:
        return None


def local_findings(config: Config, probe: NodeProbe) -> list[Finding]:
    """What a cluster of this one machine offers the arm."""
    demand = demand_of(config)
    # a local Ray is started with at least as many logical CPUs as are asked for
    cpus = max(probe.cpus, demand.nodes * demand.cpus + demand.beside(1))
    shortage = demand.shortage([Offer(probe.name, cpus, probe.gpus)])
    if demand.nodes > 1:
        shortage = f"verl.trainer.nnodes={demand.nodes} and this is one machine"
    remedy = "lower verl.trainer.nnodes or n_gpus_per_node, or set RAY_ADDRESS to a cluster"
    good = "; ".join([f"{demand.devices} x {demand.bundle}", *idle_gpus(config, probe.gpus)])
    return [verdict("resources", shortage, good, remedy), *node_findings(config, probe)]


def idle_gpus(config: Config, visible: int) -> list[str]:
    """What to set where this machine shows more GPUs than the arm uses; nothing where all are used, or a cluster."""
    used = config.verl.trainer.n_gpus_per_node if config.device == "cuda" else 0
    if visible <= used or in_cluster():
        return []
    how = f"verl.trainer.n_gpus_per_node={visible}" + " device=cuda" * (config.device != "cuda")
    return [f"{visible} GPUs are visible and {used} used: {how} uses all"]


def output_finding(config: Config) -> Finding:
    """Whether `output` outlives the job and belongs to this recipe."""
    output, problem, remedy = Path(config.output), None, "choose another output="
    others = {str(info.get("recipe")) for info in infos_in(output)} - {config.name}
    if output.exists() and not (output.is_dir() and os.access(output, os.W_OK)):
        problem = f"{output} is not a folder that can be written"
    elif "runtime_resources" in output.parts:
        problem = f"{output} lies in Ray's package cache, which Ray deletes"
        remedy = "give an absolute path that every node sees: output=/shared/runs/NAME"
    elif others:
        problem = f"{output} holds runs of recipe {', '.join(sorted(others))}, this one is {config.name}"
    return verdict("output", problem, str(output), remedy)


def recipe_findings(config: Config) -> list[Finding]:
    """What the recipe still waits for: files to be supplied, benchmarks whose runner is not installed here."""
    missing = [Finding("recipe", "fail", message) for message in pending(config, contents=True)]
    return missing or [Finding("recipe", "pass", f"{config.recipe}, arm {config.arm}")]


def model_finding(config: Config) -> Finding:
    """Whether configuration and tokenizer load, with a chat template, and fit each other and the recipe."""
    try:
        model = resolve_model(config.model)
        notes = check_model_fits(config)
        kind, tokenizer = load_config(model).model_type, load_tokenizer(model)
    except ConfigError as error:
        remedy = "give a model folder that every node sees"
        return Finding("model", "fail", f"{config.model}: {str(error).splitlines()[0]}", remedy)
    problem = None if tokenizer.chat_template else f"{config.model} has no chat template"
    good = "; ".join([f"{config.model}: {kind}, {len(tokenizer)} tokens", *notes])
    return verdict("model", problem, good, "choose an instruct model")


def address_findings(environ: dict[str, str]) -> list[Finding]:
    """Whether the cluster of RAY_ADDRESS answers, and whether its token is here; nothing without RAY_ADDRESS."""
    address = environ.get("RAY_ADDRESS", "")
    if address in LOCAL_ADDRESSES:
        return []
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        remedy = "write HOST:PORT, as `ray start --head` prints it"
        return [Finding("ray address", "fail", f"RAY_ADDRESS={address!r} is not HOST:PORT", remedy)]
    good = reachable(host.strip("[]"), int(port), CONNECT_TIMEOUT_S)
    problem = None if good else f"RAY_ADDRESS={address} does not answer within {CONNECT_TIMEOUT_S:.0f} s"
    remedy = "start the cluster (`ray start --head`), correct RAY_ADDRESS, or open an SSH tunnel"
    return [verdict("ray address", problem, address, remedy), token_finding(environ, host)]
