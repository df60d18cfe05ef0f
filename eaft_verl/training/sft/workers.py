"""The worker group: from a resolved configuration to Ray workers that hold the model."""

import contextlib
import socket
from typing import Any

import ray
from omegaconf import OmegaConf

from eaft_verl.cluster.demand import CPUS_PER_WORKER
from eaft_verl.cluster.session import worker_environment
from eaft_verl.planning.units import one_unit
from eaft_verl.recipe.config import Config, plain
from eaft_verl.recipe.views import world_size

# what verl wraps beside the root (and an untied embedding and head): its search for layers is off, and FSDP2's own list
# of their classes, which may not be empty, names none
NO_LAYERS = {"disable": True, "transformer_layer_cls_to_wrap": ["none"]}


def start_workers(
    config: Config,
    model_path: str,
    total_steps: int,
    loss: Any,
    reference: str | None,
    variables: dict[str, str] | None = None,
) -> Any:
    """A RayWorkerGroup of EaftWorkers, model built, loss set.

    reference: a frozen model that they may open. variables: of their environment.
    """
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    from eaft_verl.training.sft.worker import EaftWorker

    trainer = config.verl.trainer
    pool = RayResourcePool([trainer.n_gpus_per_node] * trainer.nnodes, max_colocate_count=CPUS_PER_WORKER["sft"])
    settings = worker_config(config, model_path, total_steps, reference)
    worker = RayClassWithInitArgs(ray.remote(EaftWorker), config=settings)
    group = RayWorkerGroup(
        resource_pool=pool,
        ray_cls_with_init=worker,
        device_name=config.device,
        worker_env=worker_environment(config.device, world_size(config)) | (variables or {}),
        **_rendezvous(),
    )
    group.set_loss_fn(loss)
    group.reset()
    return group


def stop_workers(group: Any) -> None:
    """End the workers and give their places back: the next arm may run in the same Ray session."""
    with contextlib.suppress(ray.exceptions.RayError):  # where Ray has failed, its error is on its way up
        for worker in group.workers:
            ray.kill(worker)
        for place in group.resource_pool.get_placement_groups():
            ray.util.remove_placement_group(place)


def worker_config(config: Config, model_path: str, total_steps: int, reference: str | None = None) -> Any:
    """verl's dataclasses from the resolved tree; `reference`: folder or hub id of a frozen second model."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig

    tree: Any = OmegaConf.create(plain(config.verl))
    tree.model.update(path=model_path, hf_config_path=model_path, tokenizer_path=model_path)
    tree.engine.seed = config.seed
    tree.engine.wrap_policy = NO_LAYERS if one_unit(config, model_path) else {}
    tree.optim.total_training_steps = total_steps
    data = tree.data
    tree.engine.update(
        use_dynamic_bsz=data.use_dynamic_bsz,
        max_token_len_per_gpu=data.max_token_len_per_gpu,
        micro_batch_size_per_gpu=data.micro_batch_size_per_gpu,
        infer_max_token_len_per_gpu=data.max_token_len_per_gpu,
        infer_micro_batch_size_per_gpu=data.micro_batch_size_per_gpu,
        use_torch_compile=False,  # of verl's own entropies, which are not computed here
    )
    checkpoint = OmegaConf.create({"_target_": "verl.trainer.config.CheckpointConfig"})
    checkpoint.save_contents = checkpoint.load_contents = ["model", "optimizer", "extra"]
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=omega_conf_to_dataclass(tree.model),
        engine_config=omega_conf_to_dataclass(tree.engine),
        optimizer_config=omega_conf_to_dataclass(tree.optim),
        checkpoint_config=omega_conf_to_dataclass(checkpoint),
        extra_context={
            "seed": config.seed,
            "fused_head": config.fused_head,
            "async_save": config.async_save,
            "reference": reference and _reference_config(tree, reference),
        },
    )


def _reference_config(tree: Any, path: str) -> dict[str, Any]:
    """The second engine: like the first, without adapter or offloading, layer by layer (it may be a larger model), its
    weights in the dtype both compute in."""
    from verl.utils.config import omega_conf_to_dataclass

    tree = OmegaConf.create(plain(tree))
    tree.model.update(path=path, hf_config_path=path, tokenizer_path=path)
    tree.model.update(lora_rank=0, lora_adapter_path=None, enable_gradient_checkpointing=False)
    dtype = (tree.engine.mixed_precision or {}).get("param_dtype", "bf16")
    tree.engine.update(model_dtype="fp32", param_offload=False, optimizer_offload=False, wrap_policy={})
    return {
        "dtype": dtype,
        "model_config": omega_conf_to_dataclass(tree.model),
        "engine_config": omega_conf_to_dataclass(tree.engine),
    }


def _rendezvous() -> dict[str, str]:
    """Address of the first worker when it must be on this machine; saves a Ray task that imports verl to ask for it."""
    if len(ray.nodes()) != 1:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"master_addr": "127.0.0.1", "master_port": str(probe.getsockname()[1])}
