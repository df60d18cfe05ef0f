"""One Ray actor per device: verl's TrainingWorker with our loss, our statistics and an export."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils.device import get_device_id, get_device_name, get_torch_device
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.fsdp_utils import merged_lora_context, normalize_peft_param_name
from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig

from eaft_verl.attention import packed
from eaft_verl.tokens.row_kernels import chosen
from eaft_verl.training.dcp import DcpCheckpoints, finite
from eaft_verl.training.export import export_weights
from eaft_verl.training.sft.anchor_model import AdapterOff, Reference
from eaft_verl.training.sft.fused_head import FusedHeadEngine, fuse
from eaft_verl.training.sft.meter import EmitDrift
from eaft_verl.training.sft.self_check import plain_nll
from eaft_verl.training.sft.step_metrics import summarize
from eaft_verl.training.sft.update import Update
from eaft_verl.training.stacks import write_stacks_when_asked

_PER_DP_RANK = make_nd_compute_dataproto_dispatch_fn(mesh_name="train")
COLLECTIVE_TIMEOUT_S = 1800  # verl waits 10 h for a rank that hangs


class EaftWorker(TrainingWorker):
    """verl's worker. `config.extra_context`: fused_head, async_save, the reference, the seed of the model."""

    loss_fn: Any

    def __init__(self, config: TrainingWorkerConfig) -> None:
        packed.register()
        # on CPU verl's own backend string names the device twice, which torch refuses; it skips an initialised group
        backend = "gloo" if get_device_name() == "cpu" else None
        write_stacks_when_asked()
        initialize_global_process_group_ray(timeout_second=COLLECTIVE_TIMEOUT_S, backend=backend)
        super().__init__(config=config)
        self.reference: Reference | AdapterOff | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        torch.manual_seed(self.config.extra_context["seed"])  # same adapter initialisation on every rank
        super().reset()
        self.unfused = fuse(self.engine) if self.config.extra_context["fused_head"] else "fused_head=false"
        engine = self.engine
        engine.checkpoint_manager = DcpCheckpoints(
            engine.module,
            engine.optimizer,
            engine.lr_scheduler,
            background=self.config.extra_context["async_save"],
        )
        self.update = Update(engine.optimizer, engine.get_data_parallel_group()) if engine.optimizer else None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def plain_head(self) -> str | None:
        """Why the loss is formed from whole logits; None where it is not."""
        return self.unfused

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def row_kernels(self) -> tuple[str, str | None] | None:
        """By which code the chunks of logits have run so far, and why not by Triton's; None: no choice was made."""
        return next(((kernels.name, why) for kernels, why in chosen.values()), None)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def nonfinite_weights(self) -> list[str]:
        """Names of the weights that hold a NaN or an infinity in this rank's part."""
        weights = self.engine.module.named_parameters()
        return [name for name, weight in weights if not finite(weight)]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def open_reference(self) -> None:
        """Load the frozen model beside the trained one; under LoRA the trained one without its adapter will do."""
        own = self.config.extra_context["reference"] is None
        self.reference = AdapterOff(self.engine) if own else Reference(self.config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def close_reference(self) -> None:
        """Free it."""
        self.reference = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def hold_weights(self, coef: float) -> None:
        """Keep a copy of the weights, and pull towards it after every update from now on."""
        assert self.update is not None
        self.update.hold(coef)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_finished(self, wait: bool) -> bool:
        """As `DcpCheckpoints.finished`."""
        return bool(self.engine.checkpoint_manager.finished(wait=wait))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def peak_memory(self) -> float:
        """Largest memory of this worker so far, GiB."""
        return get_torch_device().max_memory_allocated() / 1024**3

    # registered again, because the dispatch mode is an attribute of the function and not inherited
    @register(dispatch_mode=_PER_DP_RANK, blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        self._ready()
        assert self.update is not None
        self.update.begin(self.loss_fn)
        result = super().train_batch(data)
        if self.update.made:  # verl would let the rate go on where it skips an update
            self.engine.lr_scheduler_step()
        return result

    @register(dispatch_mode=_PER_DP_RANK, blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        self._ready()
        return super().infer_batch(data)

    @register(dispatch_mode=_PER_DP_RANK, blocking=False)
    def drift_batch(self, data: TensorDict) -> TensorDict:
        """A forward pass in which EmitDrift stands in for the loss, which keeps all that it knows."""
        kept, self.loss_fn = self.loss_fn, EmitDrift()
        try:
            return self.infer_batch(data)
        finally:
            self.loss_fn = kept

    def _ready(self) -> None:
        self.loss_fn.table.clear()
        self.loss_fn.reference = self.reference
        if isinstance(self.engine, FusedHeadEngine) and self.engine.head:
            self.engine.head.loss = self.loss_fn

    def _postprocess_output(self, output: dict[str, Any], *, forward_only: bool, **kwargs: Any) -> TensorDict:
        rows = self.loss_fn.table.gather(self.engine.get_data_parallel_group())
        result = super()._postprocess_output(output, forward_only=forward_only, **kwargs)
        metrics = result["metrics"]
        metrics.update(summarize(rows))
        if self.update is not None and not forward_only:
            metrics.update(self.update.metrics)
        return result

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def plain_nll(
        self, model: str, rows: list[list[int]], share: float, adapter: bool
    ) -> tuple[list[torch.Tensor], str]:
        """Rank 0: the rows through transformers alone, where `share` of the free memory holds the model again.

        adapter: with the one that training starts from.
        """
        if dist.get_rank():
            return [], ""
        free = get_torch_device().mem_get_info()[0]
        config = copy.deepcopy(self.model_config.hf_config)
        start = self.model_config.lora_adapter_path if adapter else None
        return plain_nll(model, config, start, rows, get_device_id(), share * free)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export(self, folder: str, base_model: str, dtype: str, ends: Sequence[str] = ()) -> None:
        """Write the model as a Hugging Face folder that transformers and vLLM load; collective, rank 0 writes."""
        try:
            if self.model_config.lora_rank > 0:
                with merged_lora_context(self.engine.module, backup_adapters=True):
                    self._export(self._merged_weights(), folder, base_model, dtype, ends)
            else:
                self._export(self.engine.get_per_tensor_param()[0], folder, base_model, dtype, ends)
        finally:
            dist.barrier()  # the others wait for rank 0 also when it cannot write

    def _merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Base plus adapters; verl's own iterator rounds them to bfloat16 on the way to a rollout."""
        for name, weight in normalize_peft_param_name(self.engine.module.state_dict()).items():
            if isinstance(weight, DTensor):
                moved: Any = weight.to(get_device_id())
                weight = moved.full_tensor()
            yield name, weight

    def _export(
        self, weights: Iterable[tuple[str, torch.Tensor]], folder: str, base_model: str, dtype: str, ends: Sequence[str]
    ) -> None:
        export_weights(weights, Path(folder), base_model, dtype, write=dist.get_rank() == 0, ends=ends)
