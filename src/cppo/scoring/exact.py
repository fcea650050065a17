"""Exact divergences over the whole vocabulary, streamed: no logits are kept, no row of probabilities ever exists.

    TV = 1/2 sum_v |mu(v) - pi(v)|          KL(mu || pi) = sum_v mu(v) log(mu(v) / pi(v))

Both policies' logits are made a tile at a time, turned into probabilities by their logsumexp, and summed up: one
product with each lm_head. A logsumexp that is not known costs one more product with that head, first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from cppo.scoring import backends
from cppo.scoring.logits import LogitMap, Operands, tile_shape
from cppo.scoring.parallel import VocabShard, merge, rank_and_size
from cppo.scoring.tokens import check_inputs, logit_map

KINDS = ("tv", "kl")


@dataclass(frozen=True, eq=False)
class Distributions:
    """One policy's next-token distributions at N = ... states: softmax(z/T), z as in `cppo.scoring.logits`.

    Parameters
    ----------
    hidden : final hidden states, float ``[..., d]``. lm_head : ``[V, d]``; with a shard this rank's rows.
    logsumexp : log sum_v exp(z_v/T), ``[...]``, over the whole vocabulary, where it is known (`score_tokens` tells it;
        it is z_y/T - log pi(y), too). None: computed.
    temperature, bias, softcap, logit_scale, logits_dtype : as in `score_tokens`.
    """

    hidden: Tensor
    lm_head: Tensor
    logsumexp: Tensor | None = None
    temperature: float | Tensor = 1.0
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    logits_dtype: torch.dtype | None = None

    def at(self, index: Tensor) -> Distributions:
        """The states at flat positions `index`, int64 ``[M]``."""

        def pick(x: Tensor) -> Tensor:
            return x.reshape(-1)[index]

        return replace(
            self,
            hidden=self.hidden.reshape(-1, self.hidden.shape[-1])[index],
            logsumexp=None if self.logsumexp is None else pick(self.logsumexp),
            temperature=pick(self.temperature) if isinstance(self.temperature, Tensor) else self.temperature,
        )


@torch.no_grad()
def exact_divergence(
    policy: Distributions,
    rollout: Distributions,
    *,
    kind: str = "tv",
    shard: VocabShard | None = None,
    backend: str = "auto",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """D(mu, pi) at every state over the whole vocabulary; without gradient.

    Parameters
    ----------
    policy, rollout : pi and mu at the same states. kind : "tv", in [0, 1], or "kl": KL(mu || pi) in nats, masses below
        1e-12 counting as 1e-12 (as in `cppo.divergence.exact_kl`).
    shard : which rows of both lm_heads these are; None: all. Every rank of its group makes the same call; one
        all-reduce SUM (and two collectives for each logsumexp that is not known).
    backend : "torch", "triton" or "auto", as in `score_tokens`.
    tile : (tokens, vocabulary columns) held at a time; None: by device.

    Returns
    -------
    ``[...]``, float32 (float64 for float64 logits).

    Raises
    ------
    ValueError : the two do not fit each other; an argument is not what is expected.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected 'tv' or 'kl'.")
    here = check_inputs(policy.hidden, policy.lm_head, policy.bias, shard)
    check_inputs(rollout.hidden, rollout.lm_head, rollout.bias, shard)
    lead = policy.hidden.shape[:-1]
    if rollout.hidden.shape[:-1] != lead or rollout.lm_head.shape[0] != policy.lm_head.shape[0]:
        raise ValueError(
            f"policy has hidden states {list(policy.hidden.shape)} and a head {list(policy.lm_head.shape)}, rollout "
            f"{list(rollout.hidden.shape)} and {list(rollout.lm_head.shape)}: expected the same states and vocabulary."
        )
    shape = tile_shape(policy.hidden.device, tile)
    maps = [
        logit_map(p.hidden, p.temperature, p.softcap, p.logit_scale, p.logits_dtype).with_bias(p.bias)
        for p in (policy, rollout)
    ]
    module = backends.module(backends.choose(backend, policy.hidden, maps[0], policy.bias, shard, logp_only=False))
    with torch.autocast(policy.hidden.device.type, enabled=False):
        pi, mu = (
            _operands(name, given, logits, module, here, shard, shape)
            for name, given, logits in zip(("policy", "rollout"), (policy, rollout), maps, strict=True)
        )
        total = module.exact_partial(pi, mu, kind=kind, valid=here.valid, tile=shape)
    if shard is not None and rank_and_size(shard.group)[1] > 1 and total.numel():
        torch.distributed.all_reduce(total, group=shard.group)
    total.clamp_(min=0.0)
    return (total.clamp_(max=1.0) if kind == "tv" else total).view(lead)


def _operands(
    name: str,
    given: Distributions,
    logits: LogitMap,
    module: ModuleType,
    here: VocabShard,
    shard: VocabShard | None,
    tile: tuple[int, int],
) -> Operands:
    """Flat tensors, and a logsumexp where none is given."""
    hidden = given.hidden.reshape(-1, given.hidden.shape[-1])
    if given.logsumexp is None:
        none = torch.zeros(hidden.shape[0], 0, dtype=torch.int64, device=hidden.device)
        part = module.forward(
            hidden, given.lm_head, none, logits, start=here.start, valid=here.valid, entropy=False, top_k=0, tile=tile
        )
        logsumexp = merge(part, shard, logits.temperature).logsumexp
    else:
        if given.logsumexp.shape != given.hidden.shape[:-1]:
            raise ValueError(
                f"{name}.logsumexp has shape {list(given.logsumexp.shape)}, expected {list(given.hidden.shape[:-1])}."
            )
        logsumexp = given.logsumexp.reshape(-1).to(logits.arithmetic)
    return Operands(hidden, given.lm_head, logits, logsumexp)
