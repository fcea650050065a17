"""Which backend is chosen, what each refuses, and PyTorch's linear_cross_entropy against our own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo.scoring import VocabShard, backends, score_tokens
from cppo.scoring.logits import LogitMap

HAS_LCE = hasattr(torch.nn, "LinearCrossEntropyOptions")
needs_lce = pytest.mark.skipif(not HAS_LCE, reason="PyTorch without LinearCrossEntropyOptions (before 2.13)")

N, D, V = 7, 5, 23


def inputs(dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (N,)) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*lead, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(V, lead, generator=g)


def choose(backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **given: Any) -> str:
    """`backends.choose` as for an ordinary log-probability, but for what is given."""
    hidden = torch.empty(2, 3, dtype=dtype, device=device)
    logits = given.pop("logits", LogitMap(dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    arguments: dict[str, Any] = {"bias": None, "shard": None, "logp_only": True} | given
    return backends.choose(backend, hidden, logits, **arguments)


def make_faster(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(backends, "MEASURED", (backends.MEASURED[0]._replace(time=0.5, **changes),))


def test_auto_is_torch_where_nothing_faster_was_measured() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert choose("auto", dtype) == "torch"
        assert choose("auto", dtype, logp_only=False) == "torch"
        assert choose("auto", dtype, device="meta") == "torch"  # a device of which nothing is known


@needs_lce
def test_auto_takes_what_was_measured_faster_only_where_it_can_do_what_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_faster(monkeypatch)
    assert choose("auto") == "linear_cross_entropy"
    assert choose("auto", logp_only=False) == "torch"
    assert choose("auto", shard=VocabShard(0, V, V)) == "torch"
    assert choose("auto", logits=LogitMap(softcap=30.0)) == "torch"
    assert choose("auto", logits=LogitMap(dtype=torch.bfloat16)) == "torch"
    assert choose("auto", logits=LogitMap(temperature=torch.ones(2)), bias=torch.zeros(V)) == "torch"
    assert choose("auto", torch.float64) == "torch"  # measured for float32
    assert choose("auto", device="meta") == "torch"  # measured on a CPU
    make_faster(monkeypatch, dtype=torch.bfloat16)
    assert choose("auto", torch.bfloat16) == "torch"  # faster, but not exact


def test_every_measured_fact_names_a_backend_and_a_time() -> None:
    for fact in backends.MEASURED:
        assert fact.backend in backends.BACKENDS and fact.backend not in ("auto", "torch")
        assert fact.time > 0 and fact.where


@needs_lce
@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"logp_only": False}, "sampled token's log-probability alone"),
        ({"shard": VocabShard(0, V, V)}, "split vocabularies"),
        ({"logits": LogitMap(softcap=5.0)}, "no softcap"),
        ({"logits": LogitMap(dtype=torch.bfloat16)}, "another logits_dtype"),
        ({"dtype": torch.bfloat16}, "torch.bfloat16"),
        ({"dtype": torch.float16, "logits": LogitMap(dtype=torch.float16)}, "torch.float16"),
        ({"logits": LogitMap(temperature=torch.ones(2)), "bias": torch.zeros(V)}, "one temperature a token"),
    ],
)
def test_linear_cross_entropy_refuses_what_it_cannot_do(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy.*{sentence}.*backend='torch'"):
        choose("linear_cross_entropy", **given)


def test_linear_cross_entropy_needs_a_pytorch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(ValueError, match=r"PyTorch 2\.13"):
        choose("linear_cross_entropy")


def test_triton_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"cppo\[scoring\]"):
        choose("triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_needs_cuda_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA, but hidden is on cpu"):
        choose("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton") == "triton"


@pytest.mark.parametrize("name", ["liger", "", "Torch", None])
def test_unknown_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="expected one of auto, torch, triton, linear_cross_entropy"):
        choose(name)


def test_the_choice_is_reported() -> None:
    hidden, head, ids = inputs()
    assert score_tokens(hidden, head, ids).backend == "torch"
    assert score_tokens(hidden, head, ids, backend="torch").backend == "torch"
    if HAS_LCE:
        scores = score_tokens(hidden, head, ids, backend="linear_cross_entropy")
        assert scores.backend == "linear_cross_entropy"
        assert scores.entropy is None and scores.candidate_logp is None and scores.top_ids is None


@needs_lce
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("case", ["plain", "temperature", "temperatures", "scaled with bias"])
@pytest.mark.parametrize("chunk", [2 * V, 2**24])  # two rows at a time, and all
def test_linear_cross_entropy_equals_torch(
    dtype: torch.dtype, tolerance: float, case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "CHUNK_ELEMENTS", chunk)
    lead = (3, 4)
    g = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {
        "plain": {},
        "temperature": {"temperature": 0.7},
        "temperatures": {"temperature": torch.rand(lead, generator=g) + 0.5},
        "scaled with bias": {"temperature": 1.3, "logit_scale": 0.25, "bias": torch.randn(V, generator=g).to(dtype)},
    }[case]
    weight = torch.randn(lead, generator=g).to(dtype)
    found = []
    for backend in ("torch", "linear_cross_entropy"):
        hidden, head, ids = inputs(dtype, lead)
        arguments = dict(given)
        leaves = [hidden, head]
        if "bias" in given:
            leaves.append(given["bias"].clone().requires_grad_())
            arguments["bias"] = leaves[-1]
        scores = score_tokens(hidden, head, ids, backend=backend, **arguments)
        assert scores.logp.dtype == dtype and scores.logp.shape == lead
        assert scores.logsumexp.shape == lead and not scores.logsumexp.requires_grad
        gradients = torch.autograd.grad((scores.logp * weight).sum(), leaves)
        found.append([scores.logp.detach(), scores.logsumexp, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, ours.abs().max().item()))


@needs_lce
def test_linear_cross_entropy_with_unchecked_ids_outside_of_the_vocabulary() -> None:
    hidden, head, ids = inputs()
    inside = score_tokens(hidden, head, ids, backend="linear_cross_entropy").logp
    for wrong in (-100, -1, V):
        bad = ids.clone()
        bad[2] = wrong
        logp = score_tokens(hidden, head, bad, backend="linear_cross_entropy", check=False).logp
        assert logp[2].isnan()
        others = torch.arange(N) != 2
        torch.testing.assert_close(logp[others], inside[others])
    with pytest.raises(ValueError, match="outside"):
        score_tokens(hidden, head, bad, backend="linear_cross_entropy")


@needs_lce
@pytest.mark.parametrize("tokens", [0, 1])
def test_linear_cross_entropy_of_few_tokens(tokens: int) -> None:
    hidden, head, ids = inputs(lead=(tokens,))
    logp = score_tokens(hidden, head, ids, backend="linear_cross_entropy").logp
    want = score_tokens(hidden, head, ids).logp
    torch.testing.assert_close(logp, want, rtol=0, atol=3e-6)
    logp.sum().backward()
    assert hidden.grad is not None and head.grad is not None and head.grad.isfinite().all()


def test_the_examples_of_the_page_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "divergences.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 3
    run = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
