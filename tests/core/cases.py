"""Random batches and the list of rules that the tests of the core run through.

A `Batch` is a list of responses (columns with their mask) that can be laid out padded or packed in any order; results
come back a response at a time, so that every layout is compared on equal terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cppo

from . import reference

GARBAGE = (float("nan"), float("inf"), float("-inf"), 95.0, -1e30)

#: name of the case -> (name of the rule, parameters). Thresholds suit the random batches: each clause is hit.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "ppo_clip": ("ppo_clip", {}),
    "ppo_clip symmetric": ("ppo_clip", {"eps_low": 0.2, "eps_high": 0.2}),
    "ppo_clip dual": ("ppo_clip", {"dual_clip": 1.5}),
    "cispo": ("cispo", {}),
    "cispo band": ("cispo", {"ratio_min": 0.7, "ratio_max": 1.3}),
    "minpro": ("minpro", {}),
    "minpro wide": ("minpro", {"eps_low": 0.9, "eps_high": 4.0}),
    "dppo": ("dppo", {"delta": 0.1}),
    "dppo capped": ("dppo", {"delta": 0.15, "ratio_cap": 1.1}),
    "trm_max": ("trm_max", {"delta": 0.18}),
    "trm_avg": ("trm_avg", {"delta": 0.05}),
    "trm_max_avg": ("trm_max_avg", {"delta": 0.2, "delta_avg": 0.06}),
    "cppo adaptive": ("cppo", {}),
    "cppo fixed": ("cppo", {"budget": "fixed", "delta_b": 0.03}),
    "cppo fixed w_min .6": ("cppo", {"budget": "fixed", "delta_b": 0.03, "w_min": 0.6, "delta": 0.1}),
    "cppo without weights": ("cppo", {"weights": "none"}),
    "cppo without budget": ("cppo", {"prefix_budget": False, "delta": 0.08}),
    "cppo without both": ("cppo", {"prefix_budget": False, "weights": "none", "delta": 0.08}),
    "cppo soft": ("cppo", {"gate": "reciprocal", "delta_b": 0.01}),
    "cppo soft without budget": ("cppo", {"gate": "reciprocal", "prefix_budget": False, "delta": 0.05}),
    "cppo soft sapo": ("cppo", {"gate": "sapo", "delta_b": 0.01, "delta": 0.08}),
    "cppo capped": ("cppo", {"ratio_cap": 1.1}),
    "cppo quantile": ("cppo", {"quantile": 0.5, "quantile_scale": 1.5, "budget_max": 5.0, "delta_b": 0.005}),
    "cppo kl": ("cppo", {"delta": 0.1, "delta_b": 0.002, "divergence": "binary_kl"}),
    "cppo cosine": ("cppo", {"weights": "cosine", "delta": 0.1, "w_min": 0.5, "budget": "fixed", "delta_b": 0.03}),
    "cppo matched": ("cppo", {"weights": "matched", "delta": 0.1, "w_min": 0.3, "delta_b": 0.03}),
    "cppo reversed": ("cppo", {"weights": "reversed", "delta": 0.1, "w_min": 0.5, "budget": "fixed", "delta_b": 0.03}),
    "cppo shuffled": ("cppo", {"weights": "shuffled", "delta": 0.1, "w_min": 0.5, "budget": "fixed", "delta_b": 0.03}),
}
NEEDS_DIVERGENCE = [case for case, (name, _) in CASES.items() if name in reference.NEEDS_DIVERGENCE]
REFERENCE_CASES = [case for case in CASES if case != "cppo shuffled"]  # its weights come from the package


def make(case: str) -> Any:
    """The rule of a case; rules with a divergence take the binary one, so that they run without `divergence=`."""
    name, parameters = CASES[case]
    if name in reference.NEEDS_DIVERGENCE:
        parameters = {"divergence": "binary_tv", **parameters}
    return cppo.make_rule(name, **parameters)


def reference_parameters(case: str) -> dict[str, Any]:
    parameters = dict(CASES[case][1])
    parameters.pop("divergence", None)
    if "quantile" in parameters:
        parameters["quantile_level"] = parameters.pop("quantile")
    if parameters.get("gate") is not None:
        parameters["gate"] = {"reciprocal": reference.reciprocal, "sapo": reference.sapo}[parameters["gate"]]
    return parameters


@dataclass
class Response:
    """One response: equally long float32 vectors over its columns."""

    policy: Tensor
    rollout: Tensor
    advantage: Tensor
    mask: Tensor
    divergence: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mask)

    def columns(self, index: Tensor) -> Response:
        """The response with only the given columns."""
        divergence = None if self.divergence is None else self.divergence[index]
        return Response(
            self.policy[index], self.rollout[index], self.advantage[index], self.mask[index], divergence=divergence
        )

    def reference(self, case: str, **extra: Any) -> reference.Result:
        """The slow reference on the float32 values as they are; binary divergence unless one is given."""
        name, _ = CASES[case]
        policy, rollout = self.policy.double().tolist(), self.rollout.double().tolist()
        divergence: list[float] | None = None
        if self.divergence is not None:
            divergence = self.divergence.double().tolist()
        elif name in reference.NEEDS_DIVERGENCE:
            kind = "binary_kl" if CASES[case][1].get("divergence") == "binary_kl" else "binary_tv"
            divergence = [
                reference.divergence(kind, [m, 1 - m], [p, 1 - p], 0) if inside else 0.0
                for p, m, inside in zip(
                    self.policy.double().exp().tolist(), self.rollout.double().exp().tolist(), self.mask, strict=True
                )
            ]
        return reference.rule(
            name,
            policy,
            rollout,
            self.advantage.double().tolist(),
            [bool(m) for m in self.mask],
            divergence,
            **{**reference_parameters(case), **extra},
        )


@dataclass
class Batch:
    """Responses in one layout. `tokens` is the TokenBatch; `split` cuts a result [like the tokens] into responses."""

    responses: list[Response]
    tokens: Any
    split: Callable[[Tensor], list[Tensor]] = field(repr=False)


def concatenated(responses: Sequence[Response], name: str, dtype: torch.dtype) -> Tensor:
    return torch.cat([getattr(r, name) for r in responses]).to(dtype)


def pack(responses: Sequence[Response], dtype: torch.dtype = torch.float32, grad: bool = False) -> Batch:
    """[N] and cu_seqlens."""
    lengths = [len(r) for r in responses]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    given = responses[0].divergence is not None
    tokens = cppo.TokenBatch(
        concatenated(responses, "policy", dtype).requires_grad_(grad),
        concatenated(responses, "rollout", dtype),
        concatenated(responses, "advantage", torch.float32),
        torch.cat([r.mask for r in responses]),
        cu_seqlens=cu,
        divergence=concatenated(responses, "divergence", torch.float32) if given else None,
    )
    return Batch(list(responses), tokens, lambda x: list(x.split(lengths)))


def pad(
    responses: Sequence[Response],
    left: int = 0,
    right: int = 0,
    garbage: float = 0.0,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
) -> Batch:
    """[B, T], with `left` columns in front (a prompt) and `right` behind, filled with `garbage`."""
    width = left + max(len(r) for r in responses) + right

    def rows(name: str, kind: torch.dtype, fill: float) -> Tensor:
        out = torch.full((len(responses), width), fill).to(kind)
        for row, r in zip(out, responses, strict=True):
            row[left : left + len(r)] = getattr(r, name).to(kind)
        return out

    given = responses[0].divergence is not None
    tokens = cppo.TokenBatch(
        rows("policy", dtype, garbage).requires_grad_(grad),
        rows("rollout", dtype, garbage),
        rows("advantage", torch.float32, garbage),
        rows("mask", torch.bool, 0),
        divergence=rows("divergence", torch.float32, garbage) if given else None,
    )
    return Batch(
        list(responses), tokens, lambda x: [row[left : left + len(r)] for row, r in zip(x, responses, strict=True)]
    )


def random_responses(
    seed: int,
    lengths: Sequence[int],
    scale: float = 0.3,
    holes: float = 0.0,
    token_advantages: bool = False,
    divergence: bool = False,
) -> list[Response]:
    """Random responses; `holes` is the share of columns outside the mask, whose entries are garbage."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        rollout = -torch.empty(length).exponential_(1.0, generator=g).clamp(min=1e-3)
        policy = (rollout + scale * torch.randn(length, generator=g)).clamp(max=-1e-4)
        size = length if token_advantages else 1
        advantage = torch.randn(size, generator=g).expand(length).clone()
        mask = torch.rand(length, generator=g) >= holes
        d = torch.rand(length, generator=g).pow(2) * 0.25 if divergence else None
        for values in (policy, rollout, d):
            if values is not None:
                fill = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), (length,), generator=g)]
                values[~mask] = fill[~mask]
        out.append(Response(policy, rollout, advantage, mask, d))
    return out


def gradient(batch: Batch, rule: Any) -> tuple[Tensor, Tensor, Any]:
    """Per-token loss, gradient of its sum with respect to the policy's log-probabilities, and the verdict."""
    verdict = rule(batch.tokens)
    loss = cppo.token_loss(batch.tokens, verdict.coefficient)
    (grad,) = torch.autograd.grad(loss.sum(), batch.tokens.policy_logp)
    return loss.detach(), grad, verdict
