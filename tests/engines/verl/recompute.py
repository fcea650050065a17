"""A recorded update of verl, computed again from its tokens, its advantages and the weights of the two policies.

Independent of what is tested: ordinary forwards of transformers, one response at a time, with the whole distribution;
divergences and rules by the sequential loops in float64 of `tests/core/reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainer_runs import Update
from transformers import AutoModelForCausalLM

import cppo
from core import reference

#: A response whose verdict hangs on less than this (in units of ratios and divergences) may fall either way: where the
#: numbers are the same and the rule is computed in float32, and where the numbers come from two forwards in float32.
TIE, FORWARD_TIE = 1e-6, 1e-4


@dataclass
class Response:
    """One response: lists over its columns. `expected` is the reference's verdict."""

    mask: list[bool]
    advantage: list[float]
    policy_logp: list[float]
    rollout_logp: list[float]
    divergence: list[float] | None
    expected: reference.Result


def distributions(folder: Path, weights: Mapping[str, Tensor], update: Update) -> list[Tensor]:
    """log softmax at every response token of every sequence, ``[T, V]`` float64, by one forward a sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=True)
    found = []
    with torch.no_grad():
        for ids, response in zip(update.rows("data.input_ids"), update.rows("data.responses"), strict=True):
            logits = model(input_ids=ids[None]).logits[0, -len(response) - 1 : -1]
            found.append(torch.log_softmax(logits.double(), -1))
    return found


def recompute(
    update: Update, mu: list[Tensor], pi: list[Tensor], rule: str, parameters: Mapping[str, Any], top_k: int = 20
) -> list[Response]:
    """Every response and the rule's verdict on it, all from the float64 distributions."""
    kind = cppo.make_rule(rule, **parameters).divergence
    responses = []
    columns = zip(
        mu,
        pi,
        update.rows("data.responses"),
        update.rows("data.response_mask"),
        update.rows("data.advantages"),
        strict=True,
    )
    for mu_row, pi_row, tokens, mask, advantages in columns:
        index = tokens[:, None]
        policy, rollout = (row.gather(-1, index)[:, 0].tolist() for row in (pi_row, mu_row))
        drift = None
        if kind is not None:
            pairs = zip(mu_row.exp().tolist(), pi_row.exp().tolist(), tokens.tolist(), strict=True)
            drift = [reference.divergence(kind, m, p, token, k=top_k) for m, p, token in pairs]
        inside, advantage = [bool(x) for x in mask], advantages.tolist()
        responses.append(judge(rule, parameters, inside, advantage, policy, rollout, drift))
    return responses


def judge(
    rule: str,
    parameters: Mapping[str, Any],
    mask: list[bool],
    advantage: list[float],
    policy: list[float],
    rollout: list[float],
    drift: list[float] | None,
) -> Response:
    """A response with the verdict of the reference on these numbers."""
    given = {name: value for name, value in parameters.items() if name != "divergence"}
    expected = reference.rule(rule, policy, rollout, advantage, mask, divergence=drift, **given)
    return Response(mask, advantage, policy, rollout, drift, expected)


def binary(kind: str, response: Response, policy: list[float], rollout: list[float]) -> list[float]:
    """The binary divergence of the loss tokens, from the log-probabilities alone."""
    chances = [
        (math.exp(m), math.exp(p)) if y else (1.0, 1.0) for m, p, y in zip(rollout, policy, response.mask, strict=True)
    ]
    return [reference.divergence(kind, [m, 1 - m], [p, 1 - p], 0) for m, p in chances]


def assert_recomputed(
    update: Update,
    mu: list[Tensor],
    pi: list[Tensor],
    rule: str,
    parameters: Mapping[str, Any],
    tolerance: float = 2e-5,
) -> list[Response]:
    """Log-probabilities, divergence, gradient, loss and metrics of `update` are those of the reference.

    Log-probabilities and divergences are compared with recomputed ones. The verdict is then the reference's on the
    numbers that verl had: where a comparison is close, a forward's rounding would decide it.

    The gradient of verl's token mean with respect to log pi(y_t) is -c_t A_t / N, N being all loss tokens of the
    mini-batch, whatever its micro-batches; it is zero at prompts, tool tokens and dropped tokens. Responses in which a
    comparison is a `TIE` are left out of the comparison of coefficients.
    """
    kind = cppo.make_rule(rule, **parameters).divergence
    gradient, logp = update.responses("grad.log_probs"), update.responses("out.log_probs")
    drift = update.responses("out.cppo_divergence") if "out.cppo_divergence" in update.tensors else None
    old = update.rows("data.old_log_probs")
    responses = []
    loss = ties = 0.0
    for row, known in enumerate(recompute(update, mu, pi, rule, parameters)):
        inside = torch.tensor(known.mask)
        close(logp[row][inside], torch.tensor(known.policy_logp)[inside], tolerance, "log pi")
        close(old[row][inside], torch.tensor(known.rollout_logp)[inside], tolerance, "log mu")
        policy, rollout, given = logp[row].tolist(), old[row].tolist(), None
        if drift is not None:
            given = drift[row].tolist()
            close(drift[row][inside], torch.tensor(known.divergence)[inside], tolerance, "divergence")
        elif kind is not None:
            given = binary(kind, known, policy, rollout)
        response = judge(rule, parameters, known.mask, known.advantage, policy, rollout, given)
        responses.append(response)
        wanted = torch.tensor(
            [-c * a / update.tokens for c, a in zip(response.expected.coefficient, response.advantage, strict=True)]
        )
        loss += float((wanted * torch.tensor(response.policy_logp)).sum())
        if response.expected.margin < TIE:
            ties += 1
            loss = math.nan
        else:
            close(gradient[row], wanted, tolerance, "gradient")
    assert ties <= len(responses) / 2, f"{ties} of {len(responses)} responses are undecided: the test shows nothing"
    assert_outside_is_zero(update)
    if not math.isnan(loss):
        assert update.loss == approximately(loss), f"loss {update.loss}, expected {loss}"
        assert_metrics(update, responses, drift is not None)
    return responses


def assert_outside_is_zero(update: Update) -> None:
    """No gradient reaches positions that predict a prompt's or a padding's token."""
    responses = torch.cat(update.responses("grad.log_probs"))
    assert update.tensors["grad.log_probs"].count_nonzero() == responses.count_nonzero()


def assert_metrics(update: Update, responses: list[Response], divergence: bool) -> None:
    """``actor/trust/...`` of an update of one micro-batch."""
    inside = [(r, t) for r in responses for t in range(len(r.mask)) if r.mask[t]]
    count = len(inside)
    expected = {
        "masked_fraction": sum(r.expected.coefficient[t] == 0 for r, t in inside) / count,
        "ratio_mean": sum(math.exp(r.policy_logp[t] - r.rollout_logp[t]) for r, t in inside) / count,
        "ratio_max": max(math.exp(r.policy_logp[t] - r.rollout_logp[t]) for r, t in inside),
    }
    for code in ("KEPT", "TOWARDS", "TOKEN_LIMIT", "PREFIX_BUDGET", "SEQUENCE_LIMIT", "RATIO_CLIP", "CLAMPED"):
        number = getattr(reference, code)
        expected[f"{code.lower()}_fraction"] = sum(r.expected.reason[t] == number for r, t in inside) / count
    if divergence:
        drifts = [r.divergence[t] for r, t in inside if r.divergence is not None]
        expected |= {"divergence_mean": sum(drifts) / count, "divergence_max": max(drifts)}
    for name, value in expected.items():
        (found,) = update.metrics[f"actor/trust/{name}"]
        assert found == approximately(value), f"actor/trust/{name} is {found}, expected {value}"


def approximately(value: float) -> Any:
    import pytest

    return pytest.approx(value, rel=1e-4, abs=5e-5)


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Both finite, and no further apart than `tolerance`."""
    difference = (found.double() - expected.double()).abs()
    assert bool((difference <= tolerance).all()), f"{what}: off by {difference.max():.3g}"
