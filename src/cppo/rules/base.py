"""The contract of a rule: tokens in, a coefficient and a reason for each token out; and the registry by name.

Every first-order policy objective of this field has the gradient

    grad = sum_t  c_t * A_t * grad log pi(y_t | s_t)

A rule is the map from what is known about the tokens to c_t. To add one: a frozen dataclass with `name`, `source`, its
formula as docstring and a `judge` method, decorated with `register`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cppo.divergence import DIVERGENCES, binary_kl, binary_tv
from cppo.rules.limits import Limit
from cppo.tokens import TokenBatch
from cppo.words import nearest


class Reason(enum.IntEnum):
    """Why a token has its coefficient (`Verdict.reason`, uint8)."""

    KEPT = 0  #: within all limits
    TOWARDS = 1  #: a limit is exceeded, but the update moves pi back to mu (or A = 0): kept
    TOKEN_LIMIT = 2  #: its own divergence exceeds the token limit
    PREFIX_BUDGET = 3  #: the divergence of its prefix has used up the budget
    SEQUENCE_LIMIT = 4  #: its whole response is rejected
    RATIO_CLIP = 5  #: dropped by its ratio
    CLAMPED = 6  #: its weight is clamped, not dropped
    OUTSIDE = 7  #: not a loss token

    @property
    def key(self) -> str:
        """Its name in files and metrics: "token_limit"."""
        return self.name.lower()

    @property
    def caption(self) -> str:
        """What it says of a token, for people."""
        return _CAPTIONS[self]

    @property
    def held(self) -> bool:
        """Whether it holds a token back: the rule has changed the token's gradient."""
        return self not in (Reason.KEPT, Reason.TOWARDS, Reason.OUTSIDE)


_CAPTIONS = {
    Reason.KEPT: "kept",
    Reason.TOWARDS: "over a limit but kept (moves back to the rollout policy)",
    Reason.TOKEN_LIMIT: "over the token limit",
    Reason.PREFIX_BUDGET: "prefix budget used up",
    Reason.SEQUENCE_LIMIT: "over the sequence limit",
    Reason.RATIO_CLIP: "ratio out of its range (dropped)",
    Reason.CLAMPED: "ratio out of its range (weight clamped)",
    Reason.OUTSIDE: "not a loss token",
}

#: The reasons that hold a token back.
HELD = tuple(reason for reason in Reason if reason.held)


def held_back(reason: Tensor) -> Tensor:
    """Where a rule holds a token back (bool, shape of `reason`): dropped, or faded or clamped by rules that do that."""
    held = torch.zeros_like(reason, dtype=torch.bool)
    for code in HELD:
        held |= reason == int(code)
    return held


@dataclass(frozen=True, eq=False)
class Account:
    """How a rule with a prefix budget sees each token; shapes of the tokens, without gradient.

    Attributes
    ----------
    weight : w_t. spent : S_t = sum_{j<=t} w_j D_j. allowance : delta + delta_b W_{t-1}, what S_t may be; None where the
        budget is switched off.
    """

    weight: Tensor
    spent: Tensor
    allowance: Tensor | None


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a rule decided. No tensor in it carries a gradient.

    Attributes
    ----------
    coefficient : c_t >= 0, shape of the tokens, float32 (float64 for float64 input); exactly 0 where a hard rule drops.
    reason : codes of `Reason`, shape of the tokens, uint8.
    divergence : D_t that the rule used, shape of the tokens; None for rules of the ratio alone.
    threshold : the largest D_t that is within the token's limits, all other D being what they are (so it would be kept
        whatever the sign of the advantage; TRM keeps a response whose tokens all are); same units as `divergence`,
        broadcastable against tokens; below zero where the others have overdrawn the budget. None for rules of the
        ratio.
    delta_b : prefix budget per token in use, one per sequence (``[B]`` or ``[S]``); None without prefix budget.
    budget_used : S_T / (delta + delta_b W_{T-1}), one per sequence: above 1 the response overdrew its budget.
    capped : where `ratio_cap` cut the ratio; None without cap.
    """

    coefficient: Tensor
    reason: Tensor
    divergence: Tensor | None = None
    threshold: Tensor | None = None
    delta_b: Tensor | None = None
    budget_used: Tensor | None = None
    capped: Tensor | None = None


class TrustRegion(ABC):
    """Base of all rules. A subclass is a frozen dataclass whose fields are its parameters."""

    #: Name in configurations.
    name: str = ""
    #: Where the formula comes from.
    source: str = ""
    #: Which divergence the rule needs (one of `cppo.divergence.DIVERGENCES`); None for rules of the ratio alone.
    divergence: str | None = None
    #: Upper bound of the ratio in the coefficient; None for no bound.
    ratio_cap: float | None = None
    #: Thresholds that can be calibrated. Of two that are both asked for, the first takes half of the target.
    limits: ClassVar[Mapping[str, Limit]] = {}
    #: Whether `delta` limits each token's divergence: one delta then means the same in all such rules.
    limits_tokens: bool = False
    #: Names that the field uses for this rule with certain parameters.
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Why the theory has no bound for it, where it has none (`cppo bound`).
    unbounded: str = "no statement of the theory is about this rule"

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Verdict:
        """Judge every token of `batch`.

        Raises
        ------
        ValueError : the rule needs a divergence that the batch does not carry.
        """
        return self.judge(batch)

    @abstractmethod
    def judge(self, batch: TokenBatch) -> Verdict:
        """The rule itself; called without gradient."""

    def account(self, batch: TokenBatch, verdict: Verdict) -> Account | None:
        """Weights and prefix budget behind a verdict; None for rules without them."""
        return None

    def ratio_range(self) -> tuple[float, float] | None:
        """The ratios that count in full; None for rules that do not look at the token's ratio."""
        return None

    @classmethod
    def idle_limits(cls, parameters: Mapping[str, Any]) -> Mapping[str, str]:
        """Those of `limits` that have no effect with some parameters, and why."""
        return {}

    def parameters(self) -> dict[str, Any]:
        """The rule's parameters by name, as given."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def token_divergence(self, batch: TokenBatch) -> Tensor:
        """D_t: the batch's own where it carries one, else the sampled token's if `divergence` asks for it; 0
        outside.
        """
        if batch.divergence is not None:
            return batch.clean(batch.divergence)
        if self.divergence in ("binary_tv", "binary_kl"):
            score = binary_tv if self.divergence == "binary_tv" else binary_kl
            return score(batch.clean(batch.policy_logp), batch.clean(batch.rollout_logp))
        where = "cppo.scoring.adaptive_for_rule" if self.divergence == "adaptive_tv" else "cppo.divergence"
        raise ValueError(
            f"{self.name} needs divergence={self.divergence!r}, but the batch carries none. Give "
            f"TokenBatch(divergence=...) (see {where}), or ask for the sampled token's own with "
            "divergence='binary_tv' or 'binary_kl'."
        )

    def capped_ratio(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """rho_t = min(exp(log ratio), ratio_cap), 0 outside the mask, and where the cap cut. Consumes `log_ratio`."""
        # Multiplying by the mask is safe here: the log-ratio is bounded and clean outside.
        ratio = log_ratio.exp_().mul_(mask)
        if self.ratio_cap is None:
            return ratio, None
        capped = ratio > self.ratio_cap
        return ratio.clamp_(max=self.ratio_cap), capped

    # -- for `adaptive_tv` alone: skip it at first ----------------------------------------------------------------

    @torch.no_grad()
    def bracket(self, batch: TokenBatch, lower: Tensor, upper: Tensor) -> tuple[Verdict, Verdict]:
        """Two verdicts between which every verdict lies whose D_t are in [lower_t, upper_t]: (permissive, strict).

        For every D with lower <= D <= upper at all loss tokens: strict c_t <= c_t(D) <= permissive c_t. So a token
        whose coefficient is the same at both ends is decided, whatever its D_t and those of the others are.

        Here: the verdicts on `lower` and on `upper`. That is right for rules whose c_t never increases with any D_s,
        and trivially for rules without a divergence. A rule for which a larger D_s can help another token (CPPO, whose
        adaptive budget grows with D) must give its own. A custom rule that is neither gets wrong decisions from
        `cppo.scoring.adaptive_for_rule`.

        Parameters
        ----------
        lower, upper : shape of the tokens, lower <= upper; outside the mask anything. The batch's own divergence is
            not looked at.
        """
        return self.judge(batch.with_divergence(lower)), self.judge(batch.with_divergence(upper))

    def pivotal(self, batch: TokenBatch, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Loss tokens (bool, shape of the tokens) whose D_t, within [lower_t, upper_t], moves a limit of the whole
        response by its rank and not as a summand (CPPO's quantile); None: the rule has no such limit.

        Only `cppo.scoring.adaptive_for_rule` asks, to choose what to resolve: a wrong answer costs time, never
        correctness.
        """
        return None


def moves_away(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """Whether the update would move pi further from mu: A_t (rho_t - 1) > 0.

    Written as sign(A) * log rho > 0: the same in exact arithmetic, and a tiny advantage times a tiny ratio cannot
    underflow.
    """
    return advantages.sign() * log_ratio > 0


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_positive(rule: str, **values: Any) -> None:
    """Every value must be a finite number above 0."""
    for name, value in values.items():
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        require(ok, f"{rule}: {name} is {value!r}, expected a number above 0.")


def require_divergence(rule: str, divergence: Any) -> None:
    """The divergence must be one that exists."""
    known = ", ".join(DIVERGENCES)
    hint = nearest(divergence, DIVERGENCES)
    require(divergence in DIVERGENCES, f"{rule}: divergence is {divergence!r}, expected one of {known}.{hint}")


def require_cap(rule: str, ratio_cap: Any) -> None:
    """A cap of the ratio must be above 1 or None: below 1 it would reweight tokens that have not moved."""
    if ratio_cap is not None:
        require_positive(rule, ratio_cap=ratio_cap)
        require(ratio_cap > 1, f"{rule}: ratio_cap is {ratio_cap!r}, expected a number above 1, or none.")


#: Rules by name, sorted: lists of rules are read by people.
RULES: dict[str, type[TrustRegion]] = {}

R = TypeVar("R", bound=type[TrustRegion])


def register(cls: R) -> R:
    """Class decorator: make a rule available by its name."""
    require(
        bool(cls.name) and cls.name not in RULES, f"a rule named {cls.name!r} exists already, or the name is empty."
    )
    RULES[cls.name] = cls
    ordered = {name: RULES[name] for name in sorted(RULES)}
    RULES.clear()
    RULES.update(ordered)
    return cls


def rule_class(name: str) -> type[TrustRegion]:
    """The class of a rule by its name.

    Raises
    ------
    ValueError : there is none of this name; the nearest one is named.
    """
    if name not in RULES:
        raise ValueError(f"there is no rule {name!r}: the rules are {', '.join(RULES)}.{nearest(name, RULES)}")
    return RULES[name]


def make_rule(name: str, **parameters: Any) -> TrustRegion:
    """A rule by name, for configurations: ``make_rule("dppo", delta=0.15)``.

    Raises
    ------
    ValueError : unknown name or parameter (the nearest right one is named), or a value out of range.
    """
    cls = rule_class(name)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for parameter in parameters:
        if parameter not in known:
            has = f"its parameters are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"rule {name!r} has no parameter {parameter!r}: {has}.{nearest(parameter, known)}")
    return cls(**parameters)
