"""The ways to score tokens that `benchmarks.scoring` compares: what each is given, what it gives, where it comes from.

Inputs are synthetic rows as peaked as a language model's: 8 of V tokens are favoured, the first of them by a logit
between 13 and 27 (so that it has 30% to 100% of the mass, as the case may be), all others have normal logits of
standard deviation 2. The rollout policy's rows differ by normal noise, log-normal in size from row to row, so that a
few tokens in a hundred have a total variation near the limits of a rule and most a tiny one, as in rollouts of a
training run (docs/divergences.md). Where divergences are measured, their quantiles are in the results. The tail
beyond the top 20 has 3% of the mass on average; "short tails" favours the first tokens by 4 more, and it has 0.7%.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import cppo
from cppo.divergence import topk_interval
from cppo.scoring import Distributions, adaptive_for_rule, exact_divergence, score_tokens

TOP_K, FAVOURED, RESPONSE = 20, 8, 256
DRIFT, DRIFT_SPREAD = 0.02, 1.5


@dataclass
class Inputs:
    """N tokens: the policy's hidden states and head, the sampled tokens, 20 ids each, the gradients that come back."""

    hidden: Tensor  # [N, d]
    lm_head: Tensor  # [V, d]
    tokens: Tensor  # [N]
    candidates: Tensor  # [N, 20]
    gradient: Tensor  # [N]
    rollout_hidden: Tensor
    rollout_head: Tensor | None  # [V, d], where wanted
    notes: dict[str, float] = field(default_factory=dict)  # what else a call found out


def make_inputs(
    tokens: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    rollout: bool,
    device: str = "cpu",
    lead: float = 0.0,
) -> Inputs:
    """lead : by how much more than above the first tokens are favoured."""
    g = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=g, device=device)
    head = normal(vocabulary, width).mul_(width**-0.5)
    favoured = torch.randint(vocabulary, (tokens, TOP_K), generator=g, device=device)
    gaps = torch.empty(tokens, FAVOURED, device=device).exponential_(0.5, generator=g)
    gaps[:, 0] = 0
    strength = 13 + lead + 14 * torch.rand(tokens, 1, generator=g, device=device) - gaps.cumsum(1)
    rollout_hidden = normal(tokens, width).mul_(2)
    for j in range(FAVOURED):
        rollout_hidden += strength[:, j, None] * head[favoured[:, j]]
    drift = DRIFT * (DRIFT_SPREAD * normal(tokens, 1)).exp()
    hidden = rollout_hidden + drift * normal(tokens, width)
    chosen = strength.softmax(1).multinomial(1, generator=g)
    rollout_head = (head + 0.01 * width**-0.5 * normal(vocabulary, width)).to(dtype) if rollout else None
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        head.to(dtype).requires_grad_(),
        favoured.gather(1, chosen)[:, 0],
        favoured,
        normal(tokens),
        rollout_hidden.to(dtype),
        rollout_head,
    )


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Method:
    """`make(inputs)` prepares (not measured) and returns the call to measure, which returns ``[N]``.

    gives : for the table. backward : whether the call's result is then differentiated. rollout : whether it needs mu's
    head. own_products : multiplies float32 copies on a CPU, whatever the inputs are (and so do not depend on how fast
    the CPU multiplies bfloat16). full_logits : how many matrices [N, V] of float32 it holds at a time, about; 0: fewer
    than one. environment : the virtual environment beside this one that it needs. lead : as in `make_inputs`.
    """

    make: Callable[[Inputs], Call]
    gives: str
    backward: bool = True
    rollout: bool = False
    own_products: bool = True
    full_logits: int = 0
    environment: str = ""
    lead: float = 0.0


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(x: Inputs, everything: bool, top: int = 0, backend: str = "torch") -> Call:
    def call() -> Tensor:
        ids = x.candidates if everything else None
        return score_tokens(
            x.hidden, x.lm_head, x.tokens, ids, entropy=everything, want_top_k=top, backend=backend
        ).logp

    return call


def half_masked(x: Inputs) -> Call:
    x.gradient[::2] = 0
    return ours(x, everything=False)


def exact(x: Inputs, known: bool) -> Call:
    assert x.rollout_head is not None
    both = [Distributions(x.hidden.detach(), x.lm_head.detach()), Distributions(x.rollout_hidden, x.rollout_head)]
    if known:
        both = [Distributions(p.hidden, p.lm_head, logsumexp(p)) for p in both]
    return lambda: exact_divergence(*both)


@torch.no_grad()
def logsumexp(p: Distributions) -> Tensor:
    found = score_tokens(
        p.hidden, p.lm_head, torch.zeros(p.hidden.shape[0], dtype=torch.int64, device=p.hidden.device)
    ).logsumexp
    assert found is not None
    return found


@torch.no_grad()
def topk(x: Inputs, adaptive: bool) -> Call:
    """pi scored at the sampled token and mu's top 20, the interval, and CPPO's verdict: by TV_K, or by the exact TV
    where it decides. Responses of 256 tokens. What is known of mu (its top 20 and logsumexp) was taken when it sampled.
    """
    assert x.rollout_head is not None
    mu = score_tokens(x.rollout_hidden, x.rollout_head, x.tokens, want_top_k=TOP_K)
    ids, top_logp = mu.top_ids, mu.top_logp
    assert ids is not None and top_logp is not None
    rollout = Distributions(x.rollout_hidden, x.rollout_head, mu.logsumexp)
    inside = (ids == x.tokens[:, None]).any(-1)
    rule = cppo.CPPO(divergence="adaptive_tv")
    rows = max(1, x.tokens.numel() // RESPONSE)
    if adaptive:
        tv = exact_divergence(Distributions(x.hidden.detach(), x.lm_head.detach()), rollout).float()
        x.notes |= {f"tv_p{percent}": torch.quantile(tv, percent / 100).item() for percent in (50, 90, 99)}
        x.notes["tail"] = 1 - top_logp.exp().sum(-1).mean().item()

    def call() -> Tensor:
        pi = score_tokens(x.hidden, x.lm_head, x.tokens, ids)
        assert pi.candidate_logp is not None
        ends = topk_interval(pi.candidate_logp, top_logp, pi.logp, mu.logp, inside)
        lower, upper = (end.view(rows, -1) for end in ends)
        policy = Distributions(x.hidden, x.lm_head, pi.logsumexp)
        advantages = x.gradient.view(rows, -1)[:, 0]
        mask = torch.ones_like(lower, dtype=torch.bool)
        batch = cppo.TokenBatch(pi.logp.view(rows, -1), mu.logp.view(rows, -1), advantages, mask)
        divergence = lower
        if adaptive:
            found = adaptive_for_rule(
                rule, batch, lower, upper, lambda at: exact_divergence(policy.at(at), rollout.at(at))
            )
            divergence = found.divergence
            x.notes["resolved"] = found.resolved.float().mean().item()
        return rule(batch.with_divergence(divergence)).coefficient.flatten()

    return call


# -- full logits -------------------------------------------------------------------------------------------------------


def naive(x: Inputs, own_products: bool) -> Call:
    """Logits, in float32 as trainers have them, log_softmax, gathers, entropy; kept for the backward pass."""

    def call() -> Tensor:
        hidden, head = (x.hidden.float(), x.lm_head.float()) if own_products else (x.hidden, x.lm_head)
        logp = (hidden @ head.t()).float().log_softmax(-1)
        with torch.no_grad():
            logp.gather(1, x.candidates)
            -(logp.exp() * logp).sum(-1)
        return logp.gather(1, x.tokens[:, None])[:, 0]

    return call


def naive_exact(x: Inputs, own_products: bool) -> Call:
    """Both policies' full rows of probabilities."""
    assert x.rollout_head is not None
    both = ((x.hidden.detach(), x.lm_head.detach()), (x.rollout_hidden, x.rollout_head))

    def probabilities(hidden: Tensor, head: Tensor) -> Tensor:
        if own_products:
            hidden, head = hidden.float(), head.float()
        return (hidden @ head.t()).float().softmax(-1)

    def call() -> Tensor:
        pi, mu = (probabilities(*policy) for policy in both)
        return 0.5 * (pi - mu).abs().sum(-1)

    return call


def verl_full(x: Inputs) -> Call:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    def call() -> Tensor:
        logits = x.hidden @ x.lm_head.t()
        with torch.no_grad():
            entropy_from_logits(logits)
        return logprobs_from_logits(logits, x.tokens)

    return call


# -- others that do not keep the logits --------------------------------------------------------------------------------


def verl_fused(x: Inputs) -> Call:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    score = FusedLinearForPPO()
    return lambda: score(x.hidden, x.lm_head, x.tokens)[0]


def trl_fused(x: Inputs) -> Call:
    """What `add_fused_lm_head(outputs=("log_probs", "entropy"))`, as GRPOTrainer calls it, applies to hidden states."""
    from trl.trainer import utils

    size, outputs = utils._CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs", "entropy")
    score = utils._ChunkedLogProbFunction.apply
    return lambda: score(x.hidden, x.lm_head, None, x.tokens, 1.0, size, None, 1.0, outputs)[0]


def liger_chunked(x: Inputs) -> Call:
    """The log-probabilities of Liger's chunked GRPO loss (`LigerFusedLinearGRPOLoss`)."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    score = LigerFusedLinearPPOBase.chunk_forward
    return lambda: score(x.hidden[None], x.lm_head, x.tokens[None])[0]


def liger_scaled(x: Inputs) -> Call:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    score = LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda: -score(x.hidden, x.lm_head, x.tokens, 1.0, -100, 1, True)[0]


def torch_default(x: Inputs) -> Call:
    options = torch.nn.LinearCrossEntropyOptions()
    score = partial(torch.nn.functional.linear_cross_entropy, reduction="none", options=options)
    return lambda: -score(x.hidden, x.lm_head, x.tokens)


ALL, LOGP = "log-prob, 20 ids, logsumexp, entropy", "log-prob"

METHODS: dict[str, Method] = {
    # log-probabilities and their gradients
    "ours": Method(partial(ours, everything=True), ALL),
    "ours, log-prob only": Method(partial(ours, everything=False), LOGP),
    "ours, half of the rows masked": Method(half_masked, LOGP),
    "naive": Method(partial(naive, own_products=False), ALL, own_products=False, full_logits=4),
    "naive, float32 products": Method(partial(naive, own_products=True), ALL, full_logits=4),
    "TRL": Method(trl_fused, "log-prob, entropy", own_products=False),
    "verl, full logits": Method(
        verl_full, "log-prob, entropy", own_products=False, full_logits=4, environment=".venv-verl"
    ),
    "verl, fused": Method(verl_fused, "log-prob, entropy", own_products=False, environment=".venv-verl"),
    "Liger, chunked loss": Method(liger_chunked, LOGP, own_products=False),
    "Liger, scaled cross-entropy": Method(liger_scaled, "log-prob, entropy", own_products=False),
    "torch linear_cross_entropy": Method(torch_default, LOGP, own_products=False),
    "the same, large chunks": Method(partial(ours, everything=False, backend="linear_cross_entropy"), LOGP),
    # forward alone
    "forward, log-prob": Method(partial(ours, everything=False), LOGP, backward=False),
    "forward, all": Method(partial(ours, everything=True), ALL, backward=False),
    "forward, own top 20": Method(partial(ours, everything=False, top=TOP_K), "log-prob, top 20", backward=False),
    # divergences
    "exact TV, logsumexps known": Method(partial(exact, known=True), "TV", backward=False, rollout=True),
    "exact TV": Method(partial(exact, known=False), "TV", backward=False, rollout=True),
    "naive exact TV": Method(
        partial(naive_exact, own_products=False), "TV", backward=False, rollout=True, own_products=False, full_logits=4
    ),
    "naive exact TV, float32 products": Method(
        partial(naive_exact, own_products=True), "TV", backward=False, rollout=True, full_logits=4
    ),
    "top-K TV": Method(partial(topk, adaptive=False), "verdict", backward=False, rollout=True),
    "adaptive TV": Method(partial(topk, adaptive=True), "verdict", backward=False, rollout=True),
    "top-K TV, short tails": Method(partial(topk, adaptive=False), "verdict", backward=False, rollout=True, lead=4.0),
    "adaptive TV, short tails": Method(partial(topk, adaptive=True), "verdict", backward=False, rollout=True, lead=4.0),
}
