"""The contract of every adapter: what an engine's loss must do, whatever its layout, its reduction and its hooks.

An `Engine` says how the adapter under test is called; the checks below say what must come out. Usage::

    class PrimeRL(contract.Engine): ...

    @contract.suite(PrimeRL())
    def test_contract(check):
        check()

* The measure is the gradient of the engine's total loss with respect to log pi(y_t) of every response token, and the
  denominator that the engine's reduction divides that token's loss by: ``gradient * denominator = -c_t A_t``, whatever
  the engine. The right-hand side comes from the slow float64 loops of `core.reference`, which know nothing of the
  package.
* A check that does not apply to an engine is named with its reason (`Engine.not_applicable`) and shows as skipped.
* `test_contract.py` runs the core itself through the suite, and for each check an engine that breaks just that promise.
"""

from __future__ import annotations

import functools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import cppo
from core.cases import CASES, GARBAGE, REFERENCE_CASES, Response, make, random_responses
from cppo.errors import UserError

DATA = Path(__file__).parents[1] / "data"
RTOL, ATOL = 5e-5, 2e-6  # float32 against float64
MARGIN = 2e-5  # distance from a limit below which float32 may legitimately decide otherwise

#: A few rules for the checks that compare an engine with itself: token, prefix and whole-response decisions.
FEW = ("dppo", "cppo adaptive", "cppo fixed w_min .6", "trm_avg", "minpro")


# ------------------------------------------------------------------------------------------------- what an engine says


@dataclass(frozen=True)
class Sample:
    """One sequence: `prompt` tokens in front (never trained on), then the response with its mask.

    `response.policy`, `.rollout`, `.advantage` (constant over the response), `.mask`: float32/bool ``[T]``.
    """

    response: Response
    prompt: int

    def __len__(self) -> int:
        """Prompt and response together."""
        return self.prompt + len(self.response)

    @property
    def advantage(self) -> float:
        """A, one per response."""
        return float(self.response.advantage[0])


@dataclass
class Outcome:
    """What an engine did with samples.

    Attributes
    ----------
    gradients : d(total loss)/d log pi(y_t) for each sample, ``[T]`` (response columns, holes included). The total loss
        is what the engine minimises: summed over micro-batches and shards with the engine's own weights.
    denominators : what the engine's reduction divides the sample's token losses by (for a sum: 1). Computed from the
        inputs, not from the loss.
    metrics : what the adapter reports, if anything.
    """

    gradients: list[Tensor]
    denominators: list[float]
    metrics: dict[str, Any] = field(default_factory=dict)

    def coefficients(self) -> list[Tensor]:
        """-c_t A_t of each sample, float64."""
        return [g.double() * d for g, d in zip(self.gradients, self.denominators, strict=True)]


class Engine(ABC):
    """One adapter as the suite sees it. Subclass it in the adapter's test module."""

    #: For messages.
    name: ClassVar[str]
    #: Layouts that `run` understands; the first is the default.
    layouts: ClassVar[tuple[str, ...]] = ("padded",)
    #: Numbers of context-parallel shards that `run_shards` understands.
    shards: ClassVar[tuple[int, ...]] = ()
    #: check -> why it does not apply to this engine.
    not_applicable: ClassVar[Mapping[str, str]] = {}
    #: case of `core.cases.CASES` -> why the engine does not take that rule.
    unsupported: ClassVar[Mapping[str, str]] = {}
    #: What the message about missing rollout log-probabilities must name.
    anchor_setting: ClassVar[str] = ""

    @abstractmethod
    def run(
        self,
        samples: Sequence[Sample],
        rule: Any,
        *,
        layout: str,
        micro_batches: Sequence[Sequence[int]],
        max_on_policy_divergence: float | None = None,
    ) -> Outcome:
        """One optimizer step's losses under `rule`, with fresh adapter state.

        `micro_batches` holds indices into `samples`: each inner list is one call of the loss. Gradients and
        denominators come back in the order of `samples`.
        """

    def run_shards(self, samples: Sequence[Sample], cases: Sequence[str], shards: int) -> list[Outcome]:
        """The same under context parallelism, one micro-batch, for each case of `core.cases.CASES`."""
        raise NotImplementedError

    def run_without_rollout(self, samples: Sequence[Sample], rule: Any) -> None:
        """Call the adapter the way the engine does when it has no rollout log-probabilities."""
        raise NotImplementedError

    # -- shorthands -----------------------------------------------------------------------------------------------

    def cases(self, among: Sequence[str] = tuple(REFERENCE_CASES)) -> list[str]:
        """Cases that this engine supports."""
        unknown = set(self.unsupported) - set(CASES)
        assert not unknown, f"{self.name}: unsupported names no case: {unknown}"
        return [case for case in among if case not in self.unsupported]

    def go(self, samples: Sequence[Sample], rule: Any, **options: Any) -> Outcome:
        """`run` with everything in one micro-batch and the first layout, unless said otherwise."""
        options.setdefault("layout", self.layouts[0])
        options.setdefault("micro_batches", [range(len(samples))])
        outcome = self.run(samples, rule, **options)
        assert [len(g) for g in outcome.gradients] == [len(s.response) for s in samples]
        assert len(outcome.denominators) == len(samples)
        return outcome


# ------------------------------------------------------------------------------------------------------------- samples


def make_samples(
    seed: int, lengths: Sequence[int], prompts: Sequence[int], holes: float = 0.25, scale: float = 0.3
) -> list[Sample]:
    """Ragged random samples, one advantage a response; holes hold harmless values (see `with_garbage`)."""
    out = []
    for response, prompt in zip(random_responses(seed, lengths, scale, holes), prompts, strict=True):
        policy, rollout = (torch.where(response.mask, x, -1.0) for x in (response.policy, response.rollout))
        out.append(Sample(replace(response, policy=policy, rollout=rollout), prompt))
    return out


def clear_samples(cases: Sequence[str], seed: int, **options: Any) -> list[Sample]:
    """Samples on which no quantity lies so near to a limit of one of the rules that rounding could decide."""
    for attempt in range(seed, seed + 200):
        samples = make_samples(attempt, **options)
        if all(s.response.mask.any() for s in samples) and all(
            s.response.reference(case).margin > MARGIN for s in samples for case in cases
        ):
            return samples
    raise AssertionError(f"no clear samples for {cases} from seed {seed}")


def standard(cases: Sequence[str], seed: int = 1000) -> list[Sample]:
    """Six ragged samples with holes and prompts of different lengths."""
    return clear_samples(cases, seed, lengths=[17, 5, 24, 1, 12, 9], prompts=[3, 1, 7, 2, 5, 4])


def with_garbage(samples: Sequence[Sample]) -> list[Sample]:
    """The same with NaN, infinities and huge numbers in every column outside the mask."""
    g = torch.Generator().manual_seed(5)
    out = []
    for sample in samples:
        r = sample.response
        fill = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), (2, len(r)), generator=g)]
        policy, rollout = (torch.where(r.mask, x, f) for x, f in zip((r.policy, r.rollout), fill, strict=True))
        out.append(Sample(replace(r, policy=policy, rollout=rollout), sample.prompt))
    return out


def wanted(sample: Sample, case: str) -> Tensor:
    """-c_t A_t by the slow float64 loops, ``[T]``."""
    c = torch.tensor(sample.response.reference(case).coefficient, dtype=torch.float64)
    return -c * torch.where(sample.response.mask, sample.response.advantage.double(), 0.0)


def same(got: Sequence[Tensor], want: Sequence[Tensor], what: str, rtol: float = RTOL, atol: float = ATOL) -> None:
    """Equal within float32, sample by sample."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        where = f"{what}, sample {i}: "
        torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=atol, msg=where.__add__)


# --------------------------------------------------------------------------------------------------------- the checks

#: name -> check. A check takes an engine (and a case, where `PER_CASE` names it) and asserts.
CHECKS: dict[str, Callable[..., None]] = {}
PER_CASE = ("reference",)


def check(function: Callable[..., None]) -> Callable[..., None]:
    """Register a check under its name."""
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


@check
def check_reference(engine: Engine, case: str) -> None:
    """Random ragged batches with holes and prompts: -c_t A_t equals the float64 loops, in every layout."""
    for seed, scale in ((1, 0.3), (300, 0.05), (600, 0.6)):
        samples = clear_samples([case], seed, lengths=[13, 1, 22, 6], prompts=[2, 5, 1, 3], scale=scale)
        for layout in engine.layouts:
            got = engine.go(samples, make(case), layout=layout).coefficients()
            same(got, [wanted(s, case) for s in samples], f"{engine.name}, {case}, {layout}, scale {scale}")


@check
def check_golden(engine: Engine) -> None:
    """The printed figures of tests/data: E1 for each rule, and the authors' published masks."""
    figures = json.loads((DATA / "rules.json").read_text())["values"]
    binary = {"divergence": "binary_tv"}
    fixed = {**binary, "delta_b": 0.015, "budget": "fixed"}
    rules: dict[str, Any] = {
        "E1|ppo-sym .2|A={:+d}": ("ppo_clip", {"eps_high": 0.2}),
        "E1|clip-higher .2/.28|A={:+d}": ("ppo_clip", {}),
        "E1|cispo [0,1.2]|A={:+d}": ("cispo", {}),
        "E1|cispo [0,3]|A={:+d}": ("cispo", {"ratio_max": 3.0}),
        "E1|minpro-soft .2/.28|A={:+d}": ("minpro", {}),
        "E1|dppo-tv .15|A={:+d}": ("dppo", binary),
        "E1|dppo-kl .05|A={:+d}": ("dppo", {"delta": 0.05, "divergence": "binary_kl"}),
        "E1|dppo-tv .15 cap1.25|A={:+d}": ("dppo", {**binary, "ratio_cap": 1.25}),
        "E1|nfpo N=1|A={:+d}": ("none", {}),
        "CPPO loss detached E1 A{:+d}": ("cppo", fixed),
        "CPPO loss detached cap1.22 E1 A{:+d}": ("cppo", {**fixed, "ratio_cap": 1.22}),
    }
    supported = {CASES[case][0] for case in engine.cases()}
    for key, (name, parameters) in rules.items():
        if name not in supported:
            continue
        for sign in (1, -1):
            want = torch.tensor(figures[key.format(sign)]["grad"], dtype=torch.float64)
            sample = Sample(_response([0.62, 0.31, 0.46, 0.26], [0.5, 0.4, 0.3, 0.2], sign), prompt=2)
            got = engine.go([sample], cppo.make_rule(name, **parameters)).coefficients()
            same(got, [want], f"{engine.name}, {key.format(sign)}", rtol=1e-5)
    if "cppo" not in supported:
        return
    for published in json.loads((DATA / "cppo_binary_tv_adaptive.json").read_text())["cases"]:
        parts = {k: torch.tensor(published[k]).split(published["lengths"]) for k in ("policy_logp", "rollout_logp")}
        advantages = torch.tensor(published["advantages"]).split(published["lengths"])
        columns = zip(parts["policy_logp"], parts["rollout_logp"], advantages, strict=True)
        samples = [Sample(Response(p, m, a, torch.ones(len(p)).bool()), 1) for p, m, a in columns]
        rule = cppo.CPPO(
            delta=published["delta"], w_min=published["w_min"], delta_b=published["delta_b_min"], divergence="binary_tv"
        )
        keep = [int(c != 0) for part in engine.go(samples, rule).coefficients() for c in part]
        assert keep == published["keep"], f"{engine.name}: published mask, seed {published['seed']}"


def _response(policy: Sequence[float], rollout: Sequence[float], advantage: float) -> Response:
    p, m = torch.tensor(policy).log(), torch.tensor(rollout).log()
    return Response(p, m, torch.full_like(p, advantage), torch.ones(len(p), dtype=torch.bool))


@check
def check_keep_all(engine: Engine) -> None:
    """Without a trust region: plain importance sampling, d loss/d log pi = -rho_t A_t."""
    samples = make_samples(7, [11, 4, 19], [2, 1, 6])
    for layout in engine.layouts:
        got = engine.go(samples, cppo.NoTrustRegion(), layout=layout).coefficients()
        want = []
        for s in samples:
            r = s.response
            rho = (r.policy.double() - r.rollout.double()).exp()
            want.append(torch.where(r.mask, -rho * r.advantage.double(), 0.0))
        same(got, want, f"{engine.name}, {layout}: keep-all is not importance sampling")


@check
def check_layouts(engine: Engine) -> None:
    """padded == packed (all layouts of the engine agree)."""
    cases = engine.cases(FEW)
    samples = standard(cases)
    for case in cases:
        first, *rest = (engine.go(samples, make(case), layout=layout).coefficients() for layout in engine.layouts)
        for layout, other in zip(engine.layouts[1:], rest, strict=True):
            same(other, first, f"{engine.name}, {case}: {layout} differs from {engine.layouts[0]}")


@check
def check_batch_mates(engine: Engine) -> None:
    """A sample's verdict does not depend on what else is in the batch, hence neither on padding nor on order."""
    cases = engine.cases(FEW)
    samples = standard(cases)
    for layout in engine.layouts:
        for case in cases:
            together = engine.go(samples, make(case), layout=layout).coefficients()
            alone = [engine.go([s], make(case), layout=layout).coefficients()[0] for s in samples]
            same(together, alone, f"{engine.name}, {case}, {layout}: batch mates matter")
            turned = engine.go(samples[::-1], make(case), layout=layout).coefficients()[::-1]
            same(turned, alone, f"{engine.name}, {case}, {layout}: order matters")


SPLITS: tuple[list[list[int]], ...] = ([[0, 1, 2], [3, 4, 5]], [[4], [0, 3, 5, 1], [2]], [[i] for i in range(6)])


@check
def check_micro_batches(engine: Engine) -> None:
    """Splitting a batch into micro-batches changes no coefficient (the engine's denominators may change)."""
    cases = engine.cases(FEW)
    samples = standard(cases)
    for case in cases:
        want = engine.go(samples, make(case)).coefficients()
        for split in SPLITS:
            got = engine.go(samples, make(case), micro_batches=split).coefficients()
            same(got, want, f"{engine.name}, {case}: micro-batches {split}")


@check
def check_reduction(engine: Engine) -> None:
    """Splitting a batch into micro-batches changes no gradient: the engine's own weights add up to one reduction."""
    cases = engine.cases(("cppo adaptive", "none"))
    samples = standard(cases)
    for case in cases:
        want = engine.go(samples, make(case)).gradients
        for split in SPLITS:
            got = engine.go(samples, make(case), micro_batches=split).gradients
            same(got, want, f"{engine.name}, {case}: gradient with micro-batches {split}", atol=1e-7)


@check
def check_shards(engine: Engine) -> None:
    """Context-parallel shards: the coefficients of the whole."""
    assert engine.shards, f"{engine.name} names no number of shards: say so in not_applicable"
    cases = engine.cases(FEW)
    samples = standard(cases)
    for shards in engine.shards:
        for case, outcome in zip(cases, engine.run_shards(samples, cases, shards), strict=True):
            want = [wanted(s, case) for s in samples]
            same(outcome.coefficients(), want, f"{engine.name}, {case}, {shards} shards")


@check
def check_garbage(engine: Engine) -> None:
    """NaN, infinities and huge numbers outside the mask change nothing, and get the gradient 0."""
    cases = engine.cases((*FEW, "ppo_clip", "none"))
    samples = standard(cases)
    for layout in engine.layouts:
        for case in cases:
            clean = engine.go(samples, make(case), layout=layout)
            dirty = engine.go(with_garbage(samples), make(case), layout=layout)
            same(dirty.coefficients(), clean.coefficients(), f"{engine.name}, {case}, {layout}: garbage", 0, 0)
            for s, g in zip(samples, dirty.gradients, strict=True):
                assert (g[~s.response.mask] == 0).all(), f"{engine.name}, {case}: gradient outside the mask"
            for key, value in dirty.metrics.items():
                finite = bool(torch.as_tensor(value).double().isfinite().all())
                assert finite, f"{engine.name}, {case}: metric {key} is {value}"


@check
def check_prompts(engine: Engine) -> None:
    """Prompts of any length in front change nothing."""
    cases = engine.cases(FEW)
    samples = standard(cases)
    longer = [Sample(s.response, s.prompt + 4 + i) for i, s in enumerate(samples)]
    for case in cases:
        want = engine.go(samples, make(case)).coefficients()
        same(engine.go(longer, make(case)).coefficients(), want, f"{engine.name}, {case}: the prompt matters")


@check
def check_holes(engine: Engine) -> None:
    """Tokens outside the mask, in the middle of a response: the same as if they were not there."""
    cases = engine.cases(FEW)
    samples = standard(cases)
    dense = [Sample(s.response.columns(s.response.mask.nonzero()[:, 0]), s.prompt) for s in samples]
    for case in cases:
        got = engine.go(samples, make(case)).coefficients()
        inside = [g[s.response.mask] for g, s in zip(got, samples, strict=True)]
        same(inside, engine.go(dense, make(case)).coefficients(), f"{engine.name}, {case}: holes count")


@check
def check_denominators(engine: Engine) -> None:
    """Rejected tokens stay in every denominator: gradients of kept tokens are those of keep-all."""
    samples = standard(["dppo"])
    everything = engine.go(samples, cppo.NoTrustRegion())
    strict = engine.go(samples, cppo.DPPO(delta=0.02, divergence="binary_tv"))
    assert strict.denominators == everything.denominators
    dropped = 0
    for s, kept, full in zip(samples, strict.gradients, everything.gradients, strict=True):
        keep = kept != 0
        dropped += int((s.response.mask & ~keep).sum())
        torch.testing.assert_close(kept[keep], full[keep], rtol=1e-5, atol=1e-8)
    assert dropped > 5  # else this proves nothing


@check
def check_empty(engine: Engine) -> None:
    """A response without any loss token gets the gradient 0 and spoils nothing."""
    cases = engine.cases(FEW)
    samples = standard(cases)
    empty = replace(samples[1].response, mask=torch.zeros_like(samples[1].response.mask))
    emptied = [samples[0], Sample(empty, samples[1].prompt), *samples[2:]]
    for layout in engine.layouts:
        for case in cases:
            got = engine.go(emptied, make(case), layout=layout)
            assert (got.gradients[1] == 0).all()
            want = [wanted(s, case) for s in emptied]
            same(
                [c for i, c in enumerate(got.coefficients()) if i != 1], [w for i, w in enumerate(want) if i != 1], case
            )
            finite = all(math.isfinite(float(v)) for v in got.metrics.values() if isinstance(v, int | float))
            assert finite, f"{engine.name}, {case}: {got.metrics}"


@check
def check_anchor(engine: Engine) -> None:
    """Without rollout log-probabilities: a UserError that names the setting. Never a fall-back."""
    assert engine.anchor_setting, f"{engine.name} names no setting for the rollout log-probabilities"
    with pytest.raises(UserError) as error:
        engine.run_without_rollout(standard(["dppo"]), make("dppo"))
    assert engine.anchor_setting in str(error.value), str(error.value)


@check
def check_topk(engine: Engine) -> None:
    """A divergence that needs more than the sampled token is refused, with what to set instead."""
    samples = standard(["dppo"])
    for rule in (cppo.CPPO(), cppo.DPPO(divergence="topk_kl"), cppo.CPPO(divergence="exact_tv")):
        with pytest.raises(UserError, match="divergence='binary_"):
            engine.go(samples, rule)


@check
def check_first_update(engine: Engine) -> None:
    """The first batch of a run, where pi = mu: accepted when they agree, refused when they do not."""
    samples = standard(["dppo"])
    equal = [Sample(replace(s.response, policy=s.response.rollout.clone()), s.prompt) for s in samples]
    rule = make("cppo adaptive")
    engine.go(equal, rule, max_on_policy_divergence=0.03)
    with pytest.raises(UserError, match="not the same policy"):
        engine.go(samples, rule, max_on_policy_divergence=0.03)


# ------------------------------------------------------------------------------------------------------------- running


def checks(engine: Engine) -> list[Any]:
    """pytest parameters: every check, each case of those that go case by case; the rest say why they do not apply."""
    unknown = set(engine.not_applicable) - set(CHECKS)
    assert not unknown, f"{engine.name}: not_applicable names no check: {unknown}"
    out = []
    for name, function in CHECKS.items():
        reason = engine.not_applicable.get(name)
        if reason is None and name == "layouts" and len(engine.layouts) == 1:
            reason = f"one layout only ({engine.layouts[0]})"
        if reason is None and name == "shards" and not engine.shards:
            raise AssertionError(f"{engine.name}: say in `shards` or `not_applicable` what holds for shards")
        if reason is not None:
            out.append(pytest.param(functools.partial(_skip, engine, name, reason), id=name))
        elif name in PER_CASE:
            for case in REFERENCE_CASES:
                why = engine.unsupported.get(case)
                call = functools.partial(function, engine, case) if why is None else None
                skip = functools.partial(_skip, engine, f"{name}, {case}", why or "")
                out.append(pytest.param(call or skip, id=f"{name}-{case}"))
        else:
            out.append(pytest.param(functools.partial(function, engine), id=name))
    return out


def suite(engine: Engine, argument: str = "check") -> Any:
    """Decorator of a test that takes `check` and calls it: all checks against `engine`."""
    return pytest.mark.parametrize(argument, checks(engine))


def _skip(engine: Engine, name: str, reason: str) -> None:
    pytest.skip(f"{engine.name}: {name} does not apply: {reason}")
