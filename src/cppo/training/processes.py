"""What the processes of one run must agree on; with a single process all of it is the identity.

Every process must call these at the same point of its program, or the others wait for ever.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def start_processes() -> PartialState:
    """Join the processes that a launcher has started (accelerate launch, torchrun); with GPUs or, by gloo, without.

    Call it before anything else asks for `PartialState`: the first call decides.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def from_main(value: T) -> T:
    """The main process's `value`, on every process."""
    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]


def from_all(value: T) -> list[T]:
    """Every process's `value`, in rank order, on every process."""
    if PartialState().num_processes == 1:
        return [value]
    return gather_object([value])  # type: ignore[no-any-return]


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on at least one process."""
    return any(from_all(flag))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds all weights (FSDP, DeepSpeed ZeRO-3): then forwards must be made by all together."""
    deepspeed = accelerator.state.deepspeed_plugin
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return fsdp is not None or (deepspeed is not None and deepspeed.zero_stage == 3)


def whole_weights(accelerator: Accelerator, model: Any) -> dict[str, Any] | None:
    """The gathered weights of a sharded model (collective); None where `save_pretrained` can take them itself."""
    return accelerator.get_state_dict(model) if is_sharded(accelerator) else None
