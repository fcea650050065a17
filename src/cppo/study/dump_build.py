"""The rows of a dump, collected into flat arrays; lengths and the presence of columns are checked row by row."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cppo.errors import UserError
from cppo.rules.base import nearest
from cppo.study.dump_rows import COLUMNS, NUMBERS, TOP_K, Row, mistake

#: Columns that all rows must have, or none.
_ALL_OR_NONE = ("divergence", "ids", *TOP_K, "tokens", "step", "update")


class Builder:
    """`add` a row after the other, then `columns`.

    Attributes: places (file, line or row) of each response; unknown: columns that are not in the schema.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.places: list[tuple[Path, int]] = []
        self.unknown: Counter[str] = Counter()
        self.advantage_column = "advantage"
        self._note = note
        self._parts: dict[str, list[Any]] = {name: [] for name in ("length", *COLUMNS)}
        self._have: Counter[str] = Counter()
        self._first_with: dict[str, int] = {}

    def add(self, path: Path, number: int, row: Row) -> None:
        """One response. Raises UserError where a column is missing or has another length."""
        self.unknown.update(name for name in row if name not in COLUMNS)
        for name in ("rollout_logp", "policy_logp"):
            if row.get(name) is None:
                hint = nearest(name, [other for other in row if other not in COLUMNS])
                text = "missing; log-probabilities of the sampled tokens under mu and pi are needed (docs/inspect.md)."
                raise mistake(path, number, name, text + hint)
        T = len(row["rollout_logp"])
        for name in (*NUMBERS, *TOP_K, "tokens"):
            values = row.get(name)
            if values is not None and len(values) != T:
                raise mistake(path, number, name, f"{len(values)} entries, but rollout_logp has {T}.")
        self.places.append((path, number))
        self._parts["length"].append(T)
        for name in ("rollout_logp", "policy_logp"):
            self._parts[name].append(row[name].astype(np.float32))
        mask = _zeros_and_ones(path, number, "mask", row.get("mask"), np.ones(T, dtype=bool))
        self._parts["mask"].append(mask)
        self._parts["sampled"].append(_zeros_and_ones(path, number, "sampled", row.get("sampled"), mask))
        self._parts["advantages"].append(self._advantages(path, number, row, T))
        for name in _ALL_OR_NONE:
            if row.get(name) is not None:
                self._count(name)
                self._parts[name].append(self._kept(path, number, name, row[name]))
        for name in ("reward", "baseline"):
            self._parts[name].append(_number(path, number, name, row.get(name)))
        for name in ("group", "prompt", "response", "divergence_name"):
            value: Any = row.get(name)
            if value is not None:
                self._count(name)
            plain = value is None or isinstance(value, str)
            self._parts[name].append(value if plain else json.dumps(value, default=str))

    def _count(self, name: str) -> None:
        self._have[name] += 1
        self._first_with.setdefault(name, len(self.places) - 1)

    def _advantages(self, path: Path, number: int, row: Row, T: int) -> Any:
        if row.get("advantages") is not None:
            self._have["A"] += 1
            self.advantage_column = "advantages"
            return row["advantages"].astype(np.float32)
        value = _number(path, number, "advantage", row.get("advantage"))
        self._have["A"] += not math.isnan(value)
        return np.full(T, value, dtype=np.float32)

    def _kept(self, path: Path, number: int, name: str, value: Any) -> Any:
        if name in ("step", "update"):
            if isinstance(value, bool) or not isinstance(value, int):
                raise mistake(path, number, name, f"{value!r}, expected an integer.")
            return value
        if name in ("ids", "topk_ids"):
            whole = np.isnan(value) | (np.isfinite(value) & (value == np.floor(value)))
            if not whole.all():
                raise mistake(path, number, name, f"holds {value[~whole][0]:g}, expected token ids (integers).")
            return np.where(np.isnan(value), -1, value).astype(np.int64 if name == "ids" else np.int32)
        return value if name == "tokens" else value.astype(np.float32)

    # -- the whole ------------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, Any]:
        """The fields of `Dump`, but for its path and notes. Raises UserError where only some rows have a column."""
        S, parts = len(self.places), self._parts
        for name in _ALL_OR_NONE:
            if 0 < self._have[name] < S:
                raise self._partly(name)
        found: dict[str, Any] = {"cu_seqlens": np.concatenate([[0], np.cumsum(parts["length"])]).astype(np.int64)}
        for name in ("rollout_logp", "policy_logp", "mask", "sampled", "divergence", "ids"):
            found[name] = self._joined(name)
        found["advantages"] = self._joined("advantages") if self._have["A"] else None
        found |= self._top_k()
        for name in ("reward", "baseline"):
            values = np.array(parts[name], dtype=np.float64)
            found[name] = None if np.isnan(values).all() else values
        for name in ("step", "update"):
            found[name] = np.array(parts[name], dtype=np.int64) if parts[name] else None
        found["group"] = self._groups()
        names = {name for name in parts["divergence_name"] if name is not None}
        if len(names) > 1:
            raise UserError(f"divergence_name is not the same in all rows: {', '.join(sorted(names))}.")
        found["divergence_name"] = names.pop() if names and found["divergence"] is not None else None
        found["tokens"] = parts["tokens"] or None
        for field, name in (("prompts", "prompt"), ("texts", "response")):
            found[field] = parts[name] if self._have[name] else None
        return found

    def _joined(self, name: str) -> Any:
        """The parts as one array; they are let go, so that there is never more than one column twice."""
        parts, self._parts[name] = self._parts[name], []
        return np.concatenate(parts) if parts else None

    def _partly(self, name: str) -> UserError:
        having = self._first_with[name]
        path, number = self.places[having]
        return UserError(
            f"the column {name} is in {self._have[name]} of {len(self.places)} rows (such as {path}, number {number}): "
            "it must be in all of them or in none."
        )

    def _top_k(self) -> dict[str, Any]:
        given = [name for name in TOP_K if self._parts[name]]
        if not given:
            return {}
        missing = [name for name in (*TOP_K, "ids") if not self._have[name]]
        if missing:
            raise UserError(f"a top K needs {', '.join((*TOP_K, 'ids'))}; the dump has no {', '.join(missing)}.")
        K = max(part.shape[1] for name in TOP_K for part in self._parts[name])
        if K == 0:
            raise UserError(f"{' and '.join(TOP_K)} hold no number at all: leave them out.")
        for name in TOP_K:
            fill = -1 if name == "topk_ids" else np.nan
            for at, part in enumerate(self._parts[name]):
                if part.shape[1] == 0:  # nothing but null: no loss token
                    self._parts[name][at] = np.full((part.shape[0], K), fill, dtype=part.dtype)
                elif part.shape[1] != K:
                    text = f"{part.shape[1]} entries a token, elsewhere {K}: K must be the same in the whole dump."
                    raise mistake(*self.places[at], name, text)
        return {name: self._joined(name) for name in TOP_K}

    def _groups(self) -> Any:
        """The prompt of each response as a number: `group`, else the prompt's text, each within its step."""
        source = "group" if self._have["group"] else "prompt" if self._have["prompt"] else None
        if source is None:
            return None
        if self._have[source] < len(self.places):
            raise self._partly(source)
        steps = self._parts["step"] or [0] * len(self.places)
        codes: dict[tuple[int, str], int] = {}
        keys = zip(steps, self._parts[source], strict=True)
        return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64)


def _zeros_and_ones(path: Path, number: int, name: str, values: Any, default: Any) -> Any:
    """bool ``[T]``; the default where the row has none."""
    if values is None:
        return default
    right = (values == 0) | (values == 1)
    if not right.all():
        raise mistake(path, number, name, f"holds {values[~right][0]:g}, expected 0 or 1.")
    return values == 1


def _number(path: Path, number: int, name: str, value: Any) -> float:
    """A number a response; null is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise mistake(path, number, name, f"{value!r}, expected a number.")
    return float(value)
