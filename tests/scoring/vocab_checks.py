"""One process of a vocabulary-parallel group (started by test_shards.py).

Every process builds the same whole logits from a seed, takes its columns of them, and compares what the package
computes over the process group with the dense result in float64. It returns a digest of all results.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from cppo import divergence
from cppo.scoring import VocabShard, score_ids, top_ids

from .vocab_cases import CASES, Case, Collectives, assert_close, refused, shards_of


def check_scores(case: Case, size: int, digest: hashlib._Hash) -> None:
    whole, (want, want_lse), ids = case.logits(), case.dense(), case.ids(size)
    arithmetic = torch.float64 if case.dtype == torch.float64 else torch.float32
    for layout, shard, cut in shards_of(case, size, VocabShard):
        what = f"{case.name}, {layout}"
        mine = cut(whole)
        before = mine.clone()
        with Collectives() as seen:
            got = score_ids(mine, ids, temperature=case.temperatures(), shard=shard)
        assert seen.calls == [
            ("allreduce_", case.tokens, arithmetic),
            ("allreduce_", case.tokens * (case.k + 1), arithmetic),
        ], f"{what}: {seen.calls}"
        assert got.logp.dtype == got.logsumexp.dtype == arithmetic
        assert_close(got.logp, want.gather(-1, ids), f"{what}: logp")
        assert_close(got.logsumexp, want_lse, f"{what}: logsumexp")
        assert torch.equal(torch.nan_to_num(mine), torch.nan_to_num(before)), f"{what}: the logits were changed"
        digest.update(got.logp.numpy().tobytes() + got.logsumexp.numpy().tobytes())
        checked = score_ids(mine, ids.int(), temperature=case.temperatures(), shard=shard, check=True)
        assert torch.equal(checked.logp, got.logp), what

        k = min(case.k, case.vocab)
        ids_top = top_ids(mine, k, shard=shard)
        ordered = want.gather(-1, ids_top)
        torch.testing.assert_close(ordered, want.topk(k, -1).values, msg=lambda m, what=what: f"{what}: top {m}")
        for row in ids_top.tolist():
            assert len(set(row)) == k and min(row) >= 0 and max(row) < case.vocab, f"{what}: {row}"
        digest.update(ids_top.numpy().tobytes())


def check_divergences(size: int) -> None:
    """The divergence of CPPO over mu's top K out of split logits, from [B, T, V] in a layout that is not contiguous."""
    g = torch.Generator().manual_seed(3)
    batch, length, vocab, k = 3, 5, 211, 20
    mu = torch.randn(batch, length, vocab, generator=g) * 2
    pi = mu + 0.4 * torch.randn(batch, length, vocab, generator=g)
    sampled = torch.randint(vocab, (batch, length), generator=g)
    log_mu, log_pi = mu.double().log_softmax(-1), pi.double().log_softmax(-1)
    shard = VocabShard.equal(-(-vocab // size), vocab)
    stop = min(shard.stop, vocab)
    padding = torch.zeros(batch, length, shard.stop - stop)
    mine, mine_mu = (torch.cat([z[..., shard.start : stop], padding], -1) for z in (pi, mu))
    mine = mine.transpose(0, 1).contiguous().transpose(0, 1)  # Megatron computes [T, B, V]
    top = top_ids(mine_mu, k, shard=shard)
    assert torch.equal(top, log_mu.topk(k, -1).indices)
    ids = torch.cat([top, sampled[..., None]], -1)
    inside = (top == sampled[..., None]).any(-1)
    assert bool(inside.any()) and not bool(inside.all())
    got_pi = score_ids(mine, ids, shard=shard).logp
    got_mu = score_ids(mine_mu, ids, shard=shard).logp
    for name in ("topk_tv", "topk_kl", "topk_tv_upper"):
        measure = getattr(divergence, name)
        got = measure(got_pi[..., :k], got_mu[..., :k], got_pi[..., k], got_mu[..., k], inside)
        dense_pi, dense_mu = log_pi.gather(-1, ids), log_mu.gather(-1, ids)
        want = measure(dense_pi[..., :k], dense_mu[..., :k], dense_pi[..., k], dense_mu[..., k], inside)
        assert float(want.min()) > 1e-3
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def check_rows_without_distribution(rank: int, size: int) -> None:
    """NaN where log_softmax has NaN, on every rank, and nowhere else."""
    rows = torch.zeros(4, 4 * size)
    rows[0] = -torch.inf
    rows[1, -1] = torch.nan
    rows[2, 0] = torch.inf
    shard = VocabShard.equal(4)
    mine = rows[:, shard.start : shard.stop]
    got = score_ids(mine, torch.tensor([[1, 4 * size - 2]]).expand(4, -1), shard=shard)
    assert got.logp[:3].isnan().all() and got.logsumexp[1:3].isnan().all(), got
    assert_close(got.logp[3], rows[3].log_softmax(-1)[:2], f"rank {rank}: the row beside them")
    assert not got.logsumexp[0] > -torch.inf  # NaN or -inf: the sum over nothing


def check_refusals(rank: int, size: int) -> None:
    """Mistakes that only show over the group: every rank raises, so that none waits for the others."""
    ids = torch.zeros(3, 2, dtype=torch.int64)
    with refused(f"{size} rank(s) with 5 columns", "vocab_size is 100"):
        VocabShard.equal(5, 100)
    with refused("id 0 is held twice"):
        score_ids(torch.zeros(3, 4), ids, shard=VocabShard(0, 4, 4), check=True)
    with refused("ids 4 to 4 are missing"):
        gap = rank * 5
        score_ids(torch.zeros(3, 4), ids, shard=VocabShard(gap, gap + 4, 5 * size - 1), check=True)
    with refused(f"they end at {2 * size}", "vocab_size is 1000"):
        score_ids(torch.zeros(3, 2), ids, shard=VocabShard(2 * rank, 2 * rank + 2, 1000), check=True)
    with refused("different vocab_size"):
        score_ids(torch.zeros(3, 4), ids, shard=VocabShard(4 * rank, 4 * rank + 4, 4 * size - rank), check=True)
    with refused("ask for different ids"):
        score_ids(torch.zeros(3, 4), ids + rank, shard=VocabShard.equal(4), check=True)
    with refused("6 of 6 ids are outside", "-100"):
        score_ids(torch.zeros(3, 4), ids - 100, shard=VocabShard.equal(4))
    outside = score_ids(torch.zeros(3, 4), ids - 100, shard=VocabShard.equal(4), check=False)
    assert outside.logp.isnan().all() and outside.logsumexp.isfinite().all()


def check_dense_callers(rank: int) -> None:
    """Without a shard nothing is exchanged, although a process group exists: data-parallel ranks hold other tokens."""
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(rank))
    ids = torch.tensor([[0, 8]]).expand(3, -1)
    with Collectives() as seen:
        got = score_ids(logits, ids, check=True)
        alone = score_ids(logits, ids[:, :1], vocab_size=7, check=True)
        assert_close(top_ids(logits, 2), logits.topk(2).indices, "top")
    assert seen.calls == []
    assert_close(got.logp, logits.double().log_softmax(-1).gather(-1, ids), "dense")
    assert_close(alone.logp, logits[:, :7].double().log_softmax(-1)[:, :1], "dense, padded")


def check_subgroups(rank: int, size: int) -> None:
    """The group of a shard is the one that is asked, not the default group."""
    pair, rest = dist.new_group([0, 1]), dist.new_group([size - 1]) if size > 2 else None
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    ids = torch.tensor([[0, 7]]).expand(3, -1)
    want = logits.double().log_softmax(-1).gather(-1, ids)
    if rank < 2:
        shard = VocabShard.equal(4, group=pair)
        assert (shard.start, shard.vocab_size) == (4 * rank, 8)
        assert_close(score_ids(logits[:, shard.start : shard.stop], ids, shard=shard).logp, want, "pair")
    else:
        assert_close(score_ids(logits, ids, shard=VocabShard.equal(8, group=rest)).logp, want, "alone")
        with refused("not a member"):
            VocabShard.equal(4, group=pair)


def check(rank: int, size: int) -> str:
    digest = hashlib.sha256()
    for case in CASES:
        check_scores(case, size, digest)
    empty = score_ids(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), shard=VocabShard.equal(4))
    assert empty.logp.shape == (0, 2) and empty.logsumexp.shape == (0,)
    check_divergences(size)
    check_rows_without_distribution(rank, size)
    check_refusals(rank, size)
    check_dense_callers(rank)
    check_subgroups(rank, size)
    return digest.hexdigest()
