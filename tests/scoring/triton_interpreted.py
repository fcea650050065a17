"""The Triton kernels against plain float64, in Triton's interpreter. Started by test_triton.py with TRITON_INTERPRET=1,
which must be set before triton is imported; pytest does not collect this file by itself.

Blocks are tiny, so that small matrices have many tiles, ragged edges and several parts of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cppo.divergence import exact_kl, exact_tv
from cppo.scoring import Distributions, exact_divergence, score_tokens, triton_backend
from cppo.scoring.logits import LogitMap, Operands
from cppo.scoring.parallel import LocalPart, merge
from cppo.scoring.triton_backend import Blocks, backward, exact_partial, forward

BLOCKS = {
    "many": Blocks(rows=16, columns=32, depth=16, warps=1, stages=1, group=1, parts=2, programs=1),
    "wide": Blocks(rows=8, columns=64, depth=32, warps=1, stages=1, group=2, parts=1, programs=4),
    "one tile": Blocks(rows=32, columns=128, depth=64, warps=1, stages=1, group=4, parts=4, programs=1),
}


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    assert triton_backend.INTERPRETED


@pytest.fixture(params=BLOCKS)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Blocks:
    chosen = BLOCKS[request.param]
    monkeypatch.setattr(triton_backend, "blocks_for", lambda device, dtype: chosen)
    return chosen


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    monkeypatch.setattr(triton_backend, "blocks_for", lambda device, dtype: BLOCKS["many"])
    return BLOCKS["many"]


@dataclass(frozen=True)
class Problem:
    """Tokens [N, d] and one rank's columns: `held` rows of the lm_head, of which `valid` are ids from `start`."""

    tokens: int = 19
    d: int = 24
    held: int = 109
    valid: int = 105
    start: int = 50
    wanted: int = 5
    temperature: bool = False
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def random(self, *shape: int, salt: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed * 100 + salt))

    def hidden(self) -> Tensor:
        return self.random(self.tokens, self.d, salt=1).to(self.dtype)

    def head(self) -> Tensor:
        head = self.random(self.held, self.d, salt=2).to(self.dtype)
        head[self.valid :] = math.nan  # padding holds anything
        return head

    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(self.start + self.valid + 60, (self.tokens, self.wanted), generator=generator)
        first, last = self.start, self.start + self.valid - 1
        edges = torch.tensor([first, last, first + 31, first + 32, first + 64, first - 1, last + 1])
        flat = ids.view(-1)
        flat[: min(len(edges), ids.numel())] = edges[: ids.numel()]
        if self.tokens > 3 and self.wanted:
            ids[2, 0] = 2**33 + first  # `first`, were it cut down to 32 bits
        if self.wanted > 2:
            ids[:, 1] = ids[:, 0]  # twice
        if self.wanted > 8:
            ids[:, 3:8] = first + torch.tensor([50, 48, 63, 32, 50])  # several in one tile
        return ids

    def logits(self) -> LogitMap:
        temperature = torch.linspace(0.3, 3.0, self.tokens) if self.temperature else 0.7
        bias = self.random(self.held, salt=3) if self.bias else None
        if bias is not None:
            bias[self.valid :] = math.inf
        return LogitMap(temperature, bias, self.softcap, self.logit_scale)

    def dense(self, hidden: Tensor, head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(z, z/T) in float64."""
        u = self.logit_scale * (hidden @ head[: self.valid].T + (0.0 if bias is None else bias[: self.valid]))
        z = u if self.softcap is None else self.softcap * torch.tanh(u / self.softcap)
        temperature = self.logits().temperature
        t = temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature
        return z, z / t

    def dense_now(self) -> tuple[Tensor, Tensor]:
        bias = self.logits().bias
        return self.dense(self.hidden().double(), self.head().double(), None if bias is None else bias.double())

    def forward(self, *, entropy: bool = True, top_k: int = 0) -> LocalPart:
        where: dict[str, Any] = {"start": self.start, "valid": self.valid, "tile": (16, 64)}
        return forward(self.hidden(), self.head(), self.ids(), self.logits(), entropy=entropy, top_k=top_k, **where)


PROBLEMS = {
    "plain": Problem(),
    "temperatures": Problem(temperature=True, seed=1),
    "all": Problem(temperature=True, bias=True, softcap=4.0, logit_scale=0.6, wanted=10, seed=2),
    "ragged depth": Problem(d=33, tokens=16, held=32, valid=32, start=0, bias=True, seed=3),
    "one token": Problem(tokens=1, wanted=1, seed=4),
    "few columns": Problem(tokens=18, held=3, valid=3, seed=5),
    "no ids": Problem(tokens=5, wanted=0, seed=6),
    "bfloat16": Problem(temperature=True, softcap=6.0, dtype=torch.bfloat16, seed=7),
}
some = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def assert_close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Within `tolerance`, relative to the largest number of the row (a sum's rounding is that of its summands)."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    scale = want.abs().amax(-1, keepdim=True).clamp(min=1.0) if want.dim() and want.numel() else 1.0
    error = ((got.double() - want) / scale).abs()
    assert not error.isnan().any() and (error <= tolerance).all(), f"{what}: {error.max():.3g} > {tolerance}"


@some
def test_forward_equals_dense(problem: Problem, blocks: Blocks) -> None:
    z, y = problem.dense_now()
    part = problem.forward()
    assert part.weighted is not None and part.top_logits is None
    assert all(x.dtype == torch.float32 for x in (part.maximum, part.total, part.logits, part.weighted))
    shifted = y - y.amax(-1, keepdim=True)
    assert_close(part.maximum, z.amax(-1), "maximum")
    assert_close(part.total, shifted.exp().sum(-1), "total")
    assert_close(part.weighted, (shifted.exp() * shifted).sum(-1), "weighted")
    local = problem.ids() - problem.start
    held = (local >= 0) & (local < problem.valid)
    assert torch.equal(part.held, held)
    assert_close(torch.where(held, part.logits, 0.0), z.gather(1, local.clamp(0, problem.valid - 1)) * held, "logits")
    scores = merge(part, None, problem.logits().temperature)
    log_p = y.log_softmax(-1)
    assert_close(scores.logsumexp, y.logsumexp(-1), "logsumexp")
    assert scores.entropy is not None
    assert_close(scores.entropy, -(log_p.exp() * log_p).sum(-1), "entropy")
    assert_close(scores.logp[held], log_p.gather(1, local.clamp(0, problem.valid - 1))[held], "logp")


def test_without_entropy_the_rest_is_the_same(many: Blocks) -> None:
    problem = replace(PROBLEMS["all"], tokens=5)
    whole, less = problem.forward(), problem.forward(entropy=False)
    assert less.weighted is None
    assert torch.equal(whole.total, less.total) and torch.equal(whole.maximum, less.maximum)


def test_wanted_logits_are_those_of_the_sum(many: Blocks) -> None:
    """Not merely close: from the same product, so that log pi of a certain token is not above 0."""
    problem = replace(PROBLEMS["all"], start=0)
    z, _ = problem.dense_now()
    ids = torch.stack([z.argmax(-1), z.argmin(-1), z.argmax(-1)], 1)
    part = forward(
        problem.hidden(),
        problem.head(),
        ids,
        problem.logits(),
        start=0,
        valid=problem.valid,
        entropy=False,
        top_k=1,
        tile=(8, 8),
    )
    assert torch.equal(part.logits[:, 0], part.maximum) and torch.equal(part.logits[:, 2], part.maximum)
    assert part.top_logits is not None
    assert_close(part.top_logits[:, 0], part.maximum.double(), "the largest", 1e-6)


@pytest.mark.parametrize(
    "name,k", [("all", 1), ("all", 20), ("one token", 1), ("one token", 5), ("few columns", 5), ("bfloat16", 7)]
)
def test_top_k(name: str, k: int, blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS[name]
    monkeypatch.setattr(triton_backend, "TOP_ELEMENTS", 13 * k * blocks.columns)  # a few rows at a time
    z, _ = problem.dense_now()
    part = problem.forward(entropy=False, top_k=k)
    assert part.top_logits is not None and part.top_ids is not None
    assert part.top_logits.shape == part.top_ids.shape == (problem.tokens, k) and part.top_ids.dtype == torch.int64
    few = min(k, problem.valid)
    want = z.topk(few, -1)
    assert_close(part.top_logits[:, :few], want.values, "top logits")
    assert torch.equal(part.top_ids[:, :few], want.indices + problem.start)
    assert (part.top_logits[:, few:] == -math.inf).all()
    inside = (part.top_ids >= 0) & (part.top_ids < problem.start + problem.valid)
    assert inside.all()  # of the places that are not filled, too


def test_top_k_in_one_tile_and_in_as_many_as_k(many: Blocks) -> None:
    hidden = torch.linspace(-1.0, 1.1, 20)[:, None]
    ids = torch.zeros(20, 0, dtype=torch.int64)
    sorted_head = torch.linspace(0.1, 9.0, 100)
    spread = torch.arange(100).view(25, 4).T.flatten()  # neighbours in size are 25 columns apart, in other tiles
    for k, order in ((17, torch.arange(100)), (4, spread)):
        head = sorted_head[order][:, None]
        part = forward(hidden, head, ids, LogitMap(), start=7, valid=100, entropy=False, top_k=k, tile=(20, 100))
        assert part.top_ids is not None
        want = (hidden * head.T).topk(k).indices + 7
        assert torch.equal(part.top_ids, want)


@pytest.mark.parametrize("tile", [(13, 60), (1000, 1000)], ids=str)
@pytest.mark.parametrize("name", ["all", "ragged depth", "one token", "few columns", "bfloat16"])
def test_gradients_equal_dense(name: str, tile: tuple[int, int], blocks: Blocks) -> None:
    problem = PROBLEMS[name]
    hidden, head = problem.hidden().double().requires_grad_(), problem.head().double().requires_grad_()
    given = problem.logits()
    bias = (torch.zeros(problem.held) if given.bias is None else given.bias).double().requires_grad_()
    _, y = problem.dense(hidden, head, bias)
    ids = problem.ids()[:, 0]
    local = ids - problem.start
    held = (local >= 0) & (local < problem.valid)
    # another rank's columns, too: the sum is larger than ours, and some sampled tokens are not here
    logsumexp = (y.logsumexp(-1) + 0.3).detach()
    g = problem.random(problem.tokens, salt=9).double()
    y_sampled = y.gather(1, local.clamp(0, problem.valid - 1)[:, None])[:, 0] * held
    p = (y - logsumexp[:, None]).exp().detach()
    loss = (g * (y_sampled - (p * y).sum(-1))).sum()  # d/dy_v = g (1[v = y] - p_v)
    want = torch.autograd.grad(loss, (hidden, head, bias))
    got = backward(
        problem.hidden(),
        problem.head(),
        ids,
        logsumexp.float(),
        g.float(),
        given,
        start=problem.start,
        valid=problem.valid,
        need=(True, True, True),
        tile=tile,
    )
    assert all(x is not None for x in got)
    assert got[1] is not None and got[1].dtype == problem.dtype
    # bfloat16: d loss/dx and the lm_head's gradient are rounded to 8 bits
    tolerance = 1e-5 if problem.dtype == torch.float32 else 6e-3
    for name, x, wanted in zip(("hidden", "lm_head", "bias"), got, want, strict=True):
        assert x is not None and x.shape == wanted.shape
        used = x if name == "hidden" else x[: problem.valid]
        norm = wanted[: len(used)].norm()
        assert norm > 0
        assert (used.double() - wanted[: len(used)]).norm() <= tolerance * norm, name
        assert (x[len(used) :] == 0).all(), f"{name}: padding"


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_that_are_needed(need: tuple[bool, bool, bool], many: Blocks) -> None:
    problem = replace(PROBLEMS["all"], tokens=9)
    arguments = (problem.hidden(), problem.head(), problem.ids()[:, 0], torch.full((9,), 5.0), torch.ones(9))
    options = {"start": problem.start, "valid": problem.valid, "tile": (5, 60)}
    every = backward(*arguments, problem.logits(), need=(True,) * 3, **options)  # type: ignore[arg-type]
    some = backward(*arguments, problem.logits(), need=need, **options)  # type: ignore[arg-type]
    for wanted, whole, got in zip(need, every, some, strict=True):
        assert (got is not None) == wanted
        assert got is None or (whole is not None and torch.equal(got, whole))


@pytest.mark.parametrize("tokens,valid", [(0, 30), (4, 0), (0, 0)])
def test_nothing_to_do(tokens: int, valid: int, many: Blocks) -> None:
    hidden, head, ids = torch.randn(tokens, 8), torch.randn(32, 8), torch.zeros(tokens, 3, dtype=torch.int64)
    part = forward(hidden, head, ids, LogitMap(), start=0, valid=valid, entropy=True, top_k=2, tile=(4, 4))
    assert (part.maximum == -math.inf).all() and part.maximum.shape == (tokens,)
    assert (part.total == 0).all() and part.weighted is not None and (part.weighted == 0).all()
    assert part.logits.shape == part.held.shape == (tokens, 3) and not part.held.any()
    assert part.top_logits is not None and part.top_logits.shape == (tokens, 2)
    d_hidden, d_head, d_bias = backward(
        hidden,
        head,
        ids[:, 0],
        torch.zeros(tokens),
        torch.ones(tokens),
        LogitMap(),
        start=0,
        valid=valid,
        need=(True, True, True),
        tile=(4, 4),
    )
    assert d_hidden is not None and d_head is not None and d_bias is not None
    assert d_hidden.shape == hidden.shape and d_head.shape == head.shape and d_bias.shape == (32,)
    assert not any(x.any() for x in (d_hidden, d_head, d_bias))
    one = Operands(hidden, head, LogitMap(), torch.zeros(tokens))
    assert torch.equal(exact_partial(one, one, kind="tv", valid=valid), torch.zeros(tokens))


def test_huge_logits(blocks: Blocks) -> None:
    """+-1e4, exact in float32: no NaN, and log pi keeps its relative error. The maximum rises from tile to tile."""
    head = torch.tensor([-1e4, 9990.0, 9.0, -9999.5, 9999.0, 0.0, 9998.5, 1e4]).repeat_interleave(12)[:, None]
    hidden = torch.tensor([1.0, -1.0, 0.0, 0.5])[:, None]
    ids = torch.arange(96).expand(4, 96)[:, ::7]
    part = forward(hidden, head, ids, LogitMap(0.7), start=0, valid=96, entropy=True, top_k=3, tile=(9, 9))
    scores = merge(part, None, 0.7)
    log_p = ((hidden.double() @ head.double().T) / 0.7).log_softmax(-1)
    assert_close(scores.logp, log_p.gather(1, ids), "logp", 1e-6)
    assert scores.entropy is not None
    assert_close(scores.entropy, -(log_p.exp() * log_p).sum(-1), "entropy")
    d_hidden, d_head, _ = backward(
        hidden,
        head,
        ids[:, 3],
        scores.logsumexp,
        torch.ones(4),
        LogitMap(0.7),
        start=0,
        valid=96,
        need=(True, True, False),
        tile=(3, 50),
    )
    assert d_hidden is not None and d_hidden.isfinite().all() and d_head is not None and d_head.isfinite().all()
    capped = forward(
        hidden, head, ids, LogitMap(0.7, None, 30.0), start=0, valid=96, entropy=True, top_k=0, tile=(9, 9)
    )
    assert_close(capped.maximum, torch.tensor([30.0, 30.0, 0.0, 30.0]).double(), "capped", 1e-6)


def test_tokens_taken_out_by_the_bias(many: Blocks) -> None:
    """-inf: such tokens have no mass, and their 0 * -inf does not reach the entropy. All of them: nothing here."""
    problem = replace(PROBLEMS["plain"], wanted=3)
    for out in (slice(0, 40), slice(40, 105), slice(0, 105)):
        bias = torch.zeros(problem.held)
        bias[out] = -math.inf
        part = forward(
            problem.hidden(),
            problem.head(),
            problem.ids(),
            replace(problem.logits(), bias=bias),
            start=problem.start,
            valid=problem.valid,
            entropy=True,
            top_k=0,
            tile=(8, 8),
        )
        y = problem.dense_now()[1] + bias[: problem.valid].double()
        highest = y.amax(-1, keepdim=True)
        shifted = y - torch.where(highest == -math.inf, 0.0, highest)
        assert part.weighted is not None
        assert_close(part.total, shifted.exp().sum(-1), "total")
        assert_close(part.weighted, torch.where(shifted > -math.inf, shifted.exp() * shifted, 0.0).sum(-1), "weighted")
        assert torch.equal(part.maximum == -math.inf, highest[:, 0] == -math.inf)


def test_a_broken_row_stays_one(many: Blocks) -> None:
    """NaN or inf in a hidden state: no number for that token, and no other changes."""
    problem = Problem(wanted=0)
    hidden = problem.hidden()
    hidden[3, 5], hidden[17, 0] = math.nan, math.inf
    options = {"start": problem.start, "valid": problem.valid, "entropy": True, "top_k": 0, "tile": (8, 8)}
    broken = forward(hidden, problem.head(), problem.ids(), problem.logits(), **options)  # type: ignore[arg-type]
    whole = problem.forward()
    rest = [n for n in range(problem.tokens) if n not in (3, 17)]
    assert broken.total[[3, 17]].isnan().all() and torch.equal(broken.total[rest], whole.total[rest])
    one = Operands(hidden, problem.head(), problem.logits(), torch.ones(problem.tokens))
    two = Operands(problem.hidden(), problem.head(), problem.logits(), torch.ones(problem.tokens))
    for kind in ("tv", "kl"):
        for pair in ((one, two), (two, one)):
            got = exact_partial(*pair, kind=kind, valid=problem.valid)
            assert not got[[3, 17]].isfinite().any() and got[rest].isfinite().all()


def test_layouts_that_descriptors_cannot_load(many: Blocks) -> None:
    """Rows that do not start at multiples of 16 bytes, columns that are not neighbours: copied, with equal results."""
    problem = Problem(tokens=5, wanted=2)
    hidden, head = problem.hidden(), problem.head()
    shifted = torch.empty(head.numel() + 1)[1:].view_as(head).copy_(head)
    inside = torch.full((problem.held, 27), math.nan)
    inside[:, 1:25] = head
    layouts = [(hidden.t().contiguous().t(), head.t().contiguous().t()), (hidden, shifted), (hidden, inside[:, 1:25])]
    options = {"start": 0, "valid": problem.valid, "tile": (16, 64)}
    whole = problem.forward()
    gradients = None
    for h, w in [(hidden, head), *layouts]:
        ids = problem.ids() - problem.start
        part = forward(h, w, ids, problem.logits(), entropy=True, top_k=0, **options)  # type: ignore[arg-type]
        assert torch.equal(part.total, whole.total) and torch.equal(part.logits, whole.logits)
        got = backward(
            h,
            w,
            ids[:, 0],
            torch.ones(problem.tokens),
            torch.ones(problem.tokens),
            problem.logits(),
            need=(True, True, False),
            **options,  # type: ignore[arg-type]
        )
        gradients = got if gradients is None else gradients
        for x, y in zip(got[:2], gradients[:2], strict=True):
            assert x is not None and y is not None
            assert_close(x, y.double(), "gradient", 1e-6)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("name", ["all", "few columns", "bfloat16", "one token"])
def test_exact_divergence(name: str, kind: str, blocks: Blocks) -> None:
    """Two policies of different hidden sizes and maps; the vocabulary in two parts that add up."""
    policy = PROBLEMS[name]
    rollout = replace(policy, d=40, temperature=not policy.temperature, softcap=3.0, logit_scale=0.5, seed=11)
    sides = []
    for problem in (policy, rollout):
        _, y = problem.dense_now()
        sides.append((problem.hidden(), problem.head(), problem.logits(), y.logsumexp(-1).float(), y))
    (_, _, _, _, y_pi), (_, _, _, _, y_mu) = sides
    want = {"tv": exact_tv, "kl": exact_kl}[kind](y_pi, y_mu)
    assert want.min() > 0.01
    total = torch.zeros(policy.tokens)
    cut = policy.valid // 3
    for start, stop in ((0, cut), (cut, policy.valid)):
        halves = []
        for hidden, head, logits, logsumexp, _ in sides:
            bias = None if logits.bias is None else logits.bias[start:]
            halves.append(Operands(hidden, head[start:], replace(logits, bias=bias), logsumexp))
        total += exact_partial(*halves, kind=kind, valid=stop - start)
    assert_close(total, want, kind)


def test_kl_is_floored_as_elsewhere(many: Blocks) -> None:
    """Masses below 1e-12 count as 1e-12 in the logarithms."""
    head = torch.tensor([[0.0], [-40.0], [-10.0], [-60.0]])
    y_pi, y_mu = head.T.double(), torch.zeros(1, 4).double()
    one = Operands(torch.ones(1, 1), head, LogitMap(), y_pi.logsumexp(-1).float())
    two = Operands(torch.zeros(1, 1), head, LogitMap(), y_mu.logsumexp(-1).float())
    assert_close(exact_partial(one, two, kind="kl", valid=4), exact_kl(y_pi, y_mu), "kl")
    assert_close(exact_partial(two, one, kind="kl", valid=4), exact_kl(y_mu, y_pi), "kl of a narrow mu")


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_divergence_where_tokens_are_taken_out(kind: str, many: Blocks) -> None:
    """By a bias of -inf: from mu alone, from pi alone, from both."""
    problem = Problem(tokens=3, wanted=0)
    sides, rows = [], []
    for seed, out in ((0, slice(10, 40)), (1, slice(30, 60))):
        one = replace(problem, seed=seed)
        bias = torch.zeros(problem.held)
        bias[out] = -math.inf
        y = one.dense_now()[1] + bias[: problem.valid].double()
        logsumexp = y.logsumexp(-1).float()
        sides.append(Operands(one.hidden(), one.head(), replace(one.logits(), bias=bias), logsumexp))
        rows.append(y)
    want = {"tv": exact_tv, "kl": exact_kl}[kind](*rows)
    assert_close(exact_partial(sides[0], sides[1], kind=kind, valid=problem.valid), want, kind)


def test_refusals(many: Blocks) -> None:
    hidden, ids = torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64)
    options = {"start": 0, "valid": 3, "entropy": False, "top_k": 0, "tile": (4, 4)}
    for given, head, logits, said in (
        (hidden.half(), torch.randn(3, 8).half(), LogitMap(), 'hidden is torch.float16.*backend="torch"'),
        (hidden, torch.randn(3, 8).double(), LogitMap(), "lm_head is torch.float64"),
        (hidden.bfloat16(), torch.randn(3, 8), LogitMap(), "lm_head is torch.float32, but hidden is torch.bfloat16"),
        (hidden, torch.randn(3, 8), LogitMap(dtype=torch.float64), "logits_dtype is torch.float64"),
    ):
        with pytest.raises(ValueError, match=said):
            forward(given, head, ids, logits, **options)  # type: ignore[arg-type]
    one = Operands(hidden, torch.randn(3, 8), LogitMap(), torch.zeros(2))
    two = Operands(hidden.bfloat16(), torch.randn(3, 8).bfloat16(), LogitMap(), torch.zeros(2))
    with pytest.raises(ValueError, match="cast one of them"):
        exact_partial(one, two, kind="tv", valid=3)


def test_the_public_functions(many: Blocks) -> None:
    """`score_tokens` and `exact_divergence` with this backend: every output and gradient as with "torch"."""
    g = torch.Generator().manual_seed(4)
    hidden, head, bias = (torch.randn(*shape, generator=g) for shape in ((19, 24), (105, 24), (105,)))
    ids, candidates = torch.randint(105, (19,), generator=g), torch.randint(105, (19, 4), generator=g)
    gradient = torch.randn(19, generator=g)
    gradient[2:9] = 0
    options: dict[str, Any] = {"temperature": torch.linspace(0.5, 2, 19), "softcap": 3.0, "logit_scale": 0.7}
    found, policies = [], []
    for backend in ("torch", "triton"):
        inputs = [x.clone().requires_grad_() for x in (hidden, head, bias)]
        asked: dict[str, Any] = {"want_top_k": 6, "entropy": True, "backend": backend}
        scores = score_tokens(*inputs[:2], ids, candidates, bias=inputs[2], **options, **asked)
        assert scores.backend == backend
        scores.logp.backward(gradient)
        outputs = (scores.logp, scores.candidate_logp, scores.logsumexp, scores.entropy, scores.top_logp)
        found.append([*outputs, *(x.grad for x in inputs)])
        pi = Distributions(hidden, head, scores.logsumexp, bias=bias, **options)
        mu = Distributions(hidden.flip(0), head, bias=bias, **options)
        policies.append([exact_divergence(pi, mu, kind=kind, backend=backend) for kind in ("tv", "kl")])
    for ours, theirs in zip(found[1] + policies[1], found[0] + policies[0], strict=True):
        assert ours is not None and theirs is not None
        assert_close(ours.detach(), theirs.detach().double(), "public")
