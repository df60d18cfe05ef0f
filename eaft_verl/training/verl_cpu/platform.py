"""A CPU platform for verl, opted into with VERL_PLATFORM=cpu.

verl loads this module in every process through the entry-point group `verl.plugins`. It imports verl's platform
package only: importing an engine here would fix the device name before the platform is chosen.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from eaft_verl.models import without_sklearn
from eaft_verl.training.verl_cpu.private import SLOT_VARIABLE, name_cpu_backend_once


def _device_module() -> ModuleType:
    """torch.cpu with the few functions verl expects of an accelerator's namespace."""
    module = ModuleType("eaft_verl_cpu_device")
    vars(module).update({name: item for name, item in vars(torch.cpu).items() if not name.startswith("_")})

    def peak_memory(device: Any = None) -> int:
        """Peak resident bytes of this process: the nearest thing a CPU has to allocated device memory."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB

    def free_and_total(device: Any = None) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    vars(module).update(
        mem_get_info=free_and_total,
        max_memory_allocated=peak_memory,
        max_memory_reserved=peak_memory,
        memory_allocated=peak_memory,
        memory_reserved=peak_memory,
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
        get_device_name=lambda device=None: "CPU",
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )
    return module


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformBase):
    """FSDP2 on gloo. Never chosen by detection: the head node of a GPU cluster has no GPU either."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> torch.device:  # verl passes it to .to(), where an index would mean a GPU
        return torch.device("cpu")

    def device_count(self) -> int:
        return os.cpu_count() or 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return os.environ.get(SLOT_VARIABLE, "CPU")

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus" if self.ray_resource_name() == "GPU" else "num_cpus": num_gpus}

    def rollout_env_vars(self) -> dict[str, str]:
        """What a CPU build of vLLM needs: gigabytes of cache, and not to bind its threads to cores that others use."""
        given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return super().rollout_env_vars() | {name: os.environ.get(name, value) for name, value in given.items()}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


without_sklearn()  # before the rest of verl imports transformers
if os.environ.get("VERL_PLATFORM") == "cpu":
    name_cpu_backend_once()
