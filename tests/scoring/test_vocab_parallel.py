"""Vocabulary-parallel log-probabilities: what one process can show (several: tests/test_shards.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cppo.scoring import VocabShard, local_part, merge, score_ids, top_ids

from .vocab_cases import CASES, Case, LargestTensor, assert_close, chunked, refused


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_rank_without_process_group(case: Case) -> None:
    """No process group: dense callers use the same function, with or without a shard."""
    want, want_lse = case.dense()
    ids = case.ids(1)
    for shard in (None, VocabShard.equal(case.vocab), chunked(case.vocab)):
        got = score_ids(case.logits(), ids, temperature=case.temperatures(), shard=shard)
        assert_close(got.logp, want.gather(-1, ids), case.name)
        assert_close(got.logsumexp, want_lse, case.name)


def test_padding_columns_are_left_out() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 99.0, torch.nan]])
    for options in ({"vocab_size": 3}, {"shard": VocabShard.equal(5, 3)}, {"shard": VocabShard(0, 5, 3)}):
        got = score_ids(logits, torch.tensor([[2, 0]]), **options)  # type: ignore[arg-type]
        assert_close(got.logp, logits[:, :3].double().log_softmax(-1)[:, [2, 0]], str(options))
        assert top_ids(logits, 3, **options).tolist() == [[2, 1, 0]]  # type: ignore[arg-type]


def test_layouts() -> None:
    parts = [VocabShard(0, 128, 151_936), VocabShard.equal(4, 3), VocabShard(6, 9, 7), VocabShard(9, 12, 7)]
    assert [(p.columns, p.valid) for p in parts] == [(128, 128), (4, 3), (3, 1), (3, 0)]


def test_accuracy_of_huge_logits_is_relative() -> None:
    """The naive z/T - logsumexp(z/T) loses three digits at 1e4; shifting first does not."""
    logits = torch.tensor([[10_000.0, 9_999.0, 9_990.5, -10_000.0]])
    ids = torch.arange(4)[None]
    want = (logits.double() / 0.7).log_softmax(-1)
    naive = logits / 0.7 - (logits / 0.7).logsumexp(-1, keepdim=True)
    assert (naive.double() - want).abs().max() > 1e-4
    assert_close(score_ids(logits, ids, temperature=0.7).logp, want, "shifted")


def test_extra_memory_is_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on the tile, and no other temporary grows with the vocabulary."""
    tokens, vocab = 96, 4096
    logits = torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.randint(vocab, (tokens, 21), generator=torch.Generator().manual_seed(1))
    whole = score_ids(logits, ids)
    for elements in (vocab * 100, vocab, 5):
        monkeypatch.setattr("cppo.scoring.ids.CHUNK_ELEMENTS", elements)
        with LargestTensor() as largest:
            got = score_ids(logits, ids)
        assert torch.equal(got.logp, whole.logp) and torch.equal(got.logsumexp, whole.logsumexp)
        tile, per_token = 4 * max(elements, vocab), 8 * tokens * 22  # ids are int64
        assert largest.bytes <= max(tile, per_token), (elements, largest.bytes)
    # strides that cannot be flattened are not copied as a whole either
    apart = torch.randn(8, 12, vocab, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    with LargestTensor() as largest:
        got = score_ids(apart, ids.view(12, 8, 21), temperature=torch.full((12, 8), 0.5))
    assert largest.bytes <= max(4 * vocab, 8 * tokens * 22), largest.bytes
    assert_close(got.logp, (apart.double() / 0.5).log_softmax(-1).gather(-1, ids.view(12, 8, 21)), "transposed")


def test_parts_of_another_scorer_merge() -> None:
    """A streaming scorer can bring its own part: here from float64 statistics of a row."""
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 32]]).expand(4, -1)
    part = local_part(logits, ids, VocabShard.equal(33), temperature=0.5)
    assert_close(part.maximum, logits.amax(-1), "maximum")
    assert_close(part.total, ((logits - logits.amax(-1, keepdim=True)).double() / 0.5).exp().sum(-1), "total")
    assert part.held.all()
    assert_close(merge(part, temperature=0.5).logp, (logits.double() / 0.5).log_softmax(-1).gather(-1, ids), "merge")


def test_no_gradient() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    got = score_ids(logits, torch.zeros(2, 1, dtype=torch.int64))
    assert not got.logp.requires_grad and not got.logsumexp.requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, i: score_ids(z.long(), i), ["logits has dtype torch.int64"]),
        (lambda z, i: score_ids(z, i.float()), ["ids has dtype torch.float32"]),
        (lambda z, i: score_ids(z, i[:, 0]), ["ids has shape [3]", "[3] + [K]"]),
        (lambda z, i: score_ids(z, i[:2]), ["ids has shape [2, 2]", "[3] + [K]"]),
        (lambda z, i: score_ids(z, i, temperature=0.0), ["temperature is 0.0", "above 0"]),
        (lambda z, i: score_ids(z, i, temperature=float("nan")), ["temperature is nan"]),
        (lambda z, i: score_ids(z, i, temperature=torch.ones(2)), ["temperature has shape [2]", "[3]"]),
        (lambda z, i: score_ids(z, i + 8), ["6 of 6 ids are outside [0, 8)", "such as 8"]),
        (lambda z, i: score_ids(z, i, vocab_size=9), ["8 columns", "vocab_size is 9", "VocabShard.equal"]),
        (lambda z, i: score_ids(z, i, shard=VocabShard(0, 7, 7)), ["8 columns here", "from id 0 to 7"]),
        (
            lambda z, i: score_ids(z, i, shard=VocabShard(0, 8, 8), vocab_size=7),
            ["vocab_size is 7", "the shard's is 8"],
        ),
        (lambda z, i: top_ids(z, 9), ["k is 9", "1 to 8"]),
        (lambda z, i: top_ids(z, 0), ["k is 0"]),
        (lambda z, i: top_ids(z, 2, shard=VocabShard(0, 7, 7)), ["8 columns here"]),
        (lambda z, i: VocabShard(3, 2, 8), ["from 3 to 2"]),
        (lambda z, i: VocabShard(0, 2, 0), ["vocab_size is 0"]),
        (lambda z, i: VocabShard.equal(4, 8), ["1 rank(s) with 4 columns", "vocab_size is 8"]),
        (lambda z, i: score_ids(z, i, shard=VocabShard(1, 9, 9), check=True), ["ids 0 to 0 are missing"]),
    ],
)
def test_refused(call: Callable[[Any, Any], Any], words: list[str]) -> None:
    with refused(*words):
        call(torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.int64))
