"""The rows of one dump file, JSONL or parquet, a response at a time: lists become numpy arrays, null becomes NaN.

Types are checked here, everything else in `cppo.dumps.dump`. Parquet is read a few hundred rows at a time and JSONL a
line at a time, so that Python's own numbers, which take ten times the room, never exist for a whole file.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cppo.errors import UserError
from cppo.words import nearest

#: A number per token.
NUMBERS = ("rollout_logp", "policy_logp", "mask", "sampled", "advantages", "divergence", "ids")
#: K numbers per token.
TOP_K = ("topk_ids", "topk_rollout_logp", "topk_policy_logp")
#: Something per response.
SCALARS = ("advantage", "reward", "baseline", "group", "step", "update", "prompt", "response", "divergence_name")
COLUMNS = (*NUMBERS, *TOP_K, "tokens", *SCALARS)
SUFFIXES = {".jsonl": "line", ".parquet": "row"}

#: Rows of a parquet file in memory at a time.
BATCH = 128

Row = dict[str, Any]


def word(path: Path) -> str:
    """What a row of this file is called: "line" or "row"."""
    return SUFFIXES[path.suffix]


def mistake(path: Path, number: int, column: str | None, text: str) -> UserError:
    """The error with its place: file, line or row (from 1), column."""
    place = f"{path}, {word(path)} {number}" + (f", column {column}" if column else "")
    return UserError(f"{place}: {text}")


def read_rows(path: Path, note: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    """(line or row from 1, its columns) of a file. Unknown columns hold None: only their names count.

    note : called with what the user should know about a file that is read all the same (a last line cut off).

    Raises
    ------
    UserError : no such file, an unknown type, a line that is not a JSON object, a column of the wrong type.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is of an unknown type ({path.suffix or 'no suffix'}): a dump is a .jsonl file, one JSON object a "
            "line and response, or a .parquet file, one response a row (docs/inspect.md)."
        )
    return _jsonl(path, note) if path.suffix == ".jsonl" else _parquet(path)


# ---------------------------------------------------------------------------------------------------------------- JSONL


def _jsonl(path: Path, note: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it holds a {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                if not stream.read(4096).strip():  # the last one: whoever wrote it was stopped
                    note(f"the last line of {path} (line {number}) is cut off and was left out.")
                    return
                raise mistake(path, number, None, f"not a JSON object ({error}); expected one per line.") from error
            yield number, {name: _from_json(path, number, name, value) for name, value in row.items()}


def _from_json(path: Path, number: int, name: str, value: Any) -> Any:
    if value is None or name in SCALARS:
        return value
    if name not in COLUMNS:
        return None
    if not isinstance(value, list):
        raise mistake(path, number, name, f"a {type(value).__name__}, expected a list with one entry per token.")
    if name == "tokens":
        if set(map(type, value)) - {str}:
            raise mistake(path, number, name, "holds something else than texts.")
        return value
    if name in NUMBERS:
        _only_numbers(path, number, name, set(map(type, value)))
        return _array(value)
    if set(map(type, value)) - {list, type(None)}:
        raise mistake(path, number, name, "expected a list of K numbers for each token.")
    _only_numbers(path, number, name, set(map(type, itertools.chain.from_iterable(entry or () for entry in value))))
    return _square(path, number, name, [len(entry or ()) for entry in value], value)


def _only_numbers(path: Path, number: int, name: str, types: set[type]) -> None:
    wrong = types - {int, float, bool, type(None)}
    if wrong:
        found = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise mistake(path, number, name, f"holds something else than numbers ({found}).")


def _array(values: Any) -> Any:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _square(path: Path, number: int, name: str, lengths: list[int], entries: list[Any]) -> Any:
    """K-lists as [T, K]; a token without any has NaN."""
    K = max(lengths, default=0)
    uneven = next((t for t, length in enumerate(lengths) if length not in (0, K)), None)
    if uneven is not None:
        text = f"{lengths[uneven]} numbers at token {uneven + 1}, elsewhere {K}: K must be the same for all tokens."
        raise mistake(path, number, name, text)
    return _array([entry or [None] * K for entry in entries]).reshape(len(entries), K)


# -------------------------------------------------------------------------------------------------------------- parquet


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow, or dump JSONL.") from error
    try:
        with pq.ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow]
            known = [name for name in names if name in COLUMNS]
            unknown = dict.fromkeys(name for name in names if name not in COLUMNS)
            start = 0
            for batch in file.iter_batches(batch_size=BATCH, columns=known):
                columns = {name: _columns(path, start, name, batch.column(name)) for name in known}
                for at in range(batch.num_rows):
                    yield start + at + 1, {name: values[at] for name, values in columns.items()} | unknown
                start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({error}). A parquet file that was cut off is lost as a whole: its "
            "directory stands at its end."
        ) from error


def _columns(path: Path, start: int, name: str, column: Any) -> list[Any]:
    """One entry per row: arrays, lists of texts, or what the cell holds."""
    import pyarrow as pa

    kind = column.type
    if name in SCALARS or pa.types.is_null(kind):
        values: list[Any] = column.to_pylist()
        return values
    if not _is_list(kind):
        raise mistake(path, start + 1, name, f"of type {kind}, expected a list with one entry per token.")
    inner = kind.value_type
    flat, lengths = column.flatten(), _lengths(column)
    ends = np.cumsum(np.maximum(lengths, 0))

    def rows(values: Any) -> list[Any]:
        spans = zip(ends - np.maximum(lengths, 0), ends, lengths, strict=True)
        return [None if length < 0 else values[low:high] for low, high, length in spans]

    if name == "tokens":
        if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
            raise mistake(path, start + 1, name, f"holds {inner}, expected texts.")
        return rows(["" if text is None else text for text in flat.to_pylist()])
    if name in NUMBERS:
        return rows(_floats(path, start, name, inner, flat))
    if not (_is_list(inner) or pa.types.is_null(inner)):
        raise mistake(path, start + 1, name, "expected a list of K numbers for each token.")
    if pa.types.is_null(inner):
        return rows(np.empty((len(flat), 0)))
    counts = np.maximum(_lengths(flat), 0)
    K = int(counts.max(initial=0))
    uneven = (counts != 0) & (counts != K)
    if uneven.any():
        token = int(uneven.argmax())
        row = int(np.searchsorted(ends, token, side="right"))
        at = token - int(ends[row] - max(lengths[row], 0)) + 1
        text = f"{counts[token]} numbers at token {at}, elsewhere {K}: K must be the same for all tokens."
        raise mistake(path, start + row + 1, name, text)
    square = np.full((len(flat), K), np.nan)
    square[counts > 0] = _floats(path, start, name, inner.value_type, flat.flatten()).reshape(-1, K)
    return rows(square)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _lengths(column: Any) -> Any:
    """Entries of each list, -1 for null."""
    import pyarrow.compute as pc

    return pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _floats(path: Path, start: int, name: str, kind: Any, flat: Any) -> Any:
    import pyarrow as pa

    types = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in types):
        raise mistake(path, start + 1, name, f"holds {kind}, expected numbers.")
    return flat.cast(pa.float64()).to_numpy(zero_copy_only=False)


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
                    text = f"{part.shape[1]} entries per token, elsewhere {K}: K must be the same in the whole dump."
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
    """A number per response; null is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise mistake(path, number, name, f"{value!r}, expected a number.")
    return float(value)
