"""A CPU platform for verl 0.9, which has none: its registry takes new ones (VERL_PLATFORM=cpu selects this one).

Ray's GPUs are logical here (``ray.init(num_gpus=...)``): they only place actors. The training engine is the one that
verl registers for CUDA devices (VERL_ENGINE_DEVICE=cuda); it takes the device from the platform.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from verl.utils import distributed  # isort: skip  (asks for the platform's name, not yet for the platform)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _zero(*_: Any) -> int:
    return 0


#: What verl uses of `torch.cuda`, for a device without memory of its own. `is_available` says no: where verl asks for
#: it, it is about to use CUDA itself.
DEVICE = types.SimpleNamespace(
    is_available=lambda: False,
    current_device=lambda: torch.device("cpu"),
    device_count=lambda: 1,
    get_device_name=lambda *_: "cpu",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    mem_get_info=lambda *_: (1, 1),
    **dict.fromkeys(("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"), _nothing),
    **dict.fromkeys(
        ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "memory_stats"), _zero
    ),
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One CPU as the accelerator, gloo for communication."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = DEVICE
    synchronize = set_device = empty_cache = set_allocator_settings = profiler_start = profiler_stop = _nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


# verl joins "cpu:gloo" and "<device>:<backend>"; torch refuses two backends for one device. Done here, before any of
# verl's workers imports the function by name.
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="cpu:gloo"
)
