"""A rollout server for verl 0.9 on a CPU: a transformers model in an actor, behind verl's rollout interfaces.

* `CPUReplica` starts the server, `ServerAdapter` brings it new weights from the trainer's process, in every mode.
* Requests that arrive together are decoded together. A server that is told to abort gives back what it has, and holds
  new requests until it is told to go on.
* ``rollout.custom``: `run` (a name that no other run in this Ray session has), `cppo_top_k` (return the top-K of every
  distribution that was sampled from, as the extra fields `mu_topk_ids` and `mu_topk_logprobs`), `no_direct_top_k` (do
  not, as a server that cannot), `interrupt_after` (every other request is aborted once, after so many tokens).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from typing import Any

import ray
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from cppo_cpu.decoding import Request, decode, score_prompt

_KNOWN = {"logprobs", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "prompt_logprobs"}
_NEUTRAL = {"top_p": (1.0, None), "top_k": (-1, 0, None), "repetition_penalty": (1.0, None)}


def server_name(custom: Any, replica_rank: int) -> str:
    """The name under which a run's server is known in the Ray session."""
    return f"cppo-cpu-{custom['run']}-{replica_rank}"


@ray.remote(num_cpus=0, max_concurrency=1000)
class Server:
    """The model, and the requests that wait for it."""

    def __init__(self, path: str, name: str, max_length: int, custom: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        stop = self.model.generation_config.eos_token_id
        self.stop = frozenset([stop] if isinstance(stop, int) else stop or [])
        self.name, self.max_length, self.custom = name, max_length, custom
        self.version: int | None = None
        self.seen: Counter[str] = Counter()
        self.interrupted: set[str] = set()
        self.waiting: list[tuple[Request, asyncio.Future[None]]] = []
        self.decoding: asyncio.Task[None] | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def address(self) -> str:
        return self.name

    async def load(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        """New weights; called while nothing is being decoded."""
        if self.decoding is not None:
            raise RuntimeError("new weights while requests are being decoded: the caller must abort first")
        result = self.model.load_state_dict(weights, strict=False)
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        if result.unexpected_keys or set(result.missing_keys) - tied:
            raise RuntimeError(f"weights do not fit the rollout model: {result}")
        self.version = version
        self.seen.clear()

    # -- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Any = None,
        video_data: Any = None,
        **_: Any,
    ) -> TokenOutput:
        """verl's contract of a rollout server: sampled tokens with their log-probabilities, text only."""
        self._check(sampling_params)
        await self.open.wait()
        prompt = [int(token) for token in prompt_ids]
        scored = sampling_params.get("prompt_logprobs")
        if scored is not None:
            ids, logp = score_prompt(self.model, prompt, int(scored))
            extra = {"global_steps": self.version, "prompt_ids": ids, "prompt_logprobs": logp}
            return TokenOutput(token_ids=[0], stop_reason="completed", extra_fields=extra)
        request = self._request(prompt, sampling_params)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, done))
        if self.decoding is None:
            self.decoding = asyncio.create_task(self._decode_waiting())
        await done
        extra = {"global_steps": self.version}
        if request.top_ids:
            extra |= {"mu_topk_ids": request.top_ids, "mu_topk_logprobs": request.top_logp}
        return TokenOutput(
            token_ids=request.tokens, log_probs=request.logp, stop_reason=request.stop_reason, extra_fields=extra
        )

    def _check(self, sampling_params: dict[str, Any]) -> None:
        unknown = set(sampling_params) - _KNOWN
        changed = [name for name, neutral in _NEUTRAL.items() if sampling_params.get(name) not in neutral]
        if unknown or changed:
            raise ValueError(f"the CPU server does not do {sorted(unknown) + changed}: {sampling_params}")

    def _request(self, prompt: list[int], sampling_params: dict[str, Any]) -> Request:
        room = self.max_length - len(prompt)
        limit = sampling_params.get("max_tokens")
        identity = f"{self.version}/{prompt}"
        count = self.seen[identity]
        self.seen[identity] += 1
        interrupt = None
        if self.custom.get("interrupt_after") and count % 2 == 0 and not self._is_resumed(prompt):
            interrupt = int(self.custom["interrupt_after"])
        return Request(
            prompt=prompt,
            max_tokens=room if limit is None else min(room, int(limit)),
            temperature=float(sampling_params.get("temperature", 1.0)),
            stop=self.stop,
            seed=hashlib.sha256(f"{identity}/{count}".encode()).hexdigest(),
            interrupt_after=interrupt,
        )

    def _is_resumed(self, prompt: list[int]) -> bool:
        return any(str(prompt[:end]) in self.interrupted for end in range(1, len(prompt)))

    async def _decode_waiting(self) -> None:
        top_k = 0 if self.custom.get("no_direct_top_k") else int(self.custom.get("cppo_top_k") or 0)
        try:
            while self.waiting:
                await asyncio.sleep(0.05)  # what belongs together arrives within a moment
                batch, self.waiting = self.waiting, []
                requests = [request for request, _ in batch]
                try:
                    await decode(self.model, requests, top_k, aborted=lambda: not self.open.is_set())
                except Exception as error:  # to the callers, who would wait for ever
                    for _, done in batch:
                        done.set_exception(error)
                    continue
                for request, done in batch:
                    if request.stop_reason == "aborted":
                        self.interrupted.add(str(request.prompt))
                        print(f"aborted after {len(request.tokens)} tokens", flush=True)
                    done.set_result(None)
        finally:
            self.decoding = None

    # -- control ---------------------------------------------------------------------------------------------------

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        self.open.clear()
        while self.decoding is not None:
            await asyncio.sleep(0.01)

    async def resume_generation(self) -> None:
        self.open.set()

    async def nothing(self, *_: Any, **__: Any) -> None:
        """There is no memory to give back and nothing to profile."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


class CPUReplica(RolloutReplica):
    """One server, whatever the number of (logical) devices."""

    async def launch_servers(self) -> None:
        custom = OmegaConf.to_container(OmegaConf.create(self.config.custom or {}))
        name = server_name(custom, self.replica_rank)
        limit = self.config.prompt_length + self.config.response_length
        server = Server.options(name=name).remote(self.model_config.path, name, limit, custom)
        self.servers = [server]
        self._server_handle, self._server_address = server, await server.address.remote()


class ServerAdapter(BaseRollout):
    """Lives in the trainer's process (or in the replica's own, in separate mode) and brings the server new weights."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank, size = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        self.replica_rank = replica_rank if replica_rank >= 0 else rank // size
        self.is_leader_rank = rank % size == 0

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights: Any, wire_format: str = "named_tensors", **options: Any) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"the CPU rollout takes named tensors, not {wire_format!r}")
        # Every rank must walk through the generator: it gathers sharded tensors.
        state = {name: tensor.detach().float().cpu().clone() async for name, tensor in ensure_async_iterator(weights)}
        if self.is_leader_rank:
            server = ray.get_actor(server_name(self.config.custom, self.replica_rank))
            await server.load.remote(state, options.get("global_steps"))
