"""`eaft launch --on ray`: submit to a running cluster, follow the log, leave the job running on Ctrl-C."""

import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.common import NodeState

from eaft_verl.boundary import looks_secret, run_async
from eaft_verl.cluster.demand import Offer, demand_of
from eaft_verl.cluster.doctor import CONNECT_TIMEOUT_S
from eaft_verl.cluster.findings import require, token_finding
from eaft_verl.cluster.node_probe import reachable
from eaft_verl.cluster.runtime_env import JOB_ENV, asked_variables, build_runtime_env, held_back, package, untracked
from eaft_verl.cluster.session import want_token
from eaft_verl.errors import SAVED, ConfigError, RunError
from eaft_verl.launch.request import Launch
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.file import recipe_files

DASHBOARD = "http://127.0.0.1:8265"
AGENT_TIMEOUT_S = 60.0  # the job agent answers some seconds after `ray start` has returned
LISTING_DELAY_S = 10.0  # a node is listed by the dashboard some seconds after it has joined
OUTPUT = "eaft_output"  # in a job's metadata


def run_job(wanted: Launch, config: Config, name: str, *, dry_run: bool) -> int:
    """Submit and follow; 0 when the job succeeded, 75 when it was stopped, 1 when it failed."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    command = shlex.join(["python", "-m", "eaft_verl.cli", "launch", *wanted.words(), "--on", "local"])
    runtime_env = build_runtime_env(os.environ, defaults=JOB_ENV, asked=asked_variables(wanted.env, os.environ))
    with tempfile.TemporaryDirectory() as folder:
        needed = [os.path.relpath(file) for file in recipe_files(Path(wanted.recipe))]
        archive = package(Path.cwd(), Path(folder) / "code.zip", needed=needed)
        print(f"address: {address}\njob: {name}\ncommand: {command}")
        print(f"package: {Path.cwd()}, {archive.stat().st_size / 2**20:.1f} MiB")
        if new := sorted({*untracked(Path.cwd())} - {*needed}):
            print(f"travel although not in git: {_some(new)}; .gitignore what the job does not need")
        if left := held_back(Path.cwd()):
            print(f"left here, as credentials have such names: {_some(left)}")
        print(f"variables: {', '.join(runtime_env['env_vars'])}", flush=True)
        if open_ := list(filter(looks_secret, runtime_env["env_vars"])):
            shown = "can be read by whoever may list the cluster's jobs; export it where Ray is started instead"
            print(f"eaft: warning: {', '.join(open_)} {shown}", file=sys.stderr, flush=True)
        if dry_run:
            return 0
        client = connect(address)
        check_free(client.list_jobs(), config.output, address)
        place = check_size(config, address, wanted.wait)
        _submit(
            client,
            entrypoint=command,
            submission_id=name,
            runtime_env={**runtime_env, "working_dir": str(archive)},
            metadata={OUTPUT: config.output},
            entrypoint_resources=place or None,
        )
    follow = f"ray job logs --address {address} --follow {name}"
    stop = f"ray job stop --address {address} {name}"
    print(f"follow: {follow}\nstop:   {stop}  (saves; launch again to go on)", flush=True)
    try:
        run_async(_follow(client, name))
        return _outcome(client, name)
    except KeyboardInterrupt:
        print(f"\ndetached; the job goes on. follow: {follow}", flush=True)
        return 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server; ConfigError when it does not answer or wants a token that is not here."""
    url = urlparse(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"RAY_API_SERVER_ADDRESS={address!r} must be http://HOST:PORT of the Ray dashboard")
    port = url.port or (443 if url.scheme == "https" else 80)
    if not reachable(url.hostname, port, CONNECT_TIMEOUT_S):
        raise ConfigError(
            f"{address} does not answer within {CONNECT_TIMEOUT_S:.0f} s: is `ray start --head` running there? From "
            "another machine open a tunnel: ssh -L 8265:127.0.0.1:8265 HEAD, and set RAY_API_SERVER_ADDRESS"
        )
    want_token()
    require([token_finding(dict(os.environ), url.hostname)])
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, requests.RequestException) as error:
        raise ConfigError(f"{address}: {str(error).strip().splitlines()[0]}") from None


def check_free(jobs: list[JobDetails], output: str, address: str) -> None:
    """Raise ConfigError when a job that has not ended writes into the same folder."""
    for job in jobs:
        if not job.status.is_terminal() and (job.metadata or {}).get(OUTPUT) == output:
            raise ConfigError(
                f"job {job.submission_id} is {job.status} and writes into {output}; follow it with `ray job logs "
                f"--address {address} --follow {job.submission_id}`, stop it, or choose another output="
            )


def check_size(config: Config, address: str, wait_s: float) -> dict[str, float]:
    """Resources that put the driver on a node with GPUs; ConfigError when the cluster is too small for the arm."""

    def alive() -> list[NodeState]:
        return [node for node in list_nodes(address=address, detail=True) if node.state == "ALIVE"]

    def offers() -> list[Offer]:
        totals = ((node.node_name or node.node_ip, node.resources_total) for node in alive())
        return [Offer(name, total.get("CPU", 0), total.get("GPU", 0)) for name, total in totals]

    if shortage := demand_of(config).shortage_after(max(wait_s, LISTING_DELAY_S), offers):
        raise ConfigError(f"the cluster at {address} is too small: {shortage}; see `eaft plan {config.recipe}`")
    holding = [node for node in alive() if node.resources_total.get("GPU", 0)]
    if config.device != "cuda" or any(node.is_head_node for node in holding):
        return {}
    kinds = [key for node in holding for key in node.resources_total if key.startswith("accelerator_type:")]
    return {kinds[0]: 0.001} if kinds else {}


def _submit(client: JobSubmissionClient, **job: Any) -> None:
    until = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            cause, early = str(error).strip().splitlines()[0], "No available agent" in str(error)
            if not early or time.monotonic() > until:
                hint = "; its port 52365 may be taken: `ray start ... --dashboard-agent-listen-port PORT`" * early
                raise RunError(f"the job was not accepted: {cause}{hint}") from None
            time.sleep(1)


async def _follow(client: JobSubmissionClient, name: str) -> None:
    async for lines in client.tail_job_logs(name):
        print(lines, end="", flush=True)


def _outcome(client: JobSubmissionClient, name: str) -> int:
    """Exit code of the ended job; its log ends some moments before its status changes."""
    while not (status := client.get_job_status(name)).is_terminal():
        time.sleep(0.5)
    print(f"job {name}: {status}", flush=True)
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return SAVED
    print(client.get_job_info(name).message or "", flush=True)
    return 1
