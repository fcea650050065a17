"""Which divergence of a dump is used for what, and its certificate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cppo import divergence
from cppo.dumps.dump import Array, Dump
from cppo.rules import TrustRegion
from cppo.runs.certificates import CERTIFIED, Responses, certificate_row

#: Numbers in a padded array of the certificate at most: it takes about a hundred bytes each.
LARGEST_CERTIFICATE = 6_000_000


def family(name: str | None) -> str:
    """ "kl" or "tv" of the name of a divergence; what has no name counts as a TV."""
    return "kl" if name is not None and name.endswith("_kl") else "tv"


@dataclass(frozen=True, eq=False)
class Scores:
    """The divergences of a dump, computed when asked for; 0 outside the mask."""

    dump: Dump
    _found: dict[str, Array] = field(default_factory=dict)

    def main(self) -> tuple[str, Array]:
        """(name, D_t ``[N]``): the dump's own, else top-K TV, else binary TV."""
        own = self.dump.divergence_name
        return self.of(family(own) if self.dump.divergence is not None else "tv")

    def of(self, kind: str) -> tuple[str, Array]:
        """The same for a TV or a KL: the dump's own only where it is one."""
        dump = self.dump
        if dump.divergence is not None and family(dump.divergence_name) == kind:
            return dump.divergence_name or "divergence of the dump", np.where(dump.mask, dump.divergence, np.float32(0))
        return self.computed(f"topk_{kind}" if dump.topk_ids is not None else f"binary_{kind}")

    def asked_for(self, rule: TrustRegion) -> tuple[str | None, Array | None]:
        """What a rule is given; (None, None) where it needs none."""
        return (None, None) if rule.divergence is None else self.of(family(rule.divergence))

    def computed(self, name: str) -> tuple[str, Array]:
        """A divergence of `cppo.divergence` from the log-probabilities: binary_* or topk_*."""
        if name not in self._found:
            parts = [_block(block, name) for block in self.dump.blocks(1 << 17)]
            self._found[name] = np.concatenate(parts)
        return name, self._found[name]


def _block(dump: Dump, name: str) -> Array:
    def clean(values: Array) -> Any:
        mask = dump.mask if values.ndim == 1 else dump.mask[:, None]
        return torch.from_numpy(np.where(mask, values, np.float32(0 if values.ndim == 1 else -np.inf)))

    pi, mu = clean(dump.policy_logp), clean(dump.rollout_logp)
    compute = getattr(divergence, name)
    if name.startswith("binary"):
        found = compute(pi, mu)
    else:
        ids, top, top_pi, top_mu = dump.ids, dump.topk_ids, dump.topk_policy_logp, dump.topk_rollout_logp
        assert ids is not None and top is not None and top_pi is not None and top_mu is not None
        used = np.isfinite(top_mu)
        inside = torch.from_numpy(((top == ids[:, None]) & used).any(1))
        # an unused slot is a class without mass, of both
        found = compute(clean(np.where(used, top_pi, -np.inf)), clean(np.where(used, top_mu, -np.inf)), pi, mu, inside)
    return np.where(dump.mask, found.numpy(), np.float32(0))


def certificate_of(dump: Dump, notes: list[str]) -> dict[str, Any] | None:
    """The row of `cppo.runs.certificates` for the responses of the dump's last step and update, with "of" (which
    responses) and "unit" ("reward", or "advantage" where there are no rewards); None and a note where it cannot be.
    """
    if dump.excerpt:
        notes.append("no certificate: these responses were chosen. `cppo bound --run RUN` has that of all of them.")
        return None
    dump, of = _last(dump)
    found = _rewards(dump)
    if found is None:
        notes.append("no certificate: it needs rewards, or one advantage per response, and the prompt of each (group).")
        return None
    R, baseline, unit = found
    keep = np.isfinite(R) & (np.bincount(dump.owner[dump.sampled], minlength=len(R)) > 0)
    kept = _fitting(dump, keep)
    if kept.sum() < keep.sum():
        notes.append(
            f"the certificate is of {int(kept.sum())} of {int(keep.sum())} responses, so that it fits the memory."
        )
    dump, R, baseline = dump.select(kept), R[kept], baseline[kept]
    if not len(R):
        notes.append("no certificate: no response has a reward.")
        return None
    name, D = _certified(dump)
    seen = Responses(
        log_ratio=dump.rows(dump.policy_logp).astype(np.float32) - dump.rows(dump.rollout_logp).astype(np.float32),
        tokens=dump.rows(dump.sampled),
        mask=dump.rows(dump.mask),
        divergence=dump.rows(D).astype(np.float32),
        reward=R,
        baseline=baseline,
        group=dump.group if dump.group is not None else np.arange(len(R)),
    )
    row = certificate_row([seen], name)
    if row is None:
        notes.append("no certificate: a log-probability of a sampled token is not finite.")
        return None
    return {"of": of, "unit": unit} | row


def _last(dump: Dump) -> tuple[Dump, str]:
    """pi and mu are one pair of policies only at one update of one step."""
    words = []
    for name in ("step", "update"):
        values = getattr(dump, name)
        if values is not None:
            words.append(f"{name} {int(values.max())}")
            dump = dump.select(values == values.max())
    return dump, ", ".join(words) or "all responses"


def _rewards(dump: Dump) -> tuple[Array, Array, str] | None:
    """(R, the dump's baseline or the mean of the others in the group, unit), ``[S]``."""
    if dump.reward is not None:
        R = dump.reward
        if dump.baseline is not None:
            return R, np.nan_to_num(dump.baseline), "reward"
        if dump.group is None:
            return R, np.zeros_like(R), "reward"
        known = np.isfinite(R)
        total = np.bincount(dump.group, np.where(known, R, 0))[dump.group]
        count = np.bincount(dump.group, known)[dump.group]
        return R, (total - np.where(known, R, 0)) / np.maximum(count - 1, 1), "reward"
    if dump.advantages is None or dump.group is None:
        return None
    inside, owner = dump.mask, dump.owner
    A, of = dump.advantages[inside].astype(np.float64), owner[inside]
    first = np.full(len(dump.lengths), np.nan)
    first[of[::-1]] = A[::-1]
    return (first, np.zeros_like(first), "advantage") if (first[of] == A).all() else None


def _fitting(dump: Dump, keep: Array) -> Array:
    """As many whole groups, from the first, as fit into `LARGEST_CERTIFICATE` numbers."""
    most = max(1, LARGEST_CERTIFICATE // max(1, int(dump.lengths.max(initial=1))))
    if keep.sum() <= most:
        return keep
    group = dump.group if dump.group is not None else np.arange(len(keep))
    order = np.unique(group[keep], return_counts=True)
    fits = order[0][np.cumsum(order[1]) <= most]
    return keep & np.isin(group, fits if len(fits) else order[0][:1])


def _certified(dump: Dump) -> tuple[str, Array]:
    """The dump's own divergence where it bounds the exact TV; else the top K's upper bound; else the main one."""
    if dump.divergence is not None and dump.divergence_name in CERTIFIED:
        return dump.divergence_name, np.where(dump.mask, dump.divergence, np.float32(0))
    return Scores(dump).computed("topk_tv_upper") if dump.topk_ids is not None else Scores(dump).main()
