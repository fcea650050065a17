"""Writing dumps: rows to a file, an observer for TRL, rows from verl's batches (docs/inspect.md has the five lines)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cppo import files
from cppo.dumps.read import SUFFIXES
from cppo.engines.support import BASELINE, GROUP, REWARD, TOKENS
from cppo.errors import UserError
from cppo.rules.base import TrustRegion, Verdict
from cppo.tokens import TokenBatch

Row = dict[str, Any]
Observer = Callable[[TokenBatch, Verdict, Mapping[str, Any], int], None]


def write_dump(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows (one response each; docs/inspect.md) to a .jsonl or .parquet file, whole or not at all.

    Values may be lists, numpy arrays or tensors; in JSONL NaN and infinity become null.

    Raises
    ------
    UserError : no rows, another suffix, parquet without pyarrow. files.DiskFullError.
    """
    path = Path(path)
    _check_suffix(path, tuple(SUFFIXES))
    given = list(rows)
    if not given:
        raise UserError(f"there are no rows to write to {path}.")
    if path.suffix == ".jsonl":
        return files.atomic_write_text(path, "".join(_line(row) for row in given))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: writing parquet needs pyarrow: pip install pyarrow, or name it .jsonl.") from error
    names = dict.fromkeys(name for row in given for name in row)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([_listed(row.get(name)) for row in given])
        except (pa.ArrowException, TypeError) as error:
            raise UserError(f"the column {name} cannot be written to {path}: {error}") from error
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return files.atomic_write_bytes(path, data.getvalue())


def _listed(value: Any) -> Any:
    """Arrays and tensors as lists."""
    value = _array(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _check_suffix(path: Path, allowed: Sequence[str]) -> None:
    if path.suffix not in allowed:
        raise UserError(f"{path} has the suffix {path.suffix!r}, expected {' or '.join(allowed)}.")


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _plain(value: Any) -> Any:
    """The same for JSON: nine digits give every float32 back; all of a float64 would take twice the room."""
    value = _array(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype == np.float32:
        short = [float(f"{x:.9g}") for x in value.ravel().tolist()]
        return np.array(short).reshape(value.shape).tolist()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _line(row: Mapping[str, Any]) -> str:
    plain = {name: _plain(value) for name, value in row.items()}
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, TypeError):  # NaN and infinity, or other types: slower
        return files.dumps(plain) + "\n"


# ------------------------------------------------------------------------------------------------------------------ TRL


def dump_observer(
    path: str | Path, rule: TrustRegion, tokenizer: Any = None, update: int | None = None
) -> DumpObserver:
    """An observer for `TrustRegionTrainer(observer=...)` that appends every response it sees to a .jsonl dump.

    An existing file is appended to (a run that goes on); give a new run a new file. Of several processes each sees its
    own responses: give every process a file of its own, in one folder.

    rule : the trainer's; its divergence names D_t. tokenizer : to write prompts and tokens as text, too. update : only
    this update of every rollout batch, from 0 (M - 1: the last, where pi has moved furthest); None: all of them.

    Raises
    ------
    UserError : the path is not a .jsonl (a parquet file cannot be appended to).
    """
    return DumpObserver(Path(path), rule.divergence, tokenizer, update)


class DumpObserver:
    """See `dump_observer`. `step` counts the rollout batches from 1; with a single update a batch nothing tells where
    the next one begins, so set it yourself (in a callback) if you need it there.
    """

    def __init__(self, path: Path, divergence: str | None, tokenizer: Any, update: int | None) -> None:
        _check_suffix(path, (".jsonl",))
        self.path, self.divergence, self.tokenizer, self.update = path, divergence, tokenizer, update
        self.step, self._last = 1, 0

    def __call__(self, batch: TokenBatch, verdict: Verdict, inputs: Mapping[str, Any], update: int) -> None:
        """Append the responses of one loss (padded ``[B, T]``)."""
        self.step += update < self._last
        self._last = update
        if self.update is None or update == self.update:
            files.append_jsonl(self.path, *self._rows(batch, verdict, inputs, update))

    def _rows(self, batch: TokenBatch, verdict: Verdict, inputs: Mapping[str, Any], update: int) -> Iterable[Row]:
        mask = batch.loss_mask.cpu()
        sampled = inputs[TOKENS].cpu() if inputs.get(TOKENS) is not None else mask
        shown = sampled | inputs["completion_mask"].bool().cpu() if "completion_mask" in inputs else sampled
        numbers = {
            name: values.detach().float().cpu().masked_fill(~sampled, torch.nan)
            for name, values in (("policy_logp", batch.policy_logp), ("rollout_logp", batch.rollout_logp))
        }
        numbers["advantages"] = batch.token_advantages().expand(mask.shape).float().cpu().masked_fill(~mask, torch.nan)
        if verdict.divergence is not None:
            numbers["divergence"] = verdict.divergence.float().cpu().masked_fill(~mask, torch.nan)
        for at in range(mask.shape[0]):
            T = int(shown[at].nonzero().max()) + 1 if bool(shown[at].any()) else 0
            row: Row = {"step": self.step, "update": update}
            for name, key in (("group", GROUP), ("reward", REWARD), ("baseline", BASELINE)):
                if inputs.get(key) is not None:
                    row[name] = inputs[key][at].item()
            if "completion_ids" in inputs:
                row["ids"] = inputs["completion_ids"][at, :T].tolist()
            if self.tokenizer is not None:
                row |= self._texts(inputs, at, row.get("ids", []))
            row["mask"], row["sampled"] = mask[at, :T].int().tolist(), sampled[at, :T].int().tolist()
            if self.divergence is not None and "divergence" in numbers:
                row["divergence_name"] = self.divergence
            yield row | {name: _plain(values[at, :T]) for name, values in numbers.items()}

    def _texts(self, inputs: Mapping[str, Any], at: int, ids: list[int]) -> Row:
        decode = self.tokenizer.decode
        texts: Row = {"response": decode(ids), "tokens": [decode([token]) for token in ids]}
        if "prompt_ids" in inputs:
            prompt = inputs["prompt_ids"][at]
            kept = inputs.get("prompt_mask")
            texts["prompt"] = decode((prompt if kept is None else prompt[kept[at].bool()]).tolist())
        return texts


# ----------------------------------------------------------------------------------------------------------------- verl


def verl_rows(batch: Any, policy_logp: Any = None, step: int | None = None, update: int | None = None) -> list[Row]:
    """Rows of a dump from verl's batch: a `DataProto`, a TensorDict or a dictionary, padded ``[B, T]`` or nested.

    Reads ``rollout_log_probs``, ``response_mask``, and where they are there ``responses``, ``advantages``,
    ``token_level_rewards`` (else ``token_level_scores`` or ``rm_scores``; their sum is the reward) and ``uid``.

    policy_logp : log pi of the response tokens, such as verl's ``log_prob`` in a policy loss; default:
    ``old_log_probs``, which are pi's only where the trainer recomputes them, before its first update.
    step, update : written into each row.

    Raises
    ------
    UserError : a key is missing, or ``old_log_probs`` are the sampler's own (bypass mode), and pi is not given.
    """
    data = _verl_columns(batch)
    for name in ("rollout_log_probs", "response_mask"):
        if name not in data:
            where = " Set actor_rollout_ref.rollout.calculate_log_probs=True." if name.startswith("rollout") else ""
            raise UserError(f"the batch holds no {name}; it has {', '.join(sorted(data))}.{where}")
    mu, masks = _verl_rows(data["rollout_log_probs"]), _verl_rows(data["response_mask"])
    if policy_logp is None:
        if "old_log_probs" not in data:
            raise UserError("the batch holds no old_log_probs: give log pi of the response tokens as policy_logp.")
        pi = _verl_rows(data["old_log_probs"])
        if all(np.array_equal(p[m != 0], r[m != 0]) for p, r, m in zip(pi, mu, masks, strict=True)):
            raise UserError(
                "old_log_probs are the sampler's own (bypass mode): "
                "give log pi as policy_logp, such as log_prob in a policy loss."
            )
    else:
        pi = _verl_rows(policy_logp)
    columns = {"rollout_logp": mu, "policy_logp": pi}
    for key, name in (("responses", "ids"), ("advantages", "advantages")):
        if key in data:
            columns[name] = _verl_rows(data[key])
    scores = next((name for name in ("token_level_rewards", "token_level_scores", "rm_scores") if name in data), None)
    rewards = None if scores is None else [float(row.sum()) for row in _verl_rows(data[scores])]
    rows = []
    for at, mask in enumerate(masks):
        T = int(mask.nonzero()[0].max()) + 1 if mask.any() else 0
        row: Row = {"step": step} if step is not None else {}
        if update is not None:
            row["update"] = update
        if "uid" in data:
            row["group"] = str(data["uid"][at])
        if rewards is not None:
            row["reward"] = rewards[at]
        for name, values in columns.items():
            if len(values[at]) < T:
                raise UserError(f"{name} has {len(values[at])} entries in response {at + 1}, response_mask needs {T}.")
        row["mask"] = (mask[:T] != 0).astype(int).tolist()
        rows.append(row | {name: _plain(values[at][:T]) for name, values in columns.items()})
    return rows


def _verl_columns(batch: Any) -> dict[str, Any]:
    """Tensors and the rest of a DataProto, or a mapping's items."""
    if hasattr(batch, "non_tensor_batch"):
        return {**dict(batch.batch.items()), **batch.non_tensor_batch}
    return dict(batch.items())


def _verl_rows(values: Any) -> list[Any]:
    """Each response's numbers: padded rows as they are, nested ones without padding."""
    parts = values.unbind() if isinstance(values, Tensor) and values.is_nested else values
    return [_numpy(part) for part in parts]


def _numpy(values: Any) -> Any:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()
