"""A dump of rollouts: tokens of responses with log mu and log pi, from whatever engine (schema: docs/inspect.md).

`read_dump` takes a .jsonl or .parquet file, a folder of them, or a run folder of `cppo train` (its samples/), checks
every row, and gives a `Dump`: flat arrays over all tokens and the boundaries of the responses. `write_dump`,
`dump_observer` (TRL) and `verl_rows` (verl) make such files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cppo.config.yaml_io import CONFIG_FILE
from cppo.dumps.export import dump_observer, verl_rows, write_dump
from cppo.dumps.read import COLUMNS, SUFFIXES, Builder, mistake, read_rows
from cppo.errors import UserError
from cppo.runs.folder import RunFolder
from cppo.tokens import TokenBatch
from cppo.words import nearest

__all__ = ["Dump", "dump_observer", "read_dump", "verl_rows", "write_dump"]

Array = npt.NDArray[Any]

#: Log-probabilities above this are none (rounding may leave an ulp above 0).
LARGEST_LOGP = 1e-6
#: Columns per response and per token, which `Dump.select` cuts.
_A_RESPONSE = ("reward", "baseline", "group", "step", "update")
_A_TOKEN = (
    "rollout_logp",
    "policy_logp",
    "mask",
    "sampled",
    "advantages",
    "divergence",
    "ids",
    "topk_ids",
    "topk_rollout_logp",
    "topk_policy_logp",
)
_TEXTS = ("tokens", "prompts", "texts")


@dataclass(frozen=True, eq=False)
class Dump:
    """N tokens of S responses, packed. What the dump does not have is None; what the mask leaves out may be NaN.

    Attributes
    ----------
    path : where it was read from. cu_seqlens : boundaries of the responses, int64 ``[S + 1]``.
    rollout_logp, policy_logp : log mu and log pi of the sampled tokens, nats, float32 ``[N]``. mask : loss
        tokens, bool ``[N]``. sampled : tokens that mu sampled, trained on or not, bool ``[N]``.
    advantages : A_t, float32 ``[N]``. divergence, divergence_name : D_t of the dump, float32 ``[N]``, and which it is.
    ids : int64 ``[N]``. topk_ids, topk_rollout_logp, topk_policy_logp : ``[N, K]``; NaN: an unused slot.
    reward, baseline : float64 ``[S]``, NaN where there is none. group : the prompt of each response, int64 ``[S]``.
    step, update : int64 ``[S]``. tokens, prompts, texts : of each response, as text.
    excerpt : the samples of a run, which were chosen by what happened to them. notes : what a user should know.
    """

    path: Path
    cu_seqlens: Array
    rollout_logp: Array
    policy_logp: Array
    mask: Array
    sampled: Array
    advantages: Array | None = None
    divergence: Array | None = None
    divergence_name: str | None = None
    ids: Array | None = None
    topk_ids: Array | None = None
    topk_rollout_logp: Array | None = None
    topk_policy_logp: Array | None = None
    reward: Array | None = None
    baseline: Array | None = None
    group: Array | None = None
    step: Array | None = None
    update: Array | None = None
    tokens: list[list[str]] | None = None
    prompts: list[str | None] | None = None
    texts: list[str | None] | None = None
    excerpt: bool = False
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> Array:
        """Tokens of each response, masked-out ones included: ``[S]``."""
        return np.diff(self.cu_seqlens)

    @property
    def owner(self) -> Array:
        """The response of each token: ``[N]``."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def loss_tokens(self) -> Array:
        """Loss tokens of each response: ``[S]``."""
        return np.bincount(self.owner[self.mask], minlength=len(self.lengths))

    def positions(self) -> Array:
        """t - 1, the loss tokens before each token in its response: ``[N]``."""
        before = np.concatenate([[0], np.cumsum(self.mask)])
        return before[:-1] - before[self.cu_seqlens[self.owner]]

    def select(self, keep: Array) -> Dump:
        """Only the responses with keep, bool ``[S]``."""
        if keep.all():
            return self
        inside = keep[self.owner]
        cut: dict[str, Any] = {"cu_seqlens": np.concatenate([[0], np.cumsum(self.lengths[keep])])}
        for names, chosen in ((_A_RESPONSE, keep), (_A_TOKEN, inside)):
            for name in names:
                values = getattr(self, name)
                cut[name] = None if values is None else values[chosen]
        for name in _TEXTS:
            texts = getattr(self, name)
            cut[name] = None if texts is None else [text for text, kept in zip(texts, keep, strict=True) if kept]
        return replace(self, **cut)

    def blocks(self, most: int = 1 << 18) -> Iterator[Dump]:
        """The same in parts of whole responses with at most `most` tokens (a longer response is a part of its own)."""
        S, start = len(self.lengths), 0
        while start < S:
            stop = int(np.searchsorted(self.cu_seqlens, self.cu_seqlens[start] + most, side="right")) - 1
            stop = min(max(stop, start + 1), S)
            low, high = self.cu_seqlens[start], self.cu_seqlens[stop]
            cut: dict[str, Any] = {"cu_seqlens": self.cu_seqlens[start : stop + 1] - low}
            for names, span in ((_A_RESPONSE, slice(start, stop)), (_A_TOKEN, slice(low, high))):
                for name in names:
                    values = getattr(self, name)
                    cut[name] = None if values is None else values[span]
            for name in _TEXTS:
                texts = getattr(self, name)
                cut[name] = None if texts is None else texts[start:stop]
            yield replace(self, **cut)
            start = stop

    def packed(self, divergence: Array | None = None) -> TokenBatch:
        """A packed `TokenBatch` of all responses, on the CPU, that carries `divergence` (``[N]``) or none.

        Raises
        ------
        UserError : the dump has no advantages.
        """
        return TokenBatch(
            torch.from_numpy(self.policy_logp),
            torch.from_numpy(self.rollout_logp),
            torch.from_numpy(self._advantages()),
            torch.from_numpy(self.mask),
            torch.from_numpy(self.cu_seqlens),
            None if divergence is None else torch.from_numpy(divergence),
        )

    def padded(self, divergence: Array | None = None) -> TokenBatch:
        """The same as rows ``[S, longest]``, padded to the right with zeros."""
        scored = None if divergence is None else torch.from_numpy(self.rows(divergence))
        columns = (self.policy_logp, self.rollout_logp, self._advantages(), self.mask)
        policy, rollout, advantages, mask = (torch.from_numpy(self.rows(values)) for values in columns)
        return TokenBatch(policy, rollout, advantages, mask, divergence=scored)

    def rows(self, values: Array) -> Array:
        """``[N]`` as ``[S, longest]``, zeros to the right."""
        lengths = self.lengths
        out = np.zeros((len(lengths), int(lengths.max(initial=0))), dtype=values.dtype)
        out[np.arange(out.shape[1]) < lengths[:, None]] = values
        return out

    def _advantages(self) -> Array:
        if self.advantages is None:
            raise UserError(
                f"{self.path} has no advantages: give the column advantage (a number per response) or advantages "
                "(a number per token), or reward and group."
            )
        return self.advantages


def read_dump(path: str | Path) -> Dump:
    """Read and check a dump: a .jsonl or .parquet file, a folder of them, or a run folder.

    Without advantages, but with rewards and groups, A is the reward less the mean of its group (and a note says so).

    Raises
    ------
    UserError : a sentence that names file, row and column: nothing there, an unknown type, a missing column, lists of
        unequal lengths, log-probabilities that are positive, NaN or infinite at a loss token, and so on.
    """
    root, notes = Path(path), list[str]()
    builder = Builder(notes.append)
    for file in _files(root):
        for number, row in read_rows(file, notes.append):
            builder.add(file, number, row)
    if not builder.places:
        raise UserError(f"{root} is empty: it holds no response.{' It says: ' + notes[0] if notes else ''}")
    dump = Dump(root, **builder.columns(), excerpt={"reason", "coefficient"} <= set(builder.unknown))
    _check(dump, builder)
    dump, more = _complete(dump)
    return replace(dump, notes=(*notes, *_strange_names(builder.unknown), *more))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    is_run = RunFolder(path).exists
    folder = RunFolder(path).samples_folder if is_run else path
    found = sorted(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))
    if found:
        return found
    if is_run:
        raise UserError(f"the run {path} has no samples in {folder}: train with samples.every=10.")
    raise UserError(f"the folder {path} holds neither .jsonl or .parquet files nor a run ({CONFIG_FILE}).")


def _strange_names(unknown: Counter[str]) -> list[str]:
    """Notes on columns that look like misspelt ones."""
    notes = []
    for name in unknown:
        hint = nearest(name, COLUMNS, cutoff=0.8)
        if hint and name not in RECORDED:
            notes.append(f"the column {name!r} is not read.{hint}")
    return notes


#: What the recorder writes beside the schema (docs/runs.md).
RECORDED = ("row", "delta_b", "budget_used", "reason", "coefficient", "threshold", "ratio", "log_ratio")


# --------------------------------------------------------------------------------------------------------------- values


def _check(dump: Dump, builder: Builder) -> None:
    """Values under the mask. What is wrong is named with its first place."""
    inside = dump.mask
    if not inside.any():
        raise UserError(f"{dump.path} has no loss token: the mask is 0 everywhere.")

    def refuse(name: str, bad: Array, values: Array, text: str) -> None:
        bad = bad & inside
        if not bad.any():
            return
        at = int(bad.argmax())
        row = int(np.searchsorted(dump.cu_seqlens, at, side="right")) - 1
        count = f"{int(bad.sum())} of {int(inside.sum())} loss tokens"
        where = f"first at token {at - int(dump.cu_seqlens[row]) + 1}: {values[at]:.6g}"
        raise mistake(*builder.places[row], name, f"{text} ({count}, {where}).")

    missing = "null, NaN or infinite at a loss token; set mask to 0 where a number is missing"
    for name in ("rollout_logp", "policy_logp"):
        values = getattr(dump, name)
        refuse(name, ~np.isfinite(values), values, missing)
        refuse(name, values > LARGEST_LOGP, values, "positive; expected log-probabilities, not probabilities or logits")
    if dump.advantages is not None:
        name = builder.advantage_column
        refuse(name, ~np.isfinite(dump.advantages), dump.advantages, missing)
    D = dump.divergence
    if D is not None:
        refuse("divergence", ~np.isfinite(D), D, missing)
        refuse("divergence", D < 0, D, "negative; a divergence is never")
        if (dump.divergence_name or "").endswith(("_tv", "_tv_upper")):
            refuse("divergence", D > 1.001, D, "above 1; a total variation is never")
    if dump.topk_rollout_logp is not None and dump.topk_policy_logp is not None:
        mu, pi = dump.topk_rollout_logp, dump.topk_policy_logp
        used: Array = np.isfinite(mu)
        refuse("topk_rollout_logp", used.sum(1) == 0, np.where(used, mu, np.nan).max(1), "without any number")
        for name, values in (("topk_rollout_logp", mu), ("topk_policy_logp", pi)):
            largest = np.where(used, values, -np.inf).max(1)
            refuse(name, np.isnan(largest), largest, "null or NaN where mu's is a number")
            refuse(name, largest > LARGEST_LOGP, largest, "positive; expected log-probabilities")
            mass = np.exp(np.where(used, values, -np.inf)).sum(1)
            refuse(name, mass > 1.001, mass, "probabilities that sum to more than 1; is an id in there twice?")


def _complete(dump: Dump) -> tuple[Dump, list[str]]:
    """Names and advantages that follow from something else, with the notes that say so."""
    notes = []
    if dump.excerpt:
        notes.append(
            "these are samples of a run: first responses in which a token was held back, then others. Shares are not "
            "those of the whole batch (metrics.jsonl has them)."
        )
        runs = [folder for folder in (dump.path, dump.path.parent.parent) if RunFolder(folder).exists]
        if dump.divergence is not None and dump.divergence_name is None and runs:
            rows = RunFolder(runs[0]).certificates()
            dump = replace(dump, divergence_name=rows[-1]["divergence"] if rows else None)
    if dump.advantages is None and dump.reward is not None and dump.group is not None:
        known = np.isfinite(dump.reward)
        if known.all():
            size = np.bincount(dump.group)
            mean = np.bincount(dump.group, dump.reward) / np.maximum(size, 1)
            A = (dump.reward - mean[dump.group]).astype(np.float32)
            dump = replace(dump, advantages=A[dump.owner])
            notes.append("there are no advantages: A is the reward less the mean of its group.")
    return dump, notes
