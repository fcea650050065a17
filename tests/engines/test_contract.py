"""The contract suite itself: the core passes it, and for every check there is an engine that breaks that promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import cppo
from cppo.engines.support import TrustRegionLoss, sampled_token_rule
from cppo.errors import UserError
from cppo.layout_sharded import Shard

from . import contract
from .contract import Outcome, Sample
from .contract_processes import in_processes

GARBAGE = -7.5  # what stands in prompts and padding


def padded(samples: Sequence[Sample], width: int = 0) -> dict[str, Tensor]:
    """Rows of prompt + response + padding."""
    width = max(width, *(len(s) for s in samples))
    rows: dict[str, Tensor] = {}
    for name in ("policy", "rollout", "mask"):
        row = torch.full((len(samples), width), 0.0 if name == "mask" else GARBAGE)
        for i, s in enumerate(samples):
            row[i, s.prompt : len(s)] = getattr(s.response, name).float()
        rows[name] = row
    rows["advantages"] = torch.tensor([s.advantage for s in samples])
    return rows


def packed(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """One row of all tokens, and boundaries."""
    rows = {
        name: torch.cat(
            [
                torch.cat([torch.full((s.prompt,), 0.0 if name == "mask" else GARBAGE), getattr(s.response, name)])
                for s in samples
            ]
        )
        for name in ("policy", "rollout", "mask")
    }
    rows["cu_seqlens"] = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0).to(torch.int32)
    rows["advantages"] = torch.tensor([s.advantage for s in samples])
    return rows


class Core(contract.Engine):
    """The core as an engine: token-mean over all tokens of the step. Its methods are what the broken engines break."""

    name = "core"
    layouts = ("padded", "packed")
    shards = (2, 3)
    anchor_setting = "rollout_logp"

    def batch(self, rows: dict[str, Tensor], policy: Tensor) -> cppo.TokenBatch:
        return cppo.TokenBatch(
            policy, rows["rollout"], rows["advantages"], rows["mask"], cu_seqlens=rows.get("cu_seqlens")
        )

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        judge = TrustRegionLoss(sampled_token_rule(rule, self.name), self.name, max_on_policy_divergence=limit)
        return lambda batch: judge(batch).loss

    def tokens(self, samples: Sequence[Sample], micro_batch: Sequence[int]) -> float:
        """The denominator."""
        return float(sum(int(s.response.mask.sum()) for s in samples))

    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        loss = self.loss(rule, max_on_policy_divergence)
        gradients: dict[int, Tensor] = {}
        denominators: dict[int, float] = {}
        for indices in micro_batches:
            chosen = [samples[i] for i in indices]
            rows = padded(chosen) if layout == "padded" else packed(chosen)
            policy = rows["policy"].requires_grad_()
            tokens = self.tokens(samples, indices)
            (grad,) = torch.autograd.grad(loss(self.batch(rows, policy)).sum() / tokens, policy)
            parts = list(grad) if layout == "padded" else grad.split([len(s) for s in chosen])
            for i, s, part in zip(indices, chosen, parts, strict=True):
                gradients[i], denominators[i] = part[s.prompt : len(s)], tokens
        order = range(len(samples))
        return Outcome([gradients[i] for i in order], [denominators[i] for i in order])

    def run_shards(self, samples: Sequence[Sample], cases: Sequence[str], shards: int) -> list[Outcome]:
        return in_processes(run_shard, samples, cases, shards)

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        try:
            rows = padded(samples)
            self.batch({**rows, "rollout": None}, rows["policy"])  # type: ignore[dict-item]
        except ValueError as error:  # the core knows no settings; adapters name theirs
            raise UserError(str(error)) from error


def run_shard(samples: list[Sample], cases: list[str], alone: bool = False) -> list[Outcome]:
    """One process's zigzag slice of the padded rows. `alone`: judged without looking at the others' (wrong)."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    length = -(-max(len(s) for s in samples) // (2 * size))
    rows = padded(samples, 2 * size * length)
    shard = Shard.zigzag()
    columns = torch.cat([torch.arange(c * length, (c + 1) * length) for c in shard.chunks])
    tokens = float(rows["mask"].sum())
    out = []
    for case in cases:
        policy = rows["policy"][:, columns].requires_grad_()
        rest = {k: v[:, columns] for k, v in rows.items() if k in ("rollout", "mask")}
        batch = cppo.TokenBatch(
            policy, rest["rollout"], rows["advantages"], rest["mask"], shard=None if alone else shard
        )
        verdict = contract.make(case)(batch)
        (grad,) = torch.autograd.grad(cppo.token_loss(batch, verdict.coefficient).sum() / tokens, policy)
        whole = torch.zeros(rows["policy"].shape)
        whole[:, columns] = grad
        gradients = [row[s.prompt : len(s)] for row, s in zip(whole, samples, strict=True)]
        out.append(Outcome(gradients, [tokens] * len(samples)))
    assert rank < size
    return out


def run_shard_alone(samples: list[Sample], cases: list[str]) -> list[Outcome]:
    return run_shard(samples, cases, alone=True)


@contract.suite(Core())
def test_core(check: Callable[[], None]) -> None:
    check()


# ------------------------------------------------------------------------------------------------------ broken engines


class WrongLimit(Core):
    """delta is not the one that was asked for."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        return super().loss(replace(rule, delta=2 * rule.delta) if hasattr(rule, "delta") else rule, limit)


class NoRatio(Core):
    """Every token weighs 1: not importance sampling."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        return super().loss(cppo.CISPO(ratio_min=1 - 1e-9, ratio_max=1.0), limit)


class OneLongSequence(Core):
    """Packed sequences are taken for a single one."""

    def batch(self, rows: dict[str, Tensor], policy: Tensor) -> cppo.TokenBatch:
        if "cu_seqlens" in rows:
            edges = rows["cu_seqlens"]
            lengths = edges.diff().tolist()
            advantages = torch.cat(
                [a.expand(n) for a, n in zip(rows["advantages"], lengths, strict=True)],
            )
            rows = {**rows, "cu_seqlens": edges[[0, -1]], "advantages": advantages}
        return super().batch(rows, policy)


class PaddingCounts(Core):
    """Whatever lies behind the prompt of a row counts as a loss token, padding included."""

    layouts = ("padded",)

    def batch(self, rows: dict[str, Tensor], policy: Tensor) -> cppo.TokenBatch:
        return super().batch({**rows, "mask": (rows["mask"].cumsum(-1) > 0).float()}, policy)


class PromptCounts(Core):
    """Prompt tokens are taken for loss tokens."""

    layouts = ("padded",)

    def batch(self, rows: dict[str, Tensor], policy: Tensor) -> cppo.TokenBatch:
        return super().batch({**rows, "mask": (rows["mask"].flip(-1).cumsum(-1).flip(-1) > 0).float()}, policy)


class HolesCount(Core):
    """The mask is filled between a response's first and last loss token."""

    layouts = ("padded",)

    def batch(self, rows: dict[str, Tensor], policy: Tensor) -> cppo.TokenBatch:
        mask = rows["mask"]
        filled = (mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)
        return super().batch({**rows, "mask": filled.float()}, policy)


class OwnTokens(Core):
    """Every micro-batch is averaged over its own tokens."""

    def tokens(self, samples: Sequence[Sample], micro_batch: Sequence[int]) -> float:
        return super().tokens([samples[i] for i in micro_batch], micro_batch)


class StatefulLimit(Core):
    """The limit tightens from call to call."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        calls = 0

        def judge(batch: cppo.TokenBatch) -> Tensor:
            nonlocal calls
            calls += 1
            tighter = replace(rule, delta=rule.delta / calls) if hasattr(rule, "delta") else rule
            return cppo.token_loss(batch, tighter(batch).coefficient)

        return judge


class ShardsAlone(Core):
    """Every context-parallel process judges its slice on its own."""

    shards = (2,)

    def run_shards(self, samples: Sequence[Sample], cases: Sequence[str], shards: int) -> list[Outcome]:
        return in_processes(run_shard_alone, samples, cases, shards)


class Multiplies(Core):
    """The mask is multiplied, not selected: NaN times 0 is NaN."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        def judge(batch: cppo.TokenBatch) -> Tensor:
            ratio = (batch.policy_logp - batch.rollout_logp).exp()
            keep = (rule(batch).coefficient != 0).float()
            return -ratio * batch.token_advantages() * keep * batch.mask

        return judge


class KeptOnly(Core):
    """Rejected tokens leave the denominator."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        def judge(batch: cppo.TokenBatch) -> Tensor:
            verdict = rule(batch)
            share = (verdict.coefficient != 0).sum() / batch.mask.sum()
            return cppo.token_loss(batch, verdict.coefficient) / share.clamp(min=1e-6)

        return judge


class EmptyMean(Core):
    """A response is averaged over its own tokens, of which there are none."""

    layouts = ("padded",)

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        def judge(batch: cppo.TokenBatch) -> Tensor:
            count = batch.mask.sum(-1, keepdim=True)
            return -rule(batch).coefficient * batch.token_advantages() * batch.policy_logp / count * count

        return judge


class FallsBack(Core):
    """Without rollout log-probabilities the policy's own are taken: nothing is ever off-policy."""

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        rows = padded(samples)
        self.batch({**rows, "rollout": rows["policy"].detach()}, rows["policy"])


class Substitutes(Core):
    """A divergence that cannot be had is replaced silently."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        given = rule.parameters()
        return super().loss(type(rule)(**{**given, "divergence": "binary_tv"}), limit)


class Trusting(Core):
    """Never looks at the first batch."""

    def loss(self, rule: Any, limit: float | None) -> Callable[[cppo.TokenBatch], Tensor]:
        return super().loss(rule, None)


BROKEN: dict[str, tuple[type[Core], ...]] = {  # check -> the engines that must fail it
    "reference": (WrongLimit, NoRatio, PromptCounts),
    "golden": (WrongLimit, NoRatio, PromptCounts),
    "keep_all": (NoRatio,),
    "layouts": (OneLongSequence,),
    "batch_mates": (PaddingCounts, OneLongSequence),
    "micro_batches": (StatefulLimit, PaddingCounts),
    "reduction": (OwnTokens,),
    "shards": (ShardsAlone,),
    "garbage": (Multiplies,),
    "prompts": (PromptCounts,),
    "holes": (HolesCount, PaddingCounts),
    "denominators": (KeptOnly,),
    "empty": (EmptyMean, Multiplies),
    "anchor": (FallsBack,),
    "topk": (Substitutes,),
    "first_update": (Trusting,),
}


def test_every_check_has_an_engine_that_fails_it() -> None:
    assert set(BROKEN) == set(contract.CHECKS)


@pytest.mark.parametrize(
    "name, engine", [pytest.param(n, e, id=f"{n}-{e.__name__}") for n, engines in BROKEN.items() for e in engines]
)
def test_the_check_fails(name: str, engine: type[Core]) -> None:
    """Fails by an assertion (or by the missing error), not by stumbling."""
    arguments = ("cppo adaptive",) if name in contract.PER_CASE else ()
    with pytest.raises((AssertionError, pytest.fail.Exception)) as failure:
        contract.CHECKS[name](engine(), *arguments)
    assert "Traceback" not in str(failure.value)  # of a process that stumbled


def test_what_does_not_apply_is_named() -> None:
    class Partial(Core):
        layouts = ("padded",)
        shards = ()
        not_applicable: ClassVar = {"shards": "no context parallelism", "topk": "the engine has top-K"}
        unsupported: ClassVar = {"cppo kl": "no KL"}

    skipped = {}
    for parameter in contract.checks(Partial()):
        (call,) = parameter.values
        if call.func is contract._skip:
            with pytest.raises(pytest.skip.Exception) as reason:
                call()
            skipped[parameter.id] = str(reason.value)
    assert skipped.keys() == {"shards", "topk", "layouts", "reference-cppo kl"}
    assert "no context parallelism" in skipped["shards"] and "one layout only" in skipped["layouts"]
    assert "no KL" in skipped["reference-cppo kl"]


def test_unknown_names_are_errors() -> None:
    class Wrong(Core):
        not_applicable: ClassVar = {"shard": "typo"}

    with pytest.raises(AssertionError, match="names no check"):
        contract.checks(Wrong())
    silent = type("Silent", (Core,), {"shards": ()})
    with pytest.raises(AssertionError, match="shards"):
        contract.checks(silent())
