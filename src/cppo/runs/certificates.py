"""certificates.jsonl: after every rollout batch, how large the surrogate's error can be (`cppo.theory.certificate`).

Of the responses of the batch's last update, where pi has moved furthest from mu, by updates on other responses: given
pi, these are fresh rollouts of mu. L' and the bound from ratios are over all of them, also those that the zero-spread
filter took out of the loss: groups that were selected by their rewards would give too large a gain. D_t is measured for
loss tokens only, so the bounds from divergences are over the other responses. Rows are a function of the training
alone. Schema: docs/runs.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cppo.files import rounded
from cppo.runs.positions import bucket_width
from cppo.theory import Certificate, Positions, certificate

#: Divergences that are the exact TV or bound it from above (`exact_kl` through Pinsker); others bound it from below.
CERTIFIED = ("exact_tv", "topk_tv_upper", "exact_kl")


@dataclass(frozen=True, eq=False)
class Responses:
    """What a certificate is made from: N responses, arrays ``[N, T]`` padded to the right, and ``[N]``.

    log_ratio : log pi - log mu. tokens : sampled by mu. mask : loss tokens. divergence : D_t of these; None: not
    measured. reward, baseline : NaN: no reward. group : which share a prompt.
    """

    log_ratio: NDArray[Any]
    tokens: NDArray[Any]
    mask: NDArray[Any]
    divergence: NDArray[Any] | None
    reward: NDArray[Any]
    baseline: NDArray[Any]
    group: NDArray[Any]


def certificate_row(seen: Iterable[Responses], divergence: str | None) -> dict[str, Any] | None:
    """The certificate of the responses seen in some losses, or None where there is none: no rewards were seen, no
    response has a token, or a number is not finite.

    divergence : its name, None: the rule measures none. A KL is turned into a TV by Pinsker, sqrt(KL / 2).
    """
    parts = [_kept(responses) for responses in seen]
    parts = [part for part in parts if len(part["reward"])]
    if not parts:
        return None
    width = max(part["tokens"].shape[1] for part in parts)
    padded = [{name: _wide(values, width) for name, values in part.items()} for part in parts]
    batch = {name: np.concatenate([part[name] for part in padded]) for name in padded[0]}
    if not np.isfinite(batch["log_ratio"][batch["tokens"]]).all():
        return None
    # The tasks' rewards lie in [0, 1]; a reward function of another range shows it sooner or later.
    xi = (max(1.0, float(batch["reward"].max())) - min(0.0, float(batch["reward"].min()))) / 2

    def certified(rows: Any, tokens: Any, D: Any) -> Certificate:
        R = (batch["reward"] - batch["baseline"])[rows]
        return certificate(D, batch["log_ratio"][rows], tokens[rows], R, xi=xi, groups=batch["group"][rows])

    whole = certified(slice(None), batch["tokens"], None)
    figures, positions = whole.figures(), None
    scored = batch["mask"].any(1)
    if divergence is not None and "divergence" in batch and scored.any():
        D = batch["divergence"][scored]
        if not np.isfinite(D[batch["mask"][scored]]).all():
            return None
        D = np.sqrt(np.maximum(D, 0) / 2) if divergence.endswith("_kl") else D
        found = certified(scored, batch["mask"], np.clip(D, 0, 1))
        figures |= {name: x for name, x in found.figures().items() if name.startswith(("pathwise", "product", "prop4"))}
        figures["scored_responses"], positions = found.responses, found.positions
    figures = {name: rounded(value) if isinstance(value, float) else value for name, value in figures.items()}
    head = {"divergence": divergence, "certified": divergence in CERTIFIED, "xi": xi}
    return head | figures | _by_position(positions)


def _kept(seen: Responses) -> dict[str, Any]:
    """The arrays of the responses that have a token and a reward."""
    kept = seen.tokens.any(1) & np.isfinite(seen.reward)
    arrays = {field.name: getattr(seen, field.name) for field in fields(seen)}
    return {name: values[kept] for name, values in arrays.items() if values is not None}


def _wide(values: Any, width: int) -> Any:
    """``[N, T]`` -> ``[N, width]``, zeros to the right; ``[N]`` as it is."""
    return values if values.ndim == 1 else np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _by_position(found: Positions | None) -> dict[str, Any]:
    """u_t with its interval and l_t in at most 128 buckets of positions: means, and the largest."""
    if found is None:
        return {}
    longest = len(found.expected)
    width = bucket_width(longest)
    starts = range(0, longest, width)

    def reduced(values: Any, how: Any) -> list[float | None]:
        return [rounded(float(how(values[at : at + width]))) for at in starts]

    return {
        "width": width,
        "expected": reduced(found.expected, np.mean),
        "expected_low": reduced(found.expected_low, np.mean),
        "expected_high": reduced(found.expected_high, np.mean),
        "largest": reduced(found.largest, np.max),
    }
