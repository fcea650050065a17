"""certificates.jsonl: after every rollout batch, how large the surrogate's error can be (`cppo.theory.certificate`).

Of the responses of the batch's last update, where pi has moved furthest from mu, by updates on other responses: given
pi, these are fresh rollouts of mu. Groups that the zero-spread filter has left out are not among them. Rows are a
function of the training alone. Schema: docs/runs.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from cppo.engines.trl_rewards import BASELINE, GROUP, REWARD
from cppo.theory import Positions, certificate
from cppo.training.files import read_jsonl
from cppo.training.positions import bucket_width, rounded

CERTIFICATES_FILE = "certificates.jsonl"

#: Divergences that are the exact TV or bound it from above (`exact_kl` through Pinsker); others bound it from below.
CERTIFIED = ("exact_tv", "topk_tv_upper", "exact_kl")


class Observed(Protocol):
    """What the recorder keeps of one loss: tensors ``[B, T]``, and of TRL's minibatch what is needed."""

    policy_logp: Tensor
    rollout_logp: Tensor
    mask: Tensor
    divergence: Tensor | None

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...


def certificate_row(calls: Iterable[Observed], divergence: str | None) -> dict[str, Any] | None:
    """The certificate of the responses seen in some losses, or None where there is none: no rewards were seen, no
    response has a loss token, or a number is not finite.

    divergence : its name, None: the rule measures none. A KL is turned into a TV by Pinsker, sqrt(KL / 2).
    """
    parts = [_kept(call) for call in calls if REWARD in call.inputs]
    parts = [part for part in parts if len(part["reward"])]
    if not parts:
        return None
    width = max(part["mask"].shape[1] for part in parts)
    padded = [{name: _wide(values, width) for name, values in part.items()} for part in parts]
    batch = {name: np.concatenate([part[name] for part in padded]) for name in padded[0]}
    mask, R = batch["mask"], batch["reward"]
    D = batch.get("divergence") if divergence is not None else None
    if not np.isfinite(batch["log_ratio"][mask]).all() or (D is not None and not np.isfinite(D[mask]).all()):
        return None
    if D is not None and divergence is not None and divergence.endswith("_kl"):
        D = np.sqrt(np.maximum(D, 0) / 2)
    # The tasks' rewards lie in [0, 1]; a reward function of another range shows it sooner or later.
    xi = (max(1.0, float(R.max())) - min(0.0, float(R.min()))) / 2
    D = None if D is None else np.clip(D, 0, 1)
    found = certificate(D, batch["log_ratio"], mask, R - batch["baseline"], xi=xi, groups=batch["group"])
    figures = {name: rounded(value) if isinstance(value, float) else value for name, value in found.figures().items()}
    head = {"divergence": divergence, "certified": divergence in CERTIFIED, "xi": xi}
    return head | figures | _by_position(found.positions)


def _kept(call: Observed) -> dict[str, Any]:
    """The numbers of the responses that have a loss token and a reward."""
    arrays = {
        "mask": call.mask,
        "log_ratio": call.policy_logp.float() - call.rollout_logp.float(),
        "reward": call.inputs[REWARD],
        "baseline": call.inputs[BASELINE],
        "group": call.inputs[GROUP],
    }
    if call.divergence is not None:
        arrays["divergence"] = call.divergence.float()
    numbers = {name: values.cpu().numpy() for name, values in arrays.items()}
    kept = numbers["mask"].any(1) & np.isfinite(numbers["reward"])
    return {name: values[kept] for name, values in numbers.items()}


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


def read_certificates(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of `folder`/certificates.jsonl, oldest first; [] when there are none."""
    return read_jsonl(Path(folder) / CERTIFICATES_FILE)
