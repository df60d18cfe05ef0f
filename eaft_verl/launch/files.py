"""The file and the command that hand a launch to Slurm, KubeRay or SkyPilot; the files are those of `examples/`."""

import base64
import os
import shlex
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from eaft_verl.cluster.demand import demand_of
from eaft_verl.cluster.runtime_env import JOB_ENV, build_runtime_env, held_back
from eaft_verl.errors import ConfigError
from eaft_verl.files import write_text
from eaft_verl.launch.request import Launch
from eaft_verl.recipe.config import Config
from eaft_verl.recipe.file import read_recipe

LAUNCHERS = Path(__file__).with_name("launchers")
IMAGE = "eaft-verl:gpu"
RECIPE = "EAFT_RECIPE"  # variable of a KubeRay job: the whole recipe in base64, `extends` followed
JOIN_S = 600  # seconds that nodes get to join


def slurm_job(wanted: Launch, config: Config, name: str) -> tuple[str, str, list[str]]:
    """(file name, text, command) of a batch script; what differs between jobs is said on sbatch's command line."""
    trainer = config.verl.trainer
    options = [f"--job-name={name}", f"--nodes={trainer.nnodes}", f"--output={config.output}/{name}-%j.log"]
    if config.device == "cuda":
        options.append(f"--gpus-per-node={trainer.n_gpus_per_node}")
    return f"{name}.sbatch", _template("slurm.sbatch"), ["sbatch", *options, "FILE", *wanted.words()]


def kuberay_job(wanted: Launch, config: Config, name: str) -> tuple[str, str, list[str]]:
    """(file name, text, command) of a RayJob; EAFT_IMAGE names the image. The head has GPUs and holds workers too."""
    demand = demand_of(config)
    job = yaml.safe_load(_template("rayjob.yaml"))
    job["metadata"]["name"] = name.replace(".", "-")[-47:].lstrip("-")  # KubeRay appends; Kubernetes allows 63
    waits = [] if wanted.wait else ["--wait", str(JOIN_S)]
    job["spec"]["entrypoint"] = shlex.join(["eaft", "launch", *wanted.words(), "--on", "local", *waits])
    text = OmegaConf.to_yaml(OmegaConf.create(read_recipe(Path(wanted.recipe))))
    carried = base64.b64encode(text.encode()).decode()  # a shell of KubeRay's and Ray expand ${...} in variables
    runtime_env = build_runtime_env(os.environ, defaults=JOB_ENV, asked={RECIPE: carried})
    job["spec"]["runtimeEnvYAML"] = yaml.safe_dump(runtime_env)
    cluster = job["spec"]["rayClusterSpec"]
    pod = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    pod["image"] = os.environ.get("EAFT_IMAGE", IMAGE)
    limits = pod["resources"]["limits"]
    limits["cpu"] = max(limits["cpu"], demand.cpus + demand.beside(1) + 2)  # the driver and its data need some, too
    if demand.gpus:
        limits["nvidia.com/gpu"] = demand.gpus
    else:
        del limits["nvidia.com/gpu"]
    cluster["workerGroupSpecs"][0].update(dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), demand.nodes - 1))
    cluster["workerGroupSpecs"][0]["template"]["spec"] = cluster["headGroupSpec"]["template"]["spec"]
    return f"{name}.yaml", yaml.safe_dump(job, sort_keys=False, width=200), ["kubectl", "create", "-f", "FILE"]


def unpack_recipe(recipe: Path) -> None:
    """Write the recipe that a KubeRay job carries where its image has another one of that name, or none."""
    if carried := os.environ.get(RECIPE):
        try:
            write_text(recipe, base64.b64decode(carried).decode())
        except OSError as error:
            raise ConfigError(f"recipe {recipe} cannot be written in this image: {error.strerror}") from None


def skypilot_job(wanted: Launch, config: Config, name: str) -> tuple[str, str, list[str]]:
    """(file name, text, command) of a SkyPilot task; EAFT_GPU names the accelerator, A100-80GB where it does not."""
    if not Path(".skyignore").exists() and (open_ := held_back(Path.cwd())):
        raise ConfigError(
            f"{open_[0]} would travel with SkyPilot's workdir: name it in .gitignore or .skyignore, or move it"
        )
    demand = demand_of(config)
    command = ["sky", "launch", "-y", "-c", name, "--num-nodes", str(demand.nodes)]
    if demand.gpus:
        command += ["--gpus", f"{accelerator()}:{demand.gpus}"]
    settings = build_runtime_env(os.environ).get("env_vars", {})  # of this machine, that the job takes along
    command += [word for variable in settings.items() for word in ("--env", "=".join(variable))]
    command += ["--env", f"EAFT_ARGUMENTS={shlex.join(wanted.words())}", "--secret", "RAY_AUTH_TOKEN", "FILE"]
    return f"{name}.yaml", _template("skypilot.yaml"), command


def accelerator() -> str:
    """The kind of GPU that is not here, as SkyPilot calls it."""
    return os.environ.get("EAFT_GPU", "A100-80GB")


def _template(name: str) -> str:
    return (LAUNCHERS / name).read_text(encoding="utf-8")
