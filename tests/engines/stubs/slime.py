"""What slime's loss layer does around a custom loss: signatures as in facts.json.

The zigzag layout under context parallelism, the reducer per rollout or per token, and how a micro-batch's loss enters
the step. slime is not on PyPI and needs Megatron and CUDA. Two things are simpler here: the context-parallel group is
the default process group, and ``logits`` ``[1, T, 1]`` hold the log-probability of the next token itself, so that the
gradient there is the one with respect to log pi.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def context_parallel() -> tuple[int, int]:
    """Rank and size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def held(total_length: int, response_length: int) -> tuple[list[int], list[int]]:
    """Which response tokens this process holds, and where their logits lie among its own of this sequence.

    The logits' positions ``0..total-1`` are cut into 2R chunks; process r of R holds chunks r and 2R-1-r. The logit of
    response token t stands one position before the token.
    """
    rank, size = context_parallel()
    if size == 1:
        first = total_length - response_length - 1
        return list(range(response_length)), list(range(first, first + response_length))
    chunk = -(-total_length // (2 * size))
    tokens, places = [], []
    for half, start in enumerate((rank * chunk, (2 * size - 1 - rank) * chunk)):
        for position in range(start, start + chunk):
            token = position - (total_length - response_length - 1)
            if 0 <= token < response_length:
                tokens.append(token)
                places.append(half * chunk + position - start)
    return tokens, places


def local_length(total_length: int) -> int:
    """How many logits of a sequence this process has."""
    size = context_parallel()[1]
    return total_length if size == 1 else 2 * -(-total_length // (2 * size))


def all_gather_with_cp(tensor: Tensor, total_length: int, response_length: int) -> Tensor:
    """This process's piece ``[t, ...]`` -> the whole response ``[response_length, ...]``."""
    if context_parallel()[1] == 1:
        return tensor
    full = tensor.new_zeros(response_length, *tensor.shape[1:])
    full[held(total_length, response_length)[0]] = tensor
    dist.all_reduce(full)
    return full


def slice_log_prob_with_cp(
    log_prob: Tensor, total_length: int, response_length: int, qkv_format: str = "thd", max_token_len: int | None = None
) -> Tensor:
    """The whole response -> this process's piece."""
    assert len(log_prob) == response_length and qkv_format == "thd"
    return log_prob[held(total_length, response_length)[0]]


def get_log_probs_and_entropy(
    logits: Tensor,
    *,
    args: Namespace,
    unconcat_tokens: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    with_entropy: bool = False,
    non_loss_data: bool = True,
    top_p_token_ids: None = None,
    top_p_token_offsets: None = None,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """log pi of this process's response tokens, one tensor a sequence."""
    assert logits.dtype == torch.float32 and logits.dim() == 3 and logits.shape[0] == 1
    parts = logits[0, :, 0].split([local_length(total) for total in total_lengths])
    lengths = zip(total_lengths, response_lengths, strict=True)
    return logits.new_empty(0), {
        "log_probs": [part[held(*pair)[1]] for part, pair in zip(parts, lengths, strict=True)],
    }


def get_sum_of_sample_mean(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    rollout_mask_sums: Tensor,
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Sum over this process's tokens of x mask / (tokens of the rollout), or of x mask."""
    pieces = [
        slice_log_prob_with_cp(mask, total, response)
        for mask, total, response in zip(loss_masks, total_lengths, response_lengths, strict=True)
    ]

    def reduce(x: Tensor) -> Tensor:
        value = x.new_zeros(())
        for part, mask, count in zip(x.split([len(p) for p in pieces]), pieces, rollout_mask_sums, strict=True):
            value = value + (part * mask).sum() / (1 if calculate_per_token_loss else count.clamp(min=1))
        return value

    return reduce


def policy_loss_function(args: Namespace, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """slime's own; a custom loss is called as it is."""
    raise AssertionError("the custom loss stands in for it")


def loss_function(
    args: Namespace, batch: dict[str, Any], num_microbatches: int, step_global_batch_size: float, logits: Tensor
) -> tuple[Tensor, Any, dict[str, Any]]:
    """``--loss-type custom_loss``: the loss scaled for Megatron, its normaliser, and metrics as one vector."""
    assert args.loss_type == "custom_loss"
    reducer = get_sum_of_sample_mean(
        batch["total_lengths"],
        batch["response_lengths"],
        batch["loss_masks"],
        batch["rollout_mask_sums"],
        args.calculate_per_token_loss,
    )
    module, name = args.custom_loss_function_path.rsplit(".", 1)
    value, log = getattr(import_module(module), name)(args, batch, logits, reducer)
    tokens = sum(mask.sum() for mask in batch["loss_masks"])
    processes = context_parallel()[1]  # of data and context parallelism, too: one data-parallel process
    if args.calculate_per_token_loss:
        value = value * processes
    else:
        value = value * num_microbatches / step_global_batch_size * processes
    per_token = args.calculate_per_token_loss
    vector = torch.tensor([float(tokens) if per_token else 0.0, *log.values()])
    return value, tokens if per_token else torch.tensor(1), {"keys": list(log), "values": vector}


def share(args: Namespace, batch: dict[str, Any], size: float, logits: Tensor) -> tuple[Tensor, dict[str, float]]:
    """A micro-batch's share of the step's loss: Megatron divides by the tokens of all processes, or averages over them.

    `size` : loss tokens of the step (per-token loss), or its rollouts.
    """
    value, _, log = loss_function(args, batch, 1, size, logits)
    processes = context_parallel()[1]
    value = value / (size * processes if args.calculate_per_token_loss else processes)
    return value, dict(zip(log["keys"], log["values"][1:].tolist(), strict=True))


def cut(x: Tensor, prompt: int) -> Tensor:
    """A response's values ``[T]`` -> this process's piece, as slime keeps rollout data."""
    return slice_log_prob_with_cp(x, prompt + len(x), len(x))


def install(modules: dict[str, Any]) -> None:
    """Put the modules where slime has them."""
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        modules[name] = ModuleType(name)
    here = sys.modules[__name__]
    for name in ("cp_utils", "loss"):
        modules[f"slime.backends.megatron_utils.{name}"] = here
        setattr(modules["slime.backends.megatron_utils"], name, here)


def arguments(cppo: Any, per_token: bool = False, **more: Any) -> Namespace:
    """slime's arguments, as far as the loss layer reads them."""
    return Namespace(
        loss_type="custom_loss",
        custom_loss_function_path="cppo.engines.slime.loss",
        calculate_per_token_loss=per_token,
        cppo=cppo,
        use_tis=False,
        use_opsm=False,
        entropy_coef=0.0,
        kl_loss_coef=0.0,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        **more,
    )


def batch_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """slime's micro-batch from sequences of ``prompt`` and response columns ``rollout``, ``advantage``, ``mask``."""
    responses = [len(p["mask"]) for p in parts]
    totals = [p["prompt"] + n for p, n in zip(parts, responses, strict=True)]
    masks = [p["mask"].int() for p in parts]
    return {
        "unconcat_tokens": [torch.zeros(n, dtype=torch.long) for n in totals],
        "total_lengths": totals,
        "response_lengths": responses,
        "loss_masks": masks,
        "rollout_mask_sums": torch.stack([m.sum() for m in masks]).float(),
        "advantages": [cut(p["advantage"], p["prompt"]) for p in parts],
        "rollout_log_probs": [cut(p["rollout"], p["prompt"]) for p in parts],
        "log_probs": [cut(torch.full_like(p["rollout"], -3.0), p["prompt"]) for p in parts],  # recomputed: not read
    }
