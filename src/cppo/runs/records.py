"""What the rows of a run say: updates in which a rule saw a token, accuracy before and after, the best evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cppo.rules import NoTrustRegion, Reason
from cppo.rules.base import HELD

Row = Mapping[str, Any]


def judged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training rows of updates that had a loss token: those a share of tokens has a meaning for.

    An update whose groups all have equal rewards has none (`advantages.zero_spread_filter`), and its shares are logged
    as 0. In any other each token has one reason, so the shares of the reasons sum to 1 (averaged over micro-batches: to
    more than 0).
    """
    names = [f"trust/{code.key}_fraction" for code in Reason if code != Reason.OUTSIDE]
    return [
        row
        for row in rows
        if row.get("kind") == "train"
        and row.get("trust/masked_fraction") is not None
        and any(row.get(name) for name in names)
    ]


#: A rule that holds back less than this share of the tokens hardly differs from no rule.
HARDLY = 1e-3


@dataclass(frozen=True)
class Acted:
    """On what the rule acted (held a token back): shares of loss tokens and of responses (None: not logged), and
    updates, of those in which it saw a token.
    """

    tokens: float
    responses: float | None
    updates: int
    of: int

    @property
    def warns(self) -> bool:
        """Whether the run hardly differs from one without a trust region."""
        return self.tokens < HARDLY

    def sentence(self) -> str:
        """Whether the rule bound at all, in plain words."""
        if not self.updates:
            return (
                f"The rule never acted: none of {self.of} updates had a token held back, so this run is the one "
                "without a trust region. If it was meant to act, lower its limits (rule.delta=auto finds some), or "
                "make more updates of each rollout batch."
            )
        responses = "" if self.responses is None else f" and on {self.responses:.1%} of the responses"
        share = f"{self.tokens:.2g}" if self.warns else f"{self.tokens:.1%}"
        text = f"The rule held back {share} of the tokens; it acted in {self.updates} of {self.of} updates{responses}."
        return f"{text} So little hardly differs from no trust region." if self.warns else text


def acted(rows: Sequence[Row], rule: str | None) -> Acted | None:
    """On what the rule of a run acted, from its training rows; None where no update had a loss token, or there is no
    trust region. rule : its name, None: not known.
    """
    seen = judged(rows)
    if not seen or rule == NoTrustRegion.name:
        return None
    held = [sum(float(row.get(f"trust/{reason.key}_fraction") or 0) for reason in HELD) for row in seen]
    touched = [row["trust/held_responses_fraction"] for row in seen if "trust/held_responses_fraction" in row]
    return Acted(
        sum(held) / len(held),
        sum(touched) / len(touched) if touched else None,
        sum(share > 0 for share in held),
        len(held),
    )


def before_and_after(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """The first and the last evaluation among those with the most samples per problem; (row, None) if there is one.

    Evaluations along the way often take fewer samples, and Avg@4 is not to be compared with Avg@16.
    """
    evaluations = [row for row in rows if row.get("kind") == "evaluation" and benchmarks([row])]
    if not evaluations:
        return None, None
    most = max(row.get("samples") or 0 for row in evaluations)
    full = [row for row in evaluations if (row.get("samples") or 0) == most]
    chosen = full if len(full) > 1 else evaluations
    return chosen[0], chosen[-1] if len(chosen) > 1 else None


def benchmarks(rows: Sequence[Row]) -> list[str]:
    """Names of the benchmarks evaluated, without "mean"."""
    names = (key.removeprefix("avg/") for row in rows for key in row if key.startswith("avg/"))
    return [name for name in dict.fromkeys(names) if name != "mean"]


def best_evaluation(rows: Sequence[Row]) -> Row | None:
    """The evaluation with the highest "avg/mean" (the first of equals): the best validation score within the budget."""
    scored = [row for row in rows if row.get("kind") == "evaluation" and row.get("avg/mean") is not None]
    return max(scored, key=lambda row: (row["avg/mean"], -int(row["step"])), default=None)
