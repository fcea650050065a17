"""What the adapters share: a rule from an engine's settings, the loss of a batch, and checks that speak up.

An adapter builds a `TokenBatch` from what its engine hands over, calls a `TrustRegionLoss`, and reduces the per-token
loss the way its engine does. Nothing here needs an engine.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo.divergence import BINARY
from cppo.errors import UserError, as_user_error
from cppo.objective import Reduce, metrics, token_loss
from cppo.rules import Reason, TrustRegion, Verdict, make_rule
from cppo.tokens import TokenBatch

#: Environment variable that carries a rule into worker processes of engines without settings for it; JSON.
RULE_VARIABLE = "CPPO_RULE"

#: What an engine adds to its rollout batch for whoever watches the losses: a response's reward ``[B]``, the mean reward
#: of the others in its group ``[B]``, the group ``[B]``, and which tokens the policy sampled ``[B, T]``.
REWARD, BASELINE, GROUP, TOKENS = "trust_reward", "trust_baseline", "trust_group", "trust_tokens"

#: Metrics that not every batch has.
CONDITIONAL = ("trust/first_rejected_position", "trust/first_update_divergence")


class EngineVersionWarning(UserWarning):
    """The installed engine is not of a version that the adapter was written for."""


class EngineChangedError(UserError, ImportError):
    """The installed engine no longer has the shape that the adapter was written for."""


def check_version(distribution: str, written_for: str, prefix: str | None = None) -> str | None:
    """Compare the installed version of `distribution` with the one the adapter was written for.

    Parameters
    ----------
    written_for : the exact version that the contract test ran with, such as "0.3.0".
    prefix : versions that begin with this are taken as compatible; default: the first two numbers ("0.3.").

    Returns
    -------
    The installed version, or None where the engine is not installed as a distribution (a source checkout).

    Warns
    -----
    EngineVersionWarning : another version; the adapter goes on, its shape checks (`require_parameters`) decide.
    """
    try:
        installed = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    if not (installed + ".").startswith(prefix or ".".join(written_for.split(".")[:2]) + "."):
        warnings.warn(
            f"this adapter was written for {distribution} {written_for}, installed is {installed}. It goes on; "
            f"compare the first update's trust/first_update_divergence (near 0), and pin {distribution}=={written_for} "
            "if anything looks odd.",
            EngineVersionWarning,
            stacklevel=3,
        )
    return installed


def require_parameters(function: Callable[..., Any], *names: str, engine: str) -> None:
    """Raise unless `function` of an engine takes the parameters `names` that the adapter relies on.

    Raises
    ------
    EngineChangedError : parameters are gone; the message names them and what there is now.
    """
    known = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    missing = [name for name in names if name not in known]
    if missing:
        raise EngineChangedError(
            f"{engine}: {getattr(function, '__qualname__', function)} no longer takes {', '.join(missing)} (it takes "
            f"{', '.join(known)}). This adapter does not fit the installed version: see docs/engines.md for the one it "
            "was written for."
        )


def sampled_token_rule(
    rule: TrustRegion | str | Mapping[str, Any] | None, engine: str, **parameters: Any
) -> TrustRegion:
    """The rule of an engine that knows sampled tokens' log-probabilities only.

    `rule` is a rule, a name, or ``{"name": ..., parameter: value}``; further keywords are parameters. The divergence is
    ``binary_tv`` (``binary_kl`` for rules that measure in nats) unless given.

    Raises
    ------
    UserError : an unknown name or parameter, or a divergence that needs more than the sampled token.
    """
    if isinstance(rule, TrustRegion):
        if parameters:
            raise UserError(f"{engine}: a rule is given together with parameters {', '.join(parameters)}.")
        made = rule
    else:
        given = {"name": rule} if isinstance(rule, str) else dict(rule or {})
        given |= parameters
        name = given.pop("name", "cppo")
        try:
            made = make_rule(name, **given)
            if made.divergence is not None and "divergence" not in given:
                made = make_rule(name, **given, divergence=_binary_of(made.divergence))
        except (ValueError, TypeError) as error:
            raise UserError(f"{engine}: {error}") from error
    if made.divergence is not None and made.divergence not in BINARY:
        able = "top-K divergences (TRL, verl, Tinker)" if made.divergence.startswith("topk_") else "that one (TRL)"
        raise UserError(
            f"{engine}: {made.name} asks for divergence={made.divergence!r}, but {engine} hands over the sampled "
            f"token's log-probabilities only. Set divergence={_binary_of(made.divergence)!r}, or use an engine with "
            f"{able}."
        )
    return made


def _binary_of(divergence: str) -> str:
    return "binary_kl" if divergence.endswith("_kl") else "binary_tv"


class Judged(NamedTuple):
    """A judged batch: per-token loss (shape of the tokens, not reduced), the verdict, metrics (floats)."""

    loss: Tensor
    verdict: Verdict
    metrics: dict[str, float]


@dataclass
class TrustRegionLoss:
    """-c_t A_t log pi(y_t) for every token of a batch, with metrics, and a look at the first batch.

    Parameters
    ----------
    rule : the trust region.
    engine : its name, for messages.
    max_on_policy_divergence : the largest mean D_t of the first batch that this object sees. Before the first optimizer
        step pi = mu, so D_t there is the mismatch between sampler and trainer; None: do not look.
    hint : what to set when the first batch's divergence is too large (engine-specific).
    """

    rule: TrustRegion
    engine: str
    max_on_policy_divergence: float | None = 0.03
    hint: str = "Look at temperature (1 in sampler and trainer), top-p/top-k (off) and numeric precision."
    first: bool = field(default=True, init=False)

    def __call__(self, batch: TokenBatch) -> Judged:
        """Judge `batch`. Raises as `judge` does."""
        verdict, stats = self.judge(batch)
        return Judged(token_loss(batch, verdict.coefficient), verdict, stats)

    def judge(
        self, batch: TokenBatch, on_policy: bool | None = None, reduce: Reduce | None = None
    ) -> tuple[Verdict, dict[str, float]]:
        """Verdict and metrics, for engines that have a loss of their own.

        Parameters
        ----------
        on_policy : whether pi = mu in this batch (no update on its rollouts yet), where the engine knows; None: it is
            the first batch that this object sees.
        reduce : over processes (`cppo.metrics`); the check of the first batch then is of all of them.

        Raises
        ------
        UserError : the first batch holds values that cannot be (`TokenBatch.check`), or its mean divergence is above
            `max_on_policy_divergence`.
        """
        # A micro-batch without any loss token (padding rows of some engines) tells nothing: wait for the next one.
        some = bool(batch.loss_mask.any()) if self.first else True
        first = self.first and (some if on_policy is None else on_policy)
        if self.first and on_policy is not False:
            self._check(batch, first and some, reduce)
        verdict = self.rule(batch)
        stats = metrics(batch, verdict, first_update=first if on_policy is None else on_policy, reduce=reduce)
        if first and any(stats[f"trust/{reason.key}_fraction"] for reason in Reason if reason != Reason.OUTSIDE):
            self.first = False
            if self.max_on_policy_divergence is not None:
                check_on_policy(
                    stats.get("trust/first_update_divergence"), self.max_on_policy_divergence, self.engine, self.hint
                )
        return verdict, stats

    def _check(self, batch: TokenBatch, looks: bool, reduce: Reduce | None) -> None:
        """Raise on every process if the batch of one is wrong: whoever raised alone would leave the others waiting."""
        error = None
        if looks:
            try:
                with as_user_error(f"{self.engine}: "):
                    batch.check()
            except UserError as found:
                error = found
        if reduce is not None:
            wrong = batch.policy_logp.new_tensor([error is not None], dtype=torch.float64)
            if bool(reduce(wrong, wrong)[1]) and error is None:
                error = UserError(f"{self.engine}: the first batch of another process is wrong; that process says how.")
        if error is not None:
            raise error


def check_on_policy(divergence: float | None, limit: float, engine: str, hint: str) -> None:
    """Refuse a first update whose mean divergence says that pi and mu are not the same policy.

    Raises
    ------
    UserError : `divergence` is above `limit`.
    """
    if divergence is not None and divergence > limit:
        raise UserError(
            f"{engine}: at the first update, before any optimizer step, the mean divergence between rollout policy and "
            f"trained policy is {divergence:.4g}; expected near 0, at most {limit:g}. The two are not the same policy: "
            f"the trust region would measure that mismatch. {hint} A larger max_on_policy_divergence accepts it."
        )


def loss_from_settings(settings: Any, engine: str, where: str) -> TrustRegionLoss:
    """A loss from ``{"name": "cppo", parameters ..., "max_on_policy_divergence": 0.03}`` of an engine's configuration.

    Parameters
    ----------
    where : where the settings stand, for messages.

    Raises
    ------
    UserError : not a mapping or without a name, an unknown name or parameter, or a divergence that needs more than the
        sampled token.
    """
    example = '{"name": "cppo", "delta": 0.15}'
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise UserError(f"{engine}: {where} is {settings!r}, expected a rule with its parameters, such as {example}.")
    given = dict(settings)
    limit = given.pop("max_on_policy_divergence", TrustRegionLoss.max_on_policy_divergence)
    return TrustRegionLoss(sampled_token_rule(given, engine), engine, limit)


def loss_from_environment(engine: str) -> TrustRegionLoss:
    """The loss that the environment variable ``CPPO_RULE`` describes (see `loss_from_settings`).

    Raises
    ------
    UserError : it is missing, no JSON, or describes no rule.
    """
    text = os.environ.get(RULE_VARIABLE, "")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = text or None
    return loss_from_settings(settings, engine, f"the environment variable {RULE_VARIABLE} of this worker process")


def steady_metrics(stats: Mapping[str, float]) -> dict[str, float]:
    """Only those of `cppo.metrics` that every batch has: engines that add up vectors of metrics need equal keys."""
    return {name: value for name, value in stats.items() if name not in CONDITIONAL}
