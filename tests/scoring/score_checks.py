"""One process of a group (started by test_shards.py): a vocabulary-parallel lm_head, and sequence shards, compared with
whole logits in float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from cppo.scoring import VocabShard, exact_divergence, score_tokens

from . import dense
from .dense import Head
from .test_exact import pair, total_variation
from .test_score_tokens import close, close_gradient
from .vocab_cases import Collectives, chunked

CASES = (
    Head("plain"),
    Head("float64", dtype=torch.float64, temperature="each"),
    Head("everything", softcap=3.0, logit_scale=0.5, bias="finite", temperature=0.7),
    Head("masked", bias="masked"),
    Head("huge", scale=1e4),
    Head("fewer ids than ranks times k", vocab=8, candidates=7),
    Head("bfloat16", dtype=torch.bfloat16),
    Head("no row", tokens=0),
)


def shards(vocab: int, size: int) -> list[tuple[str, VocabShard]]:
    each = -(-vocab // size)
    return [
        ("padded", VocabShard.equal(each + 130, vocab)),  # the last part may be padding alone
        ("chunked", chunked(vocab)),
    ]


def cut(x: Tensor | None, shard: VocabShard) -> Tensor | None:
    """This rank's rows; padding rows hold what would do most harm."""
    if x is None:
        return None
    mine = x[shard.start : min(shard.stop, shard.vocab_size)]
    return torch.cat([mine, torch.full((shard.columns - len(mine), *x.shape[1:]), torch.nan, dtype=x.dtype)])


def check_scores(case: Head, name: str, shard: VocabShard, digest: hashlib._Hash) -> None:
    hidden, head, ids, candidates = case.inputs()
    options = case.settings()
    what, top, size = f"{case.name}, {name}", min(6, case.vocab), case.scale * 6
    wanted = [x.clone().double().requires_grad_() for x in (hidden, head)]
    z = dense.logits(*wanted, **options)
    logp = z.log_softmax(-1)
    mine = hidden.clone().requires_grad_(), cut(head, shard)
    assert mine[1] is not None
    mine[1].requires_grad_()
    local = options | {"bias": cut(options["bias"], shard)}
    with Collectives() as seen:
        got = score_tokens(*mine, ids, candidates, want_top_k=top, entropy=True, shard=shard, tile=(5, 60), **local)
    arithmetic = got.logp.dtype
    if case.tokens:
        reduced = [call for call in seen.calls if call[0] == "allreduce_"]
        width = case.candidates + 1 + 2
        assert reduced == [("allreduce_", case.tokens, arithmetic), ("allreduce_", case.tokens * width, arithmetic)]
        assert len(seen.calls) == 4, f"{what}: two more for the top k: {seen.calls}"
    assert got.candidate_logp is not None and got.logsumexp is not None and got.entropy is not None
    assert got.top_logp is not None and got.top_ids is not None
    close(got.logp.detach(), logp.gather(1, ids[:, None])[:, 0].detach(), size, f"{what}: logp")
    close(got.candidate_logp, logp.gather(1, candidates).detach(), size, f"{what}: candidates")
    close(got.logsumexp, z.logsumexp(-1).detach(), size, f"{what}: logsumexp")
    close(got.entropy, dense.entropy(logp.detach()), size, f"{what}: entropy")
    close(got.top_logp, logp.topk(top).values.detach(), size, f"{what}: top k")
    close(got.top_logp, logp.gather(1, got.top_ids).detach(), size, f"{what}: ids of the top k")
    for value in (got.logp.detach(), got.candidate_logp, got.entropy, got.top_ids):
        digest.update(value.numpy().tobytes())

    weights = torch.randn(case.tokens, generator=case.generator(), dtype=torch.float64)
    weights[3:6] = 0
    sampled = logp.gather(1, ids[:, None])[:, 0]
    possible = torch.isfinite(sampled.detach())
    weights = torch.where(possible, weights, 0.0)
    (torch.where(possible, sampled, 0.0) * weights).sum().backward()
    with Collectives() as seen:
        got.logp.backward(weights.to(arithmetic))
    assert [name for name, *_ in seen.calls] == ["allreduce_"] * bool(case.tokens), seen.calls
    expected = wanted[1].grad
    assert mine[0].grad is not None and mine[1].grad is not None and expected is not None
    assert wanted[0].grad is not None
    valid = shard.valid
    close_gradient(mine[0].grad, wanted[0].grad, size, f"{what}: gradient of hidden")
    theirs = expected[shard.start : shard.start + valid]
    close_gradient(mine[1].grad[:valid], theirs, size, f"{what}: gradient of lm_head")
    assert bool((mine[1].grad[valid:] == 0).all()), f"{what}: padding has a gradient"


def check_exact(case: Head, shard: VocabShard) -> None:
    pi, mu, log_pi, log_mu = pair(case)
    local = []
    for p in (pi, mu):
        head = cut(p.lm_head, shard)
        assert head is not None
        local.append(replace(p, lm_head=head, bias=cut(p.bias, shard)))
    tolerance = 1e-6 * max(case.scale, 3)
    got = exact_divergence(*local, shard=shard, tile=(4, 50))
    torch.testing.assert_close(got.double(), total_variation(log_pi, log_mu), atol=tolerance, rtol=0)
    kl = exact_divergence(*local, kind="kl", shard=shard)
    whole = exact_divergence(pi, mu, kind="kl")
    torch.testing.assert_close(kl, whole, atol=30 * tolerance, rtol=1e-5)


def check_sequence_shards(rank: int, size: int) -> None:
    """Each rank has tokens of its own and the whole head: nothing is exchanged, and the head's gradients add up."""
    case = Head("", tokens=20, dtype=torch.float64)
    hidden, head, ids, candidates = case.inputs()
    weights = torch.randn(20, generator=case.generator(), dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (hidden, head)]
    want = score_tokens(*whole, ids, candidates, entropy=True)
    want.logp.backward(weights)
    mine = slice(rank * 20 // size, (rank + 1) * 20 // size)
    parts = [hidden[mine].clone().requires_grad_(), head.clone().requires_grad_()]
    with Collectives() as seen:
        got = score_tokens(*parts, ids[mine], candidates[mine], entropy=True)
        got.logp.backward(weights[mine])
    assert seen.calls == []
    assert got.entropy is not None and want.entropy is not None and parts[1].grad is not None
    torch.testing.assert_close(got.logp, want.logp[mine], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.entropy, want.entropy[mine], rtol=1e-13, atol=1e-13)
    assert whole[0].grad is not None and parts[0].grad is not None
    torch.testing.assert_close(parts[0].grad, whole[0].grad[mine], rtol=1e-12, atol=1e-12)
    total = parts[1].grad.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, whole[1].grad, rtol=1e-12, atol=1e-12)


def check(rank: int, size: int) -> str:
    digest = hashlib.sha256()
    for case in CASES:
        for name, shard in shards(case.vocab, size):
            check_scores(case, name, shard, digest)
            check_exact(case, shard)
    check_sequence_shards(rank, size)
    return digest.hexdigest()
