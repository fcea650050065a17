"""An agent loop of two turns with a tool's answer in between, for the alignment of rows in multi-turn rollouts.

Named by ``rollout.agent.agent_loop_config_path``.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.utils.profiler import simple_timer

#: What the tool answers to everything.
ANSWER = "7"


class TwoTurns(AgentLoopBase):
    """The model speaks, a tool answers, the model speaks again; only the model's tokens are trained on."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        messages = list(kwargs["raw_prompt"])
        ids = await self.ct_build_initial_tokens(messages)
        mask: list[int] = []
        logp: list[float] = []
        metrics: dict[str, Any] = {}
        request, extra = uuid4().hex, None
        for turn in range(2):
            room = self.rollout_config.response_length - len(mask)
            limit = max(1, room // 3) if turn == 0 else room
            with simple_timer("generate_sequences", metrics):
                output = await self.server_manager.generate(
                    request_id=request, prompt_ids=ids, sampling_params={**sampling_params, "max_tokens": limit}
                )
            extra = extra or output.extra_fields
            merged, mask, logp = await self.ct_merge_assistant_token(
                ids, output.token_ids, mask, logp, assistant_logprobs=output.log_probs
            )
            ids = merged.token_ids
            if turn == 0:
                said = {"role": "assistant", "content": self.tokenizer.decode(output.token_ids)}
                before, after = [*messages, said], [*messages, said, {"role": "tool", "content": ANSWER}]
                merged, mask, logp = await self.ct_merge_context_msg(before, after, ids, mask, logp)
                ids = merged.token_ids
        metrics["num_preempted"] = -1
        return AgentLoopOutput(
            prompt_ids=ids[: len(ids) - len(mask)],
            response_ids=ids[len(ids) - len(mask) :],
            response_mask=mask,
            response_logprobs=logp,
            num_turns=4,
            metrics=metrics,
            extra_fields={**(extra or {}), "turn_scores": [], "tool_rewards": []},
        )
