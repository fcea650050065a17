"""Thresholds of a rule for a target share of held-back tokens, solved on tokens that were seen.

* A rule says which of its parameters are thresholds and where they may lie (`TrustRegion.limits`).
* `solve` asks the rule itself, ``rule(batch)``, and no copy of its formula: the share of tokens that a rule holds back
  never grows when a threshold is loosened, so a bisection finds it.
* What counts as held back is what the reasons say (`cppo.rules.base.held_back`): a coefficient of 0, as in
  ``trust/masked_fraction``; for rules that clamp or fade instead of dropping the tokens whose weight they change.

`delta: auto` in a recipe (`cppo.training.calibration`) and `cppo calibrate` (`cppo.dumps.calibrate`) use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError
from cppo.rules import RULES, TrustRegion
from cppo.rules.base import held_back
from cppo.rules.limits import LOOSEST, TIGHTEST
from cppo.tokens import TokenBatch

#: The value in a recipe that asks for a threshold to be found.
AUTO = "auto"
#: Relative precision of a jump, and of the middle between two jumps.
SHARP, ROUGH = 1e-5, 1e-3


def check_automatic(rule: str, parameters: Mapping[str, Any]) -> list[str]:
    """The names in `parameters` whose value is `AUTO`, in the order of the rule's `limits`.

    Raises
    ------
    UserError : a parameter that is not a threshold is `AUTO`, or one that has no effect with the others.
    """
    asked = [name for name, value in parameters.items() if isinstance(value, str) and value == AUTO]
    cls = RULES.get(rule)
    known = cls.limits if cls else {}
    for name in asked:
        if not known:
            raise UserError(f"rule.{name} is auto, but the rule {rule} has no threshold that could set itself.")
        if name not in known:
            raise UserError(
                f"rule.{name} is auto, but it is not a threshold of {rule}: {' and '.join(known)} can set themselves. "
                f"Give rule.{name} a value."
            )
    for name, why in (cls.idle_limits(parameters) if cls else {}).items():
        if name in asked:
            raise UserError(f"rule.{name} is auto, but rule.{why}: leave it out.")
    return [name for name in known if name in asked]


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens that thresholds are solved on.

    batch : whole responses, with the rule's divergence where it needs one. weight : what a loss token counts, float64,
    shape of the tokens, 0 outside the mask, sum 1. `Sample.of` gives each of several updates the same share, as the
    mean of ``trust/masked_fraction`` over updates does.
    """

    batch: TokenBatch
    weight: Tensor

    @classmethod
    def of(cls, batch: TokenBatch, update: Tensor | None = None) -> Sample:
        """update : which update saw a token, integers, broadcastable against the tokens; None: all are one."""
        mask = batch.loss_mask
        if not bool(mask.any()):
            raise UserError("there is no loss token to solve thresholds on.")
        group = torch.zeros_like(mask, dtype=torch.int64)
        if update is not None:
            group = update.unique(return_inverse=True)[1].reshape(update.shape).expand(mask.shape)
        count = torch.bincount(group[mask]).double()
        share = torch.where(count > 0, 1 / count.clamp(min=1), 0) / (count > 0).sum()
        weight = torch.zeros(mask.shape, dtype=torch.float64)
        weight[mask] = share[group[mask]]
        return cls(batch, weight)

    @property
    def tokens(self) -> int:
        """Loss tokens."""
        return int(self.batch.loss_mask.sum())

    @property
    def moved(self) -> bool:
        """Whether the policy differs from the rollout policy anywhere: else no threshold could be told from another."""
        return bool((self.batch.log_ratio() != 0).any())

    def share(self, rule: TrustRegion) -> float:
        """Weighted share of the loss tokens that the rule holds back."""
        return float(self.weight[held_back(rule(self.batch).reason)].sum())


@dataclass(frozen=True)
class Solution:
    """Thresholds by name, and the share of the tokens that the rule holds back with them on the sample."""

    thresholds: dict[str, float]
    share: float


class Unreachable(UserError):
    """No value of a threshold gives the target on these tokens."""


@torch.no_grad()
def solve(rule: TrustRegion, names: Sequence[str], sample: Sample, target: float) -> Solution:
    """The values of the thresholds `names` with which `rule` holds back a share `target` of the sample.

    One threshold: the share nearest to the target at which it holds back anything, in the middle between the tokens
    (TRM: responses) that it separates. Two: the first takes half of the target with the second switched off, then the
    second the rest. Where the second cannot (responses too short for a prefix budget, nothing on the other side of the
    ratio), both are moved together from their defaults, in proportion. All other parameters of `rule` are kept.

    Raises
    ------
    Unreachable : the other parameters hold back more than the target already, or even the tightest thresholds less.
    """
    if not 0 < target < 1:
        raise UserError(f"the target is {target}, expected a share between 0 and 1, such as 0.01.")
    if not names:
        raise UserError(f"{rule.name} has no threshold to solve for.")
    limits = rule.limits

    def made(**looseness: float) -> TrustRegion:
        return replace(rule, **{name: limits[name].value(x) for name, x in looseness.items()})  # type: ignore[type-var]

    def found(**looseness: float) -> Solution:
        values = {name: limits[name].value(x) for name, x in looseness.items()}
        return Solution(values, sample.share(made(**looseness)))

    def one(name: str, share: float, **others: float) -> float:
        def at(x: float) -> float:
            return sample.share(made(**{name: x}, **others))

        return _search(at, share, limits[name].loosest, f"rule {rule.name}, {name}")

    if len(names) == 1:
        return found(**{names[0]: one(names[0], target)})
    first, second = names
    try:
        x = one(first, target / 2, **{second: limits[second].loosest})
        return found(**{first: x, second: one(second, target, **{first: x})})
    except Unreachable:  # of two thresholds that are moved together, this one says what is wrong
        pass
    defaults: dict[str, Any] = {field.name: field.default for field in fields(rule)}  # type: ignore[arg-type]
    start = {name: limits[name].looseness(defaults[name]) for name in names}

    def both(scale: float) -> dict[str, float]:
        return {name: min(scale * x, limits[name].loosest) for name, x in start.items()}

    what = f"rule {rule.name}, {first} and {second}"
    return found(**both(_search(lambda scale: sample.share(made(**both(scale))), target, LOOSEST, what)))


def _search(share: Callable[[float], float], target: float, loosest: float, what: str) -> float:
    """x with the share nearest to the target, but above that without any limit; `share` never grows with x."""
    low, high = TIGHTEST, loosest
    least, most = share(high), share(low)
    if least >= target:
        raise Unreachable(
            f"{what}: even without this limit {least:.3g} of the tokens are held back, by the rule's other "
            f"parameters, and the target is {target:.3g}. Set a larger target, or loosen the others."
        )
    if most < target:
        raise Unreachable(
            f"{what}: the tightest limit holds back {most:.3g} of the tokens, and the target is {target:.3g} (a trust "
            "region drops no token that moves back to the rollout policy). Set a smaller target."
        )
    low, high = _edge(lambda x: share(x) >= target, low, high, SHARP)
    over, under = share(low), share(high)
    if under <= least or over - target <= target - under:
        return math.sqrt(_edge(lambda x: share(x) > over, TIGHTEST, low, ROUGH)[1] * low)
    return math.sqrt(high * _edge(lambda x: share(x) >= under, high, loosest, ROUGH)[0])


def _edge(holds: Callable[[float], bool], low: float, high: float, precision: float) -> tuple[float, float]:
    """Where `holds`, which is true up to some x, ends: (true, false) as near to each other as the precision says."""
    while high > (1 + precision) * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
