"""Weights from the trainer to separate rollout replicas through files: verl's checkpoint engine "cpu_files".

verl imports this module where ``rollout.checkpoint_engine.custom_backend_module`` names it. Its own engines need a GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

TIMEOUT_S = 60.0


@CheckpointEngineRegistry.register("cpu_files")
class FileCheckpointEngine(CheckpointEngine):
    """One file a version in `folder` (``checkpoint_engine.engine_kwargs.cpu_files.folder``)."""

    def __init__(self, bucket_size: int, folder: str, is_master: bool = False) -> None:
        self.folder, self.is_master = Path(folder), is_master

    def prepare(self) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        return {}, {}

    def init_process_group(self, **_: Any) -> None:
        pass

    def finalize(self) -> None:
        pass

    def _file(self, global_steps: int | None) -> Path:
        return self.folder / f"{global_steps}.safetensors"

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in weights}
        if self.is_master:
            temporary = self._file(global_steps).with_suffix(".part")
            save_file(state, temporary)
            temporary.rename(self._file(global_steps))

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        for _ in range(int(TIMEOUT_S / 0.02)):
            if self._file(global_steps).exists():
                break
            await asyncio.sleep(0.02)
        else:
            raise TimeoutError(f"no weights of version {global_steps} in {self.folder} after {TIMEOUT_S} s")
        for item in load_file(self._file(global_steps)).items():
            yield item
