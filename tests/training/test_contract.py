"""What this package relies on in verl 0.9.1. A failure here names the hook that an upgrade has moved."""

import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch, make_nd_compute_dataproto_dispatch_fn
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import seqlen_balancing, ulysses
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine import BaseEngine, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead
from verl.workers.engine_workers import TrainingWorker

from eaft_verl.training.sft.fused_head import FusedHeadEngine
from eaft_verl.training.sft.loss import BATCH_FLAGS
from eaft_verl.training.sft.worker import EaftWorker
from eaft_verl.training.verl_cpu.platform import PlatformCPU
from eaft_verl.training.verl_cpu.private import VERL_VERSION

POSITIONAL, KEYWORD_ONLY = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def names(function: Callable[..., Any], kind: Any = POSITIONAL) -> list[str]:
    return [name for name, item in inspect.signature(function).parameters.items() if item.kind is kind]


def test_the_installed_verl_is_the_pinned_one() -> None:
    assert importlib.metadata.version("verl") == VERL_VERSION
    pinned = next(line for line in importlib.metadata.requires("eaft-verl") if line.startswith("verl"))
    assert pinned == f"verl=={VERL_VERSION}"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            FSDPEngineWithLMHead.prepare_model_outputs,
            ["self", "output", "output_args", "micro_batch", "logits_processor_func"],
        ),
        (FSDPEngineWithLMHead.forward_step, ["self", "micro_batch", "loss_function", "forward_only"]),
        (FSDPEngine.forward_backward_batch, ["self", "data", "loss_function", "forward_only"]),
        (FSDPEngine.get_per_tensor_param, ["self", "layered_summon", "base_sync_done"]),
        (FSDPEngine.get_data_parallel_group, ["self"]),
        (BaseEngine.train_batch, ["self", "data", "loss_function"]),
        (BaseEngine.infer_batch, ["self", "data", "loss_function"]),
        (TrainingWorker.__init__, ["self", "config"]),
        (TrainingWorker.train_batch, ["self", "data"]),
        (TrainingWorker.infer_batch, ["self", "data"]),
        (TrainingWorker._postprocess_output, ["self", "output"]),
        (TrainingWorker.reset, ["self"]),
        (TrainingWorker.set_loss_fn, ["self", "loss_fn"]),
        (TrainingWorker.save_checkpoint, ["self", "local_path", "hdfs_path", "global_step", "max_ckpt_to_keep"]),
        (TrainingWorker.load_checkpoint, ["self", "local_path", "hdfs_path", "del_local_after_load"]),
        (initialize_global_process_group_ray, ["timeout_second", "backend"]),
        (make_nd_compute_dataproto_dispatch_fn, ["mesh_name"]),
        (EngineRegistry.get_engine_cls, ["model_type", "backend"]),
        (tu.get, ["tensordict", "key", "default"]),
        (tu.get_non_tensor_data, ["data", "key", "default"]),
        (tu.get_tensordict, ["tensor_dict", "non_tensor_dict"]),
        (tu.chunk_tensordict, ["td", "chunks"]),
        (seqlen_balancing.calculate_workload, ["seqlen_list"]),
        (seqlen_balancing.get_seqlen_balanced_partitions, ["seqlen_list", "k_partitions", "equal_size"]),
        (ulysses.ulysses_pad_and_slice_inputs, ["input_ids_rmpad", "position_ids_rmpad", "sp_size"]),
    ],
)
def test_signature(function: Callable[..., Any], expected: list[str]) -> None:
    assert names(function)[: len(expected)] == expected


def test_postprocess_takes_the_rest_by_keyword() -> None:
    found = names(TrainingWorker._postprocess_output, KEYWORD_ONLY)
    assert found == ["global_token_num", "delta_time", "forward_only", "images_seqlens"]


def test_tensordict_flags_are_assigned_by_keyword() -> None:
    parameters = inspect.signature(tu.assign_non_tensor).parameters.values()
    assert any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)


def test_worker_config_carries_our_seed() -> None:
    assert {"extra_context", "engine_config", "optimizer_config", "checkpoint_config"} <= set(
        inspect.signature(TrainingWorkerConfig).parameters
    )


@pytest.mark.parametrize("flag", ["distillation_use_topk", "distillation_only"])
def test_the_engine_reads_the_flag(flag: str) -> None:
    source = inspect.getsource(FSDPEngineWithLMHead.prepare_model_outputs)
    assert BATCH_FLAGS[flag] is True
    assert re.search(rf'key="{flag}"', source)


@pytest.mark.parametrize("flag", ["use_fused_kernels", "temperature", "pad_mode", "use_remove_padding"])
def test_the_engine_reads_the_layout(flag: str) -> None:
    assert f'"{flag}"' in inspect.getsource(FSDPEngineWithLMHead.prepare_model_inputs)


def test_the_hook_is_called_on_packed_and_on_padded_batches_and_the_loss_after_it() -> None:
    outputs = inspect.getsource(FSDPEngineWithLMHead.prepare_model_outputs)
    step = inspect.getsource(FSDPEngineWithLMHead.forward_step)
    assert outputs.count("logits_processor_func(student_logits=logits_rmpad.unsqueeze(0), data=micro_batch)") == 2
    assert "logits_processor_func=loss_function" in step
    assert re.search(r"loss_function\(\s*model_output=model_output, data=micro_batch, dp_group=", step)


def test_the_engine_counts_the_tokens_of_the_global_batch() -> None:
    source = inspect.getsource(FSDPEngine.forward_backward_batch)
    assert 'data["loss_mask"].sum()' in source
    assert "batch_num_tokens=batch_num_tokens.item()" in source
    assert "dp_size=self.get_data_parallel_size()" in source


def test_the_cpu_uses_the_engine_registered_for_cuda() -> None:
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FusedHeadEngine
    assert FusedHeadEngine.__bases__ == (FSDPEngineWithLMHead,)
    assert list(inspect.signature(FSDPEngineWithLMHead.prepare_model_inputs).parameters) == ["self", "micro_batch"]


@pytest.mark.parametrize("key", ["worker_env", "master_addr", "master_port", "device_name"])
def test_worker_group_reads_the_keyword(key: str) -> None:
    assert re.search(rf'kwargs\.(get|pop)\("{key}"', inspect.getsource(RayWorkerGroup.__init__))


def test_ray_classes_take_our_arguments() -> None:
    assert names(RayWorkerGroup.__init__)[:3] == ["self", "resource_pool", "ray_cls_with_init"]
    assert {"process_on_nodes", "max_colocate_count"} <= set(names(RayResourcePool.__init__))
    assert names(RayClassWithInitArgs.__init__)[:2] == ["self", "cls"]


@pytest.mark.parametrize("method", ["train_batch", "infer_batch"])
def test_per_rank_methods_keep_verls_dispatch(method: str) -> None:
    ours, theirs = (vars(vars(cls)[method])[MAGIC_ATTR] for cls in (EaftWorker, TrainingWorker))
    for attributes in (ours, theirs):
        assert attributes["dispatch_mode"]["dispatch_fn"].args == ("train",)
    assert ours["blocking"] is theirs["blocking"] is False


@pytest.mark.parametrize("method", ["reset", "export"])
def test_methods_for_all_ranks(method: str) -> None:
    assert vars(vars(EaftWorker)[method])[MAGIC_ATTR]["dispatch_mode"] == Dispatch.ONE_TO_ALL


def test_dispatch_function_gives_each_rank_its_part() -> None:
    made = make_nd_compute_dataproto_dispatch_fn(mesh_name="train")
    assert made.keys() == {"dispatch_fn", "collect_fn"}


def test_platform_satisfies_verls_abstract_base() -> None:
    assert not PlatformCPU.__abstractmethods__
    platform = PlatformCPU()
    assert (platform.device_name, platform.ray_resource_name()) == ("cpu", "CPU")
    assert platform.ray_resource_options(1) == {"num_cpus": 1}
    assert platform.is_available() and not platform.is_platform_available(use_smi_check=True)
    assert str(platform.current_device()) == "cpu"
    assert platform.communication_backend_name() == "gloo"


@pytest.mark.parametrize("method", sorted(PlatformBase.__abstractmethods__))
def test_platform_method_accepts_what_verl_passes(method: str) -> None:
    theirs, ours = vars(PlatformBase)[method], vars(PlatformCPU)[method]
    if isinstance(theirs, property):
        assert getattr(PlatformCPU(), method) is not None
    else:
        assert names(inspect.unwrap(ours)) == names(inspect.unwrap(theirs))


@pytest.mark.parametrize(
    "name",
    [
        *("mem_get_info", "max_memory_allocated", "max_memory_reserved", "memory_allocated", "empty_cache"),
        *("get_device_name", "get_rng_state", "set_rng_state", "reset_peak_memory_stats", "is_available"),
    ],
)
def test_device_module_has_what_verl_calls(name: str) -> None:
    function = vars(PlatformCPU.device_module)[name]
    if name == "set_rng_state":
        function(PlatformCPU.device_module.get_rng_state())
    else:
        function()


def test_the_platform_is_registered_through_the_entry_point() -> None:
    """That verl loads it from there is shown by test_exactness: its processes import nothing of ours before verl."""
    points = {point.name: point for point in importlib.metadata.entry_points(group="verl.plugins")}
    assert points["eaft"].value == "eaft_verl.training.verl_cpu.platform"
    assert points["eaft"].load().PlatformCPU is PlatformRegistry.get("cpu") is PlatformCPU
